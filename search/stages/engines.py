"""The engines of one worker: the baseline's, kept open between trials, and one for each candidate."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from evaluator import backends
from evaluator.backends import EngineSettings
from evaluator.closing import Closing
from evaluator.errors import EngineCrashed
from evaluator.process import EngineProcess
from evaluator.serve_bench import Timed
from evaluator.server import Server
from search.say import Say
from search.setup.engine_memory import ENGINE_BYTES, GENERATING_BYTES
from search.setup.machine import free_memory
from search.setup.setting import Setting

T = TypeVar("T")
PORT_TAKEN, PORT_TRIES = "EADDRINUSE", 3  # vLLM looks for a free port first and takes it later
HOST_BYTES = 1 << 29  # of a machine's memory that an engine on the CPU takes beside its weights
SHARE_OF_HOST = 0.5  # of a machine's free memory that engines on the CPU may take
SHARE_OF_FREE = 0.8  # of a GPU's free memory that engines side by side may take
LITTLE = 0.02  # share of a GPU that an engine with random weights asks for; it takes what it needs


class Engines(Closing):
    """Starts engines as the setting wants them. Use it with `with`.

    Attributes:
        base_ms: The base model's time per token in milliseconds, where two processes of it took longer than when it was
            measured alone: the machine has become slower. Else 0.
    """

    def __init__(self, setting: Setting) -> None:
        self._backend, self._settings = setting.machine.backend, setting.engine_settings
        self._base_path, self._logs = setting.model.path, setting.outputs / "logs"
        self._arguments, self._workload = server_arguments(setting), setting.workload
        self._baseline: EngineProcess | None = None
        self._server: Server | None = None
        self.base_ms, self._replaced = 0.0, False
        self._starting = threading.Lock()

    def baseline(self) -> EngineProcess:
        """Return the base model's engine; it is started when it is first wanted, and again after it died."""
        with self._starting:
            if self._baseline is None or not self._baseline.alive:
                self._end()
                self._baseline = self.start(self._base_path, "baseline")
            return self._baseline

    def replaced_baseline(self, ms: float, *, slow: bool) -> bool:
        """Take note of the base model's time beside a candidate; return whether its process ended, since it is slow.

        A fresh process that is slow too is believed.

        Args:
            ms: The time per token in milliseconds.
            slow: Whether that is surely more than was expected.
        """
        if slow and not self._replaced:
            with self._starting:
                self._end()
                self._end_server()
            self._replaced = True
            return True
        self.base_ms, self._replaced = ms if slow else min(self.base_ms, ms), False
        return False

    def start(self, path: Path, name: str, *, random_weights: bool = False) -> EngineProcess:
        """Start an engine on the checkpoint in `path`; its output goes to logs/engine-NAME.log.

        Args:
            path: The checkpoint's directory.
            name: The name of the log.
            random_weights: Whether config.json alone is read.

        Raises:
            EvaluationError: It can't be started.
        """
        settings = self._settings
        if random_weights:
            settings = dataclasses.replace(settings, random_weights=True, gpu_memory_utilization=LITTLE)
        return start_engine(self._backend, path, settings, self._logs / f"engine-{name}.log")

    def timed_baseline(self) -> Timed:
        """Return the base model's server, as what is timed; it is started as `baseline` is."""
        with self._starting:
            if self._server is None or not self._server.alive:
                self._end_server()
                self._server = self.serve(self._base_path, "baseline")
            return self.timed(self._server)

    def serve(self, path: Path, name: str) -> Server:
        """Start a server on the checkpoint in `path`; its output goes to logs/server-NAME.log.

        Raises:
            EvaluationError: It can't be started.
        """
        log = self._logs / f"server-{name}.log"
        return Server(path, log, self._arguments, self._settings.start_timeout_s)

    def timed(self, server: Server) -> Timed:
        """Return a server as what is timed."""
        return Timed(server, self._workload, self._settings.call_timeout_s)

    def close(self) -> None:
        """End the base model's engine and server; one that is just being started ends with this process."""
        if self._starting.acquire(blocking=False):
            self._end()
            self._end_server()
            self._starting.release()

    def _end(self) -> None:
        if self._baseline is not None:
            self._baseline.close()
            self._baseline = None

    def _end_server(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


def server_arguments(setting: Setting) -> dict[str, Any]:
    """Return the arguments of every server: its share of the GPU's memory, and what the workload names."""
    return {"gpu_memory_utilization": setting.file.evaluation.gpu_memory_utilization, **setting.workload.server}


def start_engine(backend: str, path: Path, settings: EngineSettings, log: Path) -> EngineProcess:
    """Start an engine; again where it chose a port that another engine, started at once, had chosen too.

    Raises:
        EvaluationError: It can't be started.
    """
    for _ in range(PORT_TRIES):
        try:
            return EngineProcess(backend, path, settings, log=log)
        except EngineCrashed as error:
            if PORT_TAKEN not in str(error):
                raise
    return EngineProcess(backend, path, settings, log=log)


def engine_bytes(setting: Setting) -> int:
    """Return the bytes of a GPU's memory that an engine takes beside its weights."""
    settings = setting.engine_settings
    cache = (settings.kv_tokens or 0) * backends.kv_bytes(setting.model.checkpoint.config)
    return ENGINE_BYTES + cache + (0 if settings.max_num_seqs is None else GENERATING_BYTES)


def room_on_gpu() -> int:
    """Return the bytes of the GPU's free memory that engines side by side may take."""
    return int(SHARE_OF_FREE * torch.cuda.mem_get_info()[0])


def room_on_host(device: str) -> int:
    """Return the bytes of the machine's free memory that engines side by side may take; 0 where that is not known."""
    return int(SHARE_OF_HOST * (free_memory(device) or 0))


def once_more(work: Callable[[], T], say: Say) -> T:
    """Return what `work` returns; it is called again if an engine was killed by a signal in it.

    The kernel kills what takes most memory, whoever needs it. An engine that is killed twice is given up.

    Raises:
        EngineCrashed: The engine was killed a second time, or ended by itself.
    """
    try:
        return work()
    except EngineCrashed as error:
        if not error.killed:
            raise
        say("the engine was killed: once more")
        return work()
