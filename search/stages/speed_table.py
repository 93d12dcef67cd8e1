"""The speed table of a study: a few models of the space with random weights, timed in turn with the base model.

It is made once for a base model's dimensions, this machine, this engine and this workload, and kept in
outputs/forecast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from compressors import build, cached
from compressors.choices import SCHEMES
from compressors.files import digest_of_json, write_json
from compressors.model.family import head_dim
from compressors.plan import CompressionPlan
from evaluator import backends, batch, speed
from evaluator.errors import EvaluationError
from evaluator.gpu_watch import GpuWatch
from evaluator.process import EngineProcess
from evaluator.speed_table import VERSION, Probe, Shape, SpeedTable
from search.config.study_file import Range
from search.processes import abandoned, mark
from search.say import Say
from search.setup import keys
from search.setup.setting import Setting
from search.stages.engines import Engines, engine_bytes, room_on_gpu

LOG = logging.getLogger(__name__)
TOGETHER = 9  # engines that are started and timed together on a GPU, at most
TURNS = 24  # of each probe, at most
RATIO_SE = 0.008  # the standard error of each probe's time ratio that is small enough to end its timing
DEPTH = 0.75
PROBES = "probes-"  # + the worker's mark: the directory of the models that are timed
TRIED = 200  # plans near one that the engine refuses
WIDTHS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_size")


def known(setting: Setting) -> SpeedTable | None:
    """Return the table if it holds any probe."""
    table = cached.known(path_of(setting), lambda path: SpeedTable.from_dict(cached.read_json(path)))
    return table if table is not None and table.probes else None


def path_of(setting: Setting) -> Path:
    """Return the file that keeps the table."""
    circumstances = keys.circumstances(setting)
    depends = ("workload", "prompts", "backend", "compile", "engine_version", "device", "threads")
    known = {name: circumstances[name] for name in depends if name in circumstances}
    key = [VERSION, dataclasses.asdict(_base_shape(setting)), known]
    return setting.outputs / "forecast" / f"speed-{digest_of_json(key, 16)}.json"


def shape_of(setting: Setting, plan: CompressionPlan) -> Shape:
    """Return what a plan's time depends on, in the precision that the engine serves it in."""
    config = setting.model.checkpoint.config
    casts = backends.module_of(setting.machine.backend).FACTS.casts
    return Shape(
        precision=casts.get(plan.precision, plan.precision),
        num_hidden_layers=plan.num_hidden_layers,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        num_attention_heads=plan.num_attention_heads,
        num_key_value_heads=plan.num_key_value_heads,
        head_dim=head_dim(config),
        vocab_size=int(config["vocab_size"]),
    )


def _base_shape(setting: Setting) -> Shape:
    return shape_of(setting, setting.model.identity)


def probes(setting: Setting) -> list[tuple[CompressionPlan, bool]]:
    """Return the plans to time, and whether each only checks the forecast.

    Every precision uncut, and with all searched widths at their low ends; in the base model's own precision also the
    space's least depth and each width by itself. The checks lie in the middle of the space. Where the engine refuses a
    plan, the nearest that it serves takes its place.
    """
    own, searched = setting.model.identity, setting.file.space
    precisions = list(dict.fromkeys([own.precision, *(searched.precision or [])]))
    narrow = dataclasses.replace(own, **_at(setting, 0.0, WIDTHS))
    shallow = dataclasses.replace(own, num_hidden_layers=_shallow(setting))
    middle = dataclasses.replace(own, **_at(setting, 0.5, ("num_hidden_layers", *WIDTHS)))
    wanted = [(shallow, False)]
    for names in (("intermediate_size",), ("num_attention_heads", "num_key_value_heads"), ("hidden_size",)):
        wanted.append((dataclasses.replace(own, **{name: getattr(narrow, name) for name in names}), False))
    for precision in precisions:
        if precision != own.precision:
            wanted += [(dataclasses.replace(plan, precision=precision), False) for plan in (own, narrow)]
        if precision == own.precision or precision in SCHEMES:
            wanted.append((dataclasses.replace(middle, precision=precision), True))
    seen = {_base_shape(setting)}
    chosen = []
    for plan, check in wanted:
        near = _nearest_served(setting, plan, seen)
        if near is not None:
            seen.add(shape_of(setting, near))
            chosen.append((near, check))
    return chosen


def _shallow(setting: Setting) -> int:
    """Return the least depth of the space, but no more than DEPTH of the base model's: a slope wants some distance."""
    wanted, full = setting.file.space.num_hidden_layers, setting.model.identity.num_hidden_layers
    most = max(1, int(DEPTH * full))
    return min(wanted.low, most) if isinstance(wanted, Range) else most


