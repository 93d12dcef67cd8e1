"""Confirms models in fresh engine processes: several pairs with the base model's, and once their quality.

A round starts a fresh process of the base model and one of each model that lacks a pair, times them in turn and ends
them. Each pair is kept as soon as it is timed, so that a kill loses no more than the round in which it comes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from compressors.files import alone
from evaluator import measure, speed
from evaluator.backends import EngineSettings
from evaluator.errors import EngineCrashed, EvaluationError
from evaluator.process import EngineProcess
from evaluator.serve_bench import Timed
from evaluator.server import Server
from search.failures import FAILURES, why
from search.say import Say, silent
from search.setup.setting import Setting
from search.stages import build, confirmed
from search.stages import measure as stage
from search.stages.confirmed import Asked, Model, Record, Result
from search.stages.engines import (
    HOST_BYTES,
    LITTLE,
    engine_bytes,
    once_more,
    room_on_gpu,
    room_on_host,
    server_arguments,
    start_engine,
)

SERVER_BYTES = 3 << 30  # of a GPU's memory that an engine with the server's own settings takes beside its weights
SHARE_IN_ALL = 0.95  # of a GPU that engines take which ask for a share of it
SHARE_OF_SERVERS = 0.8  # of a GPU that servers take together, beside the engines
TOGETHER = 8  # models beside the base model, at most


@dataclasses.dataclass(frozen=True)
class Failed:
    """A model that could not be confirmed, with the kind of error and the reason in one line."""

    model: Model
    failure: str
    reason: str


def settings_of(setting: Setting) -> EngineSettings:
    """Return how engines are run here: as in the study, but for the arguments that `confirm.server` names.

    Engines with a fixed key/value cache take the memory that they need, and none of them a share of the GPU's.
    """
    own, server = setting.engine_settings, setting.file.confirm.server or {}
    share = server.get("gpu_memory_utilization")
    if share is None:
        share = LITTLE if _fixed_cache(server) else own.gpu_memory_utilization
    return dataclasses.replace(own, gpu_memory_utilization=share, arguments=server)


def _fixed_cache(server: Mapping[str, Any]) -> bool:
    return "kv_cache_memory_bytes" not in server or server["kv_cache_memory_bytes"] is not None


def confirm(
    asked: Asked, models: Sequence[Model], wanted: int, say: Say, warn: Say = silent
) -> tuple[list[Result], list[Failed]]:
    """Confirm models by `wanted` pairs of fresh engine processes each; what is kept already is not measured again.

    Args:
        asked: What is asked of each.
        models: The models; the base model's own plan is timed as a candidate in processes of its own.
        wanted: The number of pairs.
        say: Told what is done.
        warn: Told what people should know.

    Returns:
        The confirmed models in their order, and those that failed.

    Raises:
        EvaluationError: The base model's engine failed.
        MachineError: What is measured can't be kept.
    """
    waiting = "confirm: waiting for another process that confirms"
    with alone(asked.directory / "confirm", lambda: say(waiting)):
        return _Confirmation(asked, wanted, say, warn).of(models)


class _Confirmation:
    """One call of `confirm`: what is known so far, and which models failed."""

    def __init__(self, asked: Asked, wanted: int, say: Say, warn: Say) -> None:
        self.asked, self.wanted, self.say, self.warn = asked, wanted, say, warn
        self.setting, self.settings = asked.setting, settings_of(asked.setting)
        self.records: dict[Model, Record] = {}
        self.base = Record()
        self.failed: dict[Model, Failed] = {}

    def of(self, models: Sequence[Model]) -> tuple[list[Result], list[Failed]]:
        self.base = confirmed.known(self.asked, None)
        self.records = {model: confirmed.known(self.asked, model.plan) for model in models}
        while lacking := [model for model in models if model not in self.failed and self._lacks(model)]:
            paths = {model: path for model in lacking if (path := self._built(model)) is not None}
            ready = list(paths)
            together = self._together()
            for start in range(0, len(ready), together):
                self._round({model: paths[model] for model in ready[start : start + together]})
        done = [(model, self.records[model]) for model in models if model not in self.failed]
        if not done:
            return [], list(self.failed.values())
        assert self.base.measurement is not None
        found = confirmed.results(self.asked, self.wanted, done, self.base.measurement)
        return found, list(self.failed.values())

    def _lacks(self, model: Model) -> bool:
        record = self.records[model]
        return self._pairs_left(model) > 0 or None in (record.measurement, self.base.measurement)

    def _pairs_left(self, model: Model) -> int:
        return self.records[model].missing(self.wanted) if self.asked.timed else 0

    def _built(self, model: Model) -> Path | None:
        """Return the model's checkpoint, which is built again where it was deleted; None where that fails."""
        if model.plan == self.setting.model.identity:
            return self.setting.model.path
        try:
            path, weights_sha256 = build.write(self.setting, model.plan, self._saying(f"{model.name}: "))
        except FAILURES as error:
            self._fail(model, error)
            return None
        known = self.records[model].measurement
        if known is not None and known.weights_sha256 != weights_sha256:
            self.warn(f"{model.name}: its weights are not those that were confirmed: all pairs are timed again")
            self.records[model] = Record()
        return path

    def _fail(self, model: Model, error: Exception) -> None:
        told = why(error)
        self.failed[model] = Failed(model, str(told["failure"]), str(told["reason"]))
        self.warn(f"confirm: {model.name}: {told['reason']}")

    @property
    def _server_arguments(self) -> dict[str, Any]:
        return {**server_arguments(self.setting), **(self.setting.file.confirm.server or {})}

    def _saying(self, prefix: str) -> Say:
        return lambda text: self.say(f"confirm: {prefix}{text}")

    def _together(self) -> int:
        """Return how many models run side by side beside the base model: what the memory holds."""
        if self.setting.workload.kind == "serve" and self.asked.timed:
            share = float(self._server_arguments["gpu_memory_utilization"] or 1.0)
            return max(1, min(TOGETHER, int(SHARE_OF_SERVERS / share) - 1))
        size, server = self.setting.model.checkpoint.size_bytes, self.setting.file.confirm.server or {}
        if self.setting.machine.device == "cuda":
            if not _fixed_cache(server) or "gpu_memory_utilization" in server:
                return max(1, int(SHARE_IN_ALL / self.settings.gpu_memory_utilization) - 1)
            each = size + max(SERVER_BYTES if server else 0, engine_bytes(self.setting))
            room = room_on_gpu() // each - 1
        else:
            room = room_on_host(self.setting.machine.device) // (size + HOST_BYTES) - 1
        return max(1, min(TOGETHER, room))

    # -- a round ---------------------------------------------------------------------------------------------

    def _round(self, paths: Mapping[Model, Path]) -> None:
        """Time a pair of each model that lacks one, and measure the quality of those that lack that."""
        left, killed = dict(paths), set()
        while left := {model: path for model, path in left.items() if self._lacks(model)}:
            try:
                return once_more(partial(self._in_fresh_processes, left), self.say)
            except _OfModel as error:
                if isinstance(error.cause, EngineCrashed) and error.cause.killed and error.model not in killed:
                    killed.add(error.model)  # perhaps not for what it needs itself: see once_more
                    continue
                self._fail(error.model, error.cause)
                del left[error.model]

    def _in_fresh_processes(self, paths: Mapping[Model, Path]) -> None:
        number = max(len(self.records[model].pairs) for model in paths) + 1
        names = ", ".join(model.name for model in paths)
        self.say(f"confirm: pair {number} of {names}: starting fresh engines")
        with self._started(paths) as (base, engines):
            left = [model for model in paths if self._pairs_left(model)]
            if left:
                self._time(base, {model: engines[model] for model in left}, number)
            for model, engine in engines.items():
                if self.records[model].measurement is None:
                    with _naming(model, engine):
                        self._add(model, measurement=self._quality(paths[model], engine, model.name))
            if self.base.measurement is None:
                measured = self._quality(self.setting.model.path, base, "base model")
                self.base = Record((), measured)
                confirmed.keep(self.asked, None, self.base)

    def _time(self, base: EngineProcess, engines: Mapping[Model, EngineProcess], number: int) -> None:
        def progress(done: int, total: int) -> None:
            self.say(f"confirm: pair {number}, timing, turn {done} of {total}")

        if self.setting.workload.kind == "serve":
            with self._served(base, engines, number) as (server, servers):
                self._time_all(server, servers, progress, number)
        else:
            self._time_all(base, engines, progress, number)

    def _time_all(
        self,
        base: speed.Timed | speed.TimedServer,
        timed: Mapping[Model, EngineProcess | Timed],
        progress: Callable[[int, int], None],
        number: int,
    ) -> None:
        self.say(f"confirm: pair {number}, timing")
        try:
            every = speed.turns_of(
                list(timed.values()),
                base,
                self.setting.workload,
                self.setting.enough.time_ratio_se,
                progress,
            )
        except EvaluationError as error:
            for model, engine in timed.items():
                if not engine.alive:
                    raise _OfModel(model, error) from error
            raise
        for model, (turns, of_base) in zip(timed, every, strict=True):
            self._add(model, pair=speed.estimate(turns, of_base, speed.share_of(self.setting.workload)))

    @contextlib.contextmanager
    def _served(
        self, base: EngineProcess, engines: Mapping[Model, EngineProcess], number: int
    ) -> Iterator[tuple[Timed, dict[Model, Timed]]]:
        """Start a fresh server of the base model and of each model, one after the other; end them all."""
        tell = self._saying(f"pair {number}, ")

        def start(path: Path, place: int) -> Timed:
            log = self.setting.outputs / "logs" / f"server-confirm-{place}.log"
            server = stack.enter_context(Server(path, log, self._server_arguments, self.settings.start_timeout_s))
            return Timed(server, self.setting.workload, self.settings.call_timeout_s, tell)

        with contextlib.ExitStack() as stack:
            tell("starting fresh servers")
            own = start(base.path, 0)
            served = {}
            for place, (model, engine) in enumerate(engines.items(), 1):
                try:
                    served[model] = start(engine.path, place)
                except EvaluationError as error:
                    raise _OfModel(model, error) from error
            yield own, served

    def _quality(self, path: Path, engine: EngineProcess, name: str) -> Any:
        measured = measure.measure_candidate(
            path, engine, self.asked.request, None, progress=self._saying(f"{name}, {self.asked.text}: ")
        )
        if self.asked.timed:
            return measured
        return stage.with_predicted_time(measured, stage.predicted_ratio_of(self.setting, path))

    def _add(self, model: Model, *, pair: Any = None, measurement: Any = None) -> None:
        record = self.records[model]
        record = Record(
            (*record.pairs, *([] if pair is None else [pair])),
            record.measurement if measurement is None else measurement,
        )
        confirmed.keep(self.asked, model.plan, record)
        self.records[model] = record

    @contextlib.contextmanager
    def _started(self, paths: Mapping[Model, Path]) -> Iterator[tuple[EngineProcess, dict[Model, EngineProcess]]]:
        """Start a fresh process of the base model and of each model; end them all."""
        logs = self.setting.outputs / "logs"
        models = list(paths)
        places = [self.setting.model.path, *paths.values()]
        running: list[EngineProcess] = []
        errors: dict[int, EvaluationError] = {}

        def start(number: int) -> None:
            log = logs / f"engine-confirm-{number}.log"
            try:
                engine = start_engine(self.setting.machine.backend, places[number], self.settings, log)
            except EvaluationError as error:
                errors[number] = error
            else:
                started[number] = engine
                running.append(engine)

        started: dict[int, EngineProcess] = {}
        side_by_side = len(places) if _fixed_cache(self.setting.file.confirm.server or {}) else 1
        try:
            with ThreadPoolExecutor(side_by_side) as pool:
                list(pool.map(start, range(len(places))))
            for number, error in errors.items():
                if number == 0:
                    raise error
                raise _OfModel(models[number - 1], error) from error
            yield started[0], {model: started[place + 1] for place, model in enumerate(models)}
        finally:
            for engine in running:
                engine.close()


class _OfModel(Exception):
    """An error that concerns one model, and not the base model."""

    def __init__(self, model: Model, cause: EvaluationError) -> None:
        super().__init__(str(cause))
        self.model, self.cause = model, cause


@contextlib.contextmanager
def _naming(model: Model, engine: EngineProcess) -> Iterator[None]:
    try:
        yield
    except EvaluationError as error:
        raise _OfModel(model, error) from error
