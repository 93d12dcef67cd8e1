"""LimitedChild runs what a model brings in a process of its own, and waits for each answer only so long."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path


class TookTooLong(Exception):
    """No answer came in time; the process was killed."""


class Ended(Exception):
    """The process ended without an answer; the text says how."""


class LimitedChild:
    """A script that reads messages, each after its length in bytes (4 bytes, big-endian), and answers with lines.

    It is isolated (`python -I`), limits its own memory, and ends with this object.

    Args:
        script: The script's file.
        arguments: Its arguments.
    """

    def __init__(self, script: Path, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, data: bytes) -> None:
        """Send a message. That the process has ended is found when its answer is waited for."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(len(data).to_bytes(4, "big") + data)
            self._process.stdin.flush()

    def line(self, limit_s: float) -> bytes:
        r"""Return the next line, with its "\n".

        Args:
            limit_s: The most seconds to wait.

        Raises:
            TookTooLong: It was not there in time.
            Ended: The process ended before.
        """
        assert self._process.stdout is not None
        ends, line = time.monotonic() + limit_s, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                self.close()
                raise TookTooLong
            part = self._process.stdout.read1(1 << 20)  # type: ignore[attr-defined]  # a BufferedReader
            if not part:
                status = self._process.wait()
                self.close()
                raise Ended(signal.Signals(-status).name if status < 0 else f"exit status {status}")
            line += part
        return line

    def close(self) -> None:
        """Kill the process. A second call does nothing."""
        self._end()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
