"""EngineProcess runs an engine in a process of its own, which can hang, crash or run out of memory harmlessly.

Engines are forked from a warm process, one for each backend, which has imported torch and the engine's library; see
`evaluator.forkserver`. Whatever ends this process, even SIGKILL, ends its engines.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

from evaluator import answering, backends, errors, forkserver, last_words
from evaluator.backends import EngineSettings
from evaluator.closing import ClosingUnheld
from evaluator.errors import BackendUnavailable, EngineCrashed, EngineOutOfMemory, EngineTimeout, NotFinite
from evaluator.generation import Answer, Limits

ANSWER_S = 30.0  # forking and killing take no time: an answer that takes longer means that the warm process hangs
GRACE_S = 2.0  # the time in which an engine whose socket ended may leave an exit status
LESS_MEMORY = "lower the batch sizes, the window or gpu_memory_utilization, or free memory"


class EngineProcess(ClosingUnheld):
    """A started engine. Every method waits for the answer, at most `settings.call_timeout_s`.

    After EngineTimeout, EngineOutOfMemory or EngineCrashed the process is gone and `alive` is False, except where the
    engine survived the error.

    Args:
        backend: The engine's name.
        path: The checkpoint directory.
        settings: How the engine is run.
        log: The file for the engine's standard output and error; it is emptied at the start.

    Attributes:
        pid: The process id of the engine.
        seconds: The seconds until it was ready ("start"), of them the warm process's own start ("warm"), and the
            seconds of loading alone ("load").

    Raises:
        BackendUnavailable: The engine cannot run on this machine.
        EngineTimeout: The start or a call took longer than allowed.
        EngineOutOfMemory: The engine ran out of memory.
        EngineCrashed: The engine ended or raised.
    """

    def __init__(self, backend: str, path: str | Path, settings: EngineSettings, log: str | Path) -> None:
        self.backend = backend
        self.path = Path(path).resolve()
        self.settings = settings
        self.log = Path(log).resolve()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        started = time.monotonic()
        deadline = started + settings.start_timeout_s
        self._server, warm = _server(backend, deadline)
        ours, theirs = socket.socketpair()
        with theirs:
            request = {
                "path": str(self.path),
                "settings": settings.to_dict(),
                "log": str(self.log),
                "environ": dict(os.environ),
            }
            try:
                self.pid = int(self._server.ask(request, theirs.fileno())["pid"])
            except BaseException:
                ours.close()
                raise
        self._connection = Connection(ours.detach())
        answer = self._receive("start", max(deadline - time.monotonic(), 0.0), settings.start_timeout_s)
        if "kind" in answer:
            self._end()
            raise self._error(answer, "start")
        self._facts: dict[str, str] = answer["value"]["facts"]
        self.seconds = {
            "start": time.monotonic() - started,
            "warm": warm,
            "load": float(answer["value"]["load"]),
        }

    # -- what an engine can do -------------------------------------------------------------------------------

    def nll(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the negative log-likelihood of each token except the first, in nats.

        A window of T token ids gives T − 1 numbers.

        Raises:
            NotFinite: The model is broken.
        """
        found: list[list[float]] = self._call("nll", [list(window) for window in windows])
        wrong = sum(not math.isfinite(value) for window in found for value in window)
        if wrong:
            total = sum(map(len, found))
            raise NotFinite(
                f"{self.backend} engine, {self.path.name}: the loss of {wrong} of {total} tokens is NaN or infinite; "
                "this model is broken"
            )
        return found

    def decode_steps(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> list[float]:
        """Return the seconds of each single decode step, after a prefill that is not timed."""
        found: list[float] = self._call("decode_steps", batch_size, prompt_tokens, steps, seed)
        return found

    def generate(self, prompts: Sequence[Sequence[int]], limits: Limits | Sequence[Limits]) -> list[Answer]:
        """Return the answer to each prompt of token ids; see `evaluator.backends.Engine`.

        What can't be generated is refused before the engine is asked.

        Raises:
            RequestRefused: A prompt is empty or too long, or limits make no sense.
        """
        most = self.settings.arguments.get("max_model_len", self.settings.max_model_len)
        asked = answering.asked(prompts, limits, most)
        found: list[dict[str, Any]] = self._call(
            "generate", [one.prompt for one in asked], [dataclasses.asdict(one.limits) for one in asked]
        )
        return [answering.answer_of(values) for values in found]

    def busy_ms(self, batch_size: int, prompt_tokens: int, steps: int, seed: int) -> float | None:
        """Return the GPU's busy milliseconds of a decode step; see `evaluator.backends.ProfiledEngine`."""
        found: float | None = self._call("busy_ms", batch_size, prompt_tokens, steps, seed)
        return found

    def bytes_per_s(self) -> float | None:
        """Return the bandwidth of the GPU's memory; see `evaluator.backends.ProfiledEngine`."""
        found: float | None = self._call("bytes_per_s")
        return found

    def logits_sha256(self, tokens: Sequence[int]) -> str:
        """Return the sha256 of what the engine computes on one window; see `evaluator.backends.Engine`."""
        return str(self._call("logits_sha256", list(tokens)))

    def facts(self) -> dict[str, str]:
        """Return what the engine told about itself when it was ready; see `evaluator.backends.Engine`."""
        return dict(self._facts)

    # -- the process -----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether the engine can still be called."""
        if self._connection is None:
            return False
        try:
            return not self._connection.poll(0)  # between calls only the end can be read
        except OSError:
            return False

    def close(self) -> None:
        """Kill the engine and what it started. A second call does nothing."""
        self._end()

    def _call(self, name: str, *arguments: Any) -> Any:
        with self._lock:
            if self._connection is None:
                raise EngineCrashed(f"{self.backend} engine, {self.path.name}: {name}: it was closed; start another")
            try:
                self._connection.send_bytes(json.dumps({"call": name, "arguments": arguments}).encode())
            except OSError:
                raise self._ended(name) from None
            try:
                answer = self._receive(name, self.settings.call_timeout_s, self.settings.call_timeout_s)
            except BaseException:  # KeyboardInterrupt: the answer would be taken for the next call's
                self._end()
                raise
        if "kind" in answer:
            if answer["ended"]:
                self._end()
            raise self._error(answer, name)
        return answer["value"]

    def _receive(self, what: str, timeout_s: float, allowed_s: float) -> dict[str, Any]:
        if self._connection is None:
            raise self._ended(what)
        try:
            if not self._connection.poll(timeout_s):
                self._end()
                raise EngineTimeout(
                    f"{self.backend} engine, {self.path.name}: {what} took longer than {allowed_s:g} s and was killed; "
                    f"raise {'start' if what == 'start' else 'call'}_timeout_s{last_words.of(self.log)}"
                )
            answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            raise self._ended(what) from None
        except BaseException:
            self._end()
            raise
        return answer

    def _ended(self, what: str) -> EngineCrashed:
        """Return the error for an engine that ended during `what`."""
        status = self._end(GRACE_S)
        where = f"{self.backend} engine, {self.path.name}: {what}:"
        if status == -signal.SIGKILL:
            return _killed(
                EngineOutOfMemory(
                    f"{where} the process was killed from outside, as the kernel does when memory runs out; "
                    f"{LESS_MEMORY}{last_words.of(self.log)}"
                )
            )
        if status is not None and status < 0:
            how = f"the process ended with {signal.Signals(-status).name}"
        else:
            how = f"the process ended{'' if status is None else f' with status {status}'}"
        error = EngineCrashed(f"{where} {how}; its log is {self.log}{last_words.of(self.log)}")
        return _killed(error) if status is None or status < 0 else error

    def _error(self, answer: dict[str, Any], what: str) -> errors.EvaluationError:
        kind: type[errors.EvaluationError] = getattr(errors, answer["kind"])
        text = f"{self.backend} engine, {self.path.name}: {what}: {answer['text']}"
        return kind(f"{text}; {LESS_MEMORY}" if kind is EngineOutOfMemory else text)

    def _end(self, grace: float = 0.0) -> int | None:
        connection, self._connection = self._connection, None
        if connection is None:
            return None
        connection.close()
        return self._server.end(self.pid, grace)


def _killed(error: EngineCrashed) -> EngineCrashed:
    """Mark an error as that of a process that a signal ended."""
    error.killed = True
    return error


# -- the warm processes of this process ----------------------------------------------------------------------


class _Server:
    """A warm process, which ends with this process; see `evaluator.forkserver`."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.owner = os.getpid()
        self.usable = True
        self.lock = threading.Lock()
        self.messages: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 lives as long as the process
        self.control, theirs = socket.socketpair()
        with theirs:
            here = [entry or str(Path.cwd()) for entry in sys.path]  # it can import what this process can
            environment = {**os.environ, **backends.module_of(backend).ENVIRONMENT, "PYTHONPATH": os.pathsep.join(here)}
            arguments = [sys.executable, "-P", "-m", "evaluator.forkserver", backend]
            self.process = subprocess.Popen(
                [*arguments, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self.messages,
                stderr=self.messages,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,  # Ctrl-C goes to the caller alone, who closes its engines
            )

    def wait_until_ready(self, deadline: float) -> None:
        answer = self._receive(deadline)
        if "error" in answer:
            raise BackendUnavailable(f"backend {self.backend}: {answer['error']}")

    def ask(self, message: dict[str, Any], fd: int | None = None, takes_s: float = 0.0) -> dict[str, Any]:
        with self.lock:
            if not self.usable:
                raise EngineCrashed(f"backend {self.backend}: the process that imports its libraries has ended")
            try:
                forkserver.send(self.control, message, fd)
                return self._receive(time.monotonic() + takes_s + ANSWER_S)
            except errors.EvaluationError:
                raise
            except OSError:
                raise self._gone() from None
            except BaseException:  # KeyboardInterrupt: the answer would be taken for the next message's
                self.usable = False
                self.control.close()  # which ends the warm process and its engines
                raise

    def end(self, pid: int, grace: float) -> int | None:
        if self.owner != os.getpid():
            return None  # a fork of the process that started it must not end it
        try:
            status = self.ask({"end": pid, "grace": grace}, takes_s=grace)["status"]
        except errors.EvaluationError:
            return None  # the warm process is gone, and its engines with it
        return None if status is None else int(status)

    def close(self) -> None:
        self.control.close()
        try:
            self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.messages.close()

    def _receive(self, deadline: float) -> dict[str, Any]:
        self.control.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            answer, _ = forkserver.receive(self.control)
        except TimeoutError:
            self.usable = False
            self.process.kill()
            raise EngineTimeout(
                f"backend {self.backend}: the process that imports its libraries did not answer in time and was "
                "killed; raise start_timeout_s"
            ) from None
        except (EOFError, OSError):
            raise self._gone() from None
        return answer

    def _gone(self) -> EngineCrashed:
        self.usable = False
        try:
            ended: int | None = self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            ended = None
        self.process.kill()
        status = self.process.wait()
        self.messages.seek(0)
        told = last_words.of_text(self.messages.read().decode(errors="replace")) or "it said nothing"
        error = EngineCrashed(
            f"backend {self.backend}: the process that imports its libraries ended with status {status}: {told}"
        )
        return _killed(error) if ended is not None and ended < 0 else error


_servers: dict[str, _Server] = {}
_not_ready: set[_Server] = set()
_starting = threading.Lock()


def _server(backend: str, deadline: float) -> tuple[_Server, float]:
    """Return this process's warm process for a backend, and the seconds that its start took: 0 if it ran already."""
    with _starting:
        known = _servers.get(backend)
        if known is not None and known.owner == os.getpid() and known.usable and known.process.poll() is None:
            return known, 0.0
        reason = backends.unavailable(backend)
        if reason:
            raise BackendUnavailable(f"backend {backend}: {reason}")
        started = time.monotonic()
        server = _Server(backend)
        _not_ready.add(server)
        try:
            server.wait_until_ready(deadline)
        except BaseException:
            server.close()
            raise
        finally:
            _not_ready.discard(server)
        _servers[backend] = server
        return server, time.monotonic() - started


def warm(backend: str, timeout_s: float = 300.0) -> float:
    """Start a backend's warm process before its first engine, and return the seconds that it took."""
    return _server(backend, time.monotonic() + timeout_s)[1]


def warm_ahead(name: str) -> None:
    """Begin to import an engine's library in the background, where that takes long: vLLM's takes half a minute.

    What fails is told when the engine is wanted.

    Args:
        name: The engine's name, or auto; see `backends.choose`.
    """

    def begin() -> None:
        with contextlib.suppress(errors.EvaluationError):
            backend = backends.choose(name)
            if backends.module_of(backend).FACTS.imports_slowly:
                warm(backend)

    threading.Thread(target=begin, daemon=True).start()


@atexit.register
def _close_servers() -> None:
    for server in list(_not_ready):  # it is still importing, and hears nothing
        server.process.kill()
    for server in _servers.values():
        if server.owner == os.getpid():
            server.close()
    _servers.clear()
