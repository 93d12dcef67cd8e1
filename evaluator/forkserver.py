"""The warm process imports an engine's libraries once and forks a child for each engine.

`evaluator.process` starts it as `python -m evaluator.forkserver BACKEND FD PID`. Python's own fork server, that of
multiprocessing, imports the caller's __main__ into every child, exists once in a program and hides a child's exit
status. This one belongs to one backend, never sees __main__, and its engines end with it.

    caller ── control socket (FD) ──> this process ── fork ──> engine, in a process group of its own
       └───────────── a socket per engine ─────────────────────────┘

- If the caller is gone, for whatever reason and even during a call, the control socket ends or the parent process
  changes. Every engine's process group is then killed.
- If this process is gone, the kernel kills the engines (PR_SET_PDEATHSIG). On systems other than Linux they watch for
  it.

A message is JSON after its length; an engine's socket travels with the request that asks for the engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from evaluator import answering, backends, errors
from evaluator.backends import Engine, EngineSettings

PR_SET_PDEATHSIG = 1
OUT_OF_MEMORY = (  # parts of libraries' messages in lower case; the first is also CUDA's
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "no available memory for the cache blocks",
    "is less than desired gpu memory utilization",
    "kv cache is needed, which is larger than the available",
)

DEVICE_LOST = (  # the same of a GPU, a driver or a disk that fails
    "cuda error",
    "cuda driver",
    "cudaerror",
    "cublas_status",
    "cudnn_status",
    "no cuda gpus are available",
    "nvml",
    "nccl error",
    "hip error",
    "no space left on device",
    "input/output error",
    "disk quota exceeded",
    "stale file handle",
    "too many open files",
    "read-only file system",
)


# -- messages on the control socket --------------------------------------------------------------------------


def send(to: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """Send a message, and a file descriptor with it if one is given."""
    data = json.dumps(message).encode()
    header = struct.pack("!I", len(data))
    if fd is None:
        to.sendall(header + data)
    else:
        socket.send_fds(to, [header], [fd])
        to.sendall(data)


def receive(source: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Wait for a message, and return it with the file descriptor that came with it, or None.

    Raises:
        EOFError: The other side is gone.
    """
    header, fds, _, _ = socket.recv_fds(source, 4, 1)
    while 0 < len(header) < 4:
        header += _some(source, 4 - len(header))
    if not header:
        raise EOFError
    (length,) = struct.unpack("!I", header)
    data = b""
    while len(data) < length:
        data += _some(source, length - len(data))
    message: dict[str, Any] = json.loads(data)
    return message, fds[0] if fds else None


def _some(source: socket.socket, most: int) -> bytes:
    got = source.recv(most)
    if not got:
        raise EOFError
    return got


# -- the warm process ----------------------------------------------------------------------------------------


def main(backend: str, fd: int, caller: int) -> int:
    """Serve the caller until it is gone.

    Args:
        backend: The engine's name.
        fd: The file descriptor of the control socket.
        caller: The caller's process id.

    Returns:
        The exit status of this process.
    """
    control = socket.socket(fileno=fd)
    control.set_inheritable(False)
    children: set[int] = set()
    try:
        module = backends.module_of(backend)
        started = time.perf_counter()
        try:
            module.preload()
        except Exception as error:
            traceback.print_exc()
            send(control, {"error": f"its library can't be imported: {_one_line(error)}"})
            return 1
        if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
            send(control, {"error": "importing its library opened the GPU, which no forked engine could use then"})
            return 1
        gc.collect()
        gc.freeze()  # imported modules stay shared: the collector leaves their pages alone
        send(control, {"ready": time.perf_counter() - started})
        while True:
            readable, _, _ = select.select([control], [], [], 1.0)
            if os.getppid() != caller:
                return 0
            if readable:
                message, engine_fd = receive(control)
                send(control, _answer(message, engine_fd, backend, control, children))
    except (EOFError, OSError):
        return 0  # the caller is gone
    finally:
        for pid in children:
            _end(pid)


def _answer(
    message: dict[str, Any], fd: int | None, backend: str, control: socket.socket, children: set[int]
) -> dict[str, Any]:
    if fd is not None:
        pid = os.fork()
        if pid == 0:
            _engine(message, fd, backend, control)
        os.close(fd)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # the child does so too: whichever is first, a kill finds the group
        children.add(pid)
        return {"pid": pid}
    pid = int(message["end"])
    if pid not in children:
        return {"status": None}
    children.discard(pid)
    return {"status": _end(pid, float(message["grace"]))}


def _end(pid: int, grace: float = 0.0) -> int | None:
    """Kill what is left of an engine's group; return its exit code if it ended by itself within `grace` seconds."""
    deadline = time.monotonic() + grace
    status = None
    while True:
        try:
            done, raw = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            break
        if done:
            status = os.waitstatus_to_exitcode(raw)
            break
        if time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    if status is None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return status


# -- the engine's process ------------------------------------------------------------------------------------


def _engine(message: dict[str, Any], fd: int, backend: str, control: socket.socket) -> NoReturn:
    """Serve calls until the caller closes; never return into the warm process's code."""
    code = 1
    try:
        server = os.getppid()
        control.close()
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        _die_with(server)
        log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        importable = os.environ["PYTHONPATH"]
        os.environ.clear()
        os.environ.update({**message["environ"], **backends.module_of(backend).ENVIRONMENT, "PYTHONPATH": importable})
        connection = Connection(fd)
        _serve(connection, backend, message["path"], EngineSettings.from_dict(message["settings"]))
        code = 0
    except (EOFError, ConnectionError):
        code = 0  # the caller closed
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(connection: Connection, backend: str, path: str, settings: EngineSettings) -> None:
    started = time.perf_counter()
    try:
        engine = backends.module_of(backend).Engine(path, settings)
        facts = engine.facts()
    except Exception as error:
        traceback.print_exc()
        _reply(connection, _described(error))
        return
    _reply(connection, {"value": {"load": time.perf_counter() - started, "facts": facts}})
    while True:
        call = json.loads(connection.recv_bytes())
        try:
            answer = {"value": _called(engine, call["call"], call["arguments"])}
        except Exception as error:
            traceback.print_exc()
            answer = {**_described(error), "ended": not engine.survives_errors}
        _reply(connection, answer)
        if answer.get("ended"):
            return


def _called(engine: Engine, name: str, arguments: list[Any]) -> Any:
    """Return what a call of the engine returns, as JSON values."""
    if name != "generate":
        return getattr(engine, name)(*arguments)
    prompts, limits = arguments
    return [dataclasses.asdict(answer) for answer in engine.generate(prompts, [*map(answering.limits_of, limits)])]


def _reply(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())


def _described(error: BaseException) -> dict[str, Any]:
    """Return an exception as kind, the name of one of `evaluator.errors`, and text."""
    if isinstance(error, errors.EvaluationError):
        return {"kind": type(error).__name__, "text": _one_line(error)}
    text = _one_line(error)
    chain = f"{error} {error.__cause__ or ''} {error.__context__ or ''}".lower()
    if isinstance(error, MemoryError) or any(words in chain for words in OUT_OF_MEMORY):
        return {"kind": "EngineOutOfMemory", "text": text}
    if any(words in chain for words in DEVICE_LOST):
        return {"kind": "DeviceLost", "text": text}
    return {"kind": "EngineCrashed", "text": text}


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, errors.EvaluationError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _die_with(server: int) -> None:
    """Let this process be killed when the warm process ends, in whatever way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it ended before the line above
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == server:
            time.sleep(1.0)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