def _at(setting: Setting, share: float, names: Sequence[str]) -> dict[str, Any]:
    """Return the values at a share of the way from the low to the high end of each dimension of the space."""
    values: dict[str, Any] = {}
    for name in names:
        wanted = getattr(setting.file.space, name)
        if isinstance(wanted, Range):
            values[name] = wanted.low + int((wanted.high - wanted.low) // wanted.step * share) * wanted.step
        elif wanted is not None:
            values[name] = wanted
    return values


def _nearest_served(setting: Setting, plan: CompressionPlan, seen: Collection[Shape]) -> CompressionPlan | None:
    """Return the servable plan with the nearest widths whose shape is new; None if there is none near."""
    own = setting.model.identity
    if shape_of(setting, plan) in seen:
        return None
    grids = []
    for name in WIDTHS:
        wanted, value = getattr(setting.file.space, name), getattr(plan, name)
        grid = range(wanted.low, wanted.high + 1, wanted.step) if isinstance(wanted, Range) else ()
        grids.append(sorted({value, getattr(own, name), *grid}))

    def distance(values: Sequence[int]) -> float:
        each = zip(WIDTHS, values, strict=True)
        return float(sum(abs(value - getattr(plan, name)) / getattr(own, name) for name, value in each))

    for values in sorted(itertools.product(*grids), key=distance)[:TRIED]:
        near = dataclasses.replace(plan, **dict(zip(WIDTHS, values, strict=True)))
        if shape_of(setting, near) not in seen and _servable(setting, near):
            return near
    return None


def _servable(setting: Setting, plan: CompressionPlan) -> bool:
    machine, model = setting.machine, setting.model
    refused = backends.cannot_start(machine.backend, plan.precision, machine.capability)
    return (refused or build.check(plan, model.checkpoint, model.family, kernels=setting.kernels)) is None


def speed_table(setting: Setting, engines: Engines, say: Say) -> SpeedTable | None:
    """Return the table; time what it lacks. None where no probe could be timed.

    Args:
        setting: What the study shares.
        engines: The worker's engines; the baseline's is timed in turn with each probe.
        say: Told what is done.

    Raises:
        EvaluationError: The baseline's engine failed.
    """
    table = known(setting) or SpeedTable(_base_shape(setting), {}, ())
    timed = {probe.shape for probe in table.probes}
    missing = [(plan, check) for plan, check in probes(setting) if shape_of(setting, plan) not in timed]
    if not missing:
        return table if table.probes else None
    together = _together(setting, engines)
    for start in range(0, len(missing), together):
        group = missing[start : start + together]
        last = start + len(group)
        models = f"model {last}" if len(group) == 1 else f"models {start + 1} to {last}"
        say(f"speed table: {models} of {len(missing)}")
        table = _timed(setting, engines, table, group, say)
        cached.keep_json(path_of(setting), table.to_dict())
    return table if table.probes else None


def _together(setting: Setting, engines: Engines) -> int:
    """Return how many engines run side by side beside the baseline's: on a GPU what its memory holds."""
    if setting.machine.device != "cuda":
        return 1
    engines.baseline()
    return max(1, min(TOGETHER, room_on_gpu(setting.model.checkpoint.size_bytes + engine_bytes(setting))))


def _timed(
    setting: Setting, engines: Engines, table: SpeedTable, group: Sequence[tuple[CompressionPlan, bool]], say: Say
) -> SpeedTable:
    baseline = engines.baseline()
    with _started(setting, engines, [plan for plan, _ in group], say) as running:
        ready = [(pair, engine) for pair, engine in zip(group, running, strict=True) if engine is not None]
        if not ready:
            return table
        workload = dataclasses.replace(setting.workload, turns=min(setting.workload.turns, TURNS))
        if workload.kind == "batch":
            workload = batch.of_fixed_lengths(workload)
        watch = GpuWatch.of(baseline.facts())

        def progress(done: int, total: int) -> None:
            watch.look()
            if total > 1:
                say(f"speed table: {done} of {total} started models are timed")

        each = [engine for _, engine in ready]
        every = watch.steady(lambda: speed.time_all(each, baseline, workload, RATIO_SE, progress))
        for text in watch.record.warnings if watch.record else ():
            LOG.warning("speed table: %s", text)
    for (plan, check), timings in zip([pair for pair, _ in ready], every, strict=True):
        probe = Probe(
            shape_of(setting, plan),
            {size: timing.time_ratio for size, timing in timings.items()},
            {size: timing.time_ratio_se for size, timing in timings.items()},
            check,
        )
        if not table.base_ms:
            base_ms = {size: timing.base_time_per_token_ms * size for size, timing in timings.items()}
            table = dataclasses.replace(table, base_ms=base_ms)
        table = table.with_probe(probe)
    return table


@contextlib.contextmanager
def _started(
    setting: Setting, engines: Engines, plans: Sequence[CompressionPlan], say: Say
) -> Iterator[list[EngineProcess | None]]:
    """Start an engine for each plan; one that can't be started is None, and the reason is told."""
    tables = setting.outputs / "forecast"
    for left_over in tables.glob(f"{PROBES}*"):  # of a process that was killed
        if abandoned(left_over, left_over.name.removeprefix(PROBES)):
            shutil.rmtree(left_over, ignore_errors=True)
    root = tables / f"{PROBES}{mark()}"

    def start(number: int) -> EngineProcess | None:
        path = root / str(number)
        try:
            _write(setting, plans[number], path)
            return engines.start(path, f"probe-{number}", random_weights=_config_alone(setting))
        except EvaluationError as error:
            say(f"speed table: {plans[number].precision} is left out: {error}")
            return None

    running: list[EngineProcess | None] = []
    try:
        with ThreadPoolExecutor(len(plans)) as pool:
            running = list(pool.map(start, range(len(plans))))
        yield running
    finally:
        for engine in running:
            if engine is not None:
                engine.close()
        shutil.rmtree(root, ignore_errors=True)


def _config_alone(setting: Setting) -> bool:
    return backends.module_of(setting.machine.backend).FACTS.random_weights


def _write(setting: Setting, plan: CompressionPlan, path: Path) -> None:
    """Write what the engine needs: config.json, or a whole checkpoint with arbitrary values."""
    made = build.shapes(plan, setting.model.checkpoint, setting.model.family)
    if _config_alone(setting):
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", made.config)
    else:
        made.write(path)
