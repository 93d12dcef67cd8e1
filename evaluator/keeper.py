"""The keeper starts a command and ends it with its caller: `python -m evaluator.keeper COMMAND …`.

Its standard input is a pipe that the caller holds. When that ends, because the caller closed it or was killed in
whatever way, the command's whole process group is killed: a server starts processes of its own. If the keeper itself is
killed, the kernel kills the command (PR_SET_PDEATHSIG; Linux alone).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import BinaryIO

PR_SET_PDEATHSIG = 1
LOOK_S = 0.05
GRACE_S = 10.0  # in which a keeper has ended its command


def start(command: Sequence[str], output: BinaryIO, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Return a keeper that runs a command, whose output goes to a file.

    It has a session of its own: Ctrl-C goes to this process alone, which ends it.
    """
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "evaluator.keeper", *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        env=environment,
        start_new_session=True,
    )


def end(keeper: subprocess.Popen[bytes]) -> None:
    """End a keeper, and so what it runs. A second call does nothing."""
    if keeper.stdin is not None and not keeper.stdin.closed:
        with contextlib.suppress(OSError):
            keeper.stdin.close()
    try:
        keeper.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()


def main(command: list[str]) -> int:
    """Run the command until it ends or the caller is gone, and return its exit status."""
    keeper = os.getpid()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_keeper() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != keeper:  # it ended before the line above
                os._exit(1)

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=die_with_keeper,
    )
    try:
        while process.poll() is None:
            readable, _, _ = select.select([0], [], [], LOOK_S)
            if readable and not os.read(0, 1):
                break
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what is left of a group whose leader ended
    return process.wait()


if __name__ == "__main__":
    sys.exit(min(abs(main(sys.argv[1:])), 255))
