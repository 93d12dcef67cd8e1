"""The speed table of a study: a few models of the space with random weights, timed in turn with the base model.

It is made once for a base model's dimensions, this machine, this engine and this workload, and kept in
outputs/forecast.

A server takes a minute to start, and each of its runs some seconds more, so that no server is started for a table.
Where a study times servers, engines stand for them: for each concurrency they are given as many requests at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from compressors import build, cached
from compressors.choices import SCHEMES
from compressors.files import alone, digest_of_json
from compressors.model.family import head_dim
from compressors.plan import CompressionPlan
from evaluator import backends, batch, speed
from evaluator.gpu_watch import GpuWatch
from evaluator.measurement import Timing
from evaluator.process import EngineProcess
from evaluator.speed_table import VERSION, Probe, Shape, SpeedTable
from evaluator.workload import Workload
from search.config.space_section import Range
from search.say import Say
from search.setup import keys
from search.setup.setting import Setting
from search.stages.engines import Engines
from search.stages.side_by_side import Ahead, SideBySide, fitting

LOG = logging.getLogger(__name__)
TURNS = 24  # of each probe, at most
FEW_TURNS = 4  # the same where an engine's start and steps take seconds
RATIO_SE = 0.008  # the standard error of each probe's time ratio that is small enough to end its timing
DEPTH = 0.75
TRIED = 200  # plans near one that the engine refuses
WIDTHS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "hidden_size")


def known(setting: Setting, *, held: bool = False) -> SpeedTable | None:
    """Return the table if it holds any probe.

    Args:
        setting: What the study shares.
        held: Whether the caller holds `alone(path_of(setting))`.
    """
    table = cached.known(path_of(setting), lambda path: SpeedTable.from_dict(cached.read_json(path)), held=held)
    return table if table is not None and table.probes else None


def _keep(setting: Setting, made: SpeedTable) -> SpeedTable:
    """Keep a table together with what another run has added meanwhile, and return both."""
    path = path_of(setting)
    with alone(path):
        table = known(setting, held=True) or made
        for probe in made.probes:
            table = table.with_probe(probe)
        cached.keep_json(path, table.to_dict())
    return table


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

    Where the engine refuses a plan, the nearest that it serves takes its place.
    """
    seen = {_base_shape(setting)}
    chosen = []
    for plan, check in _all(setting) if setting.machine.device == "cuda" else _few(setting):
        near = _nearest_served(setting, plan, seen)
        if near is not None:
            seen.add(shape_of(setting, near))
            chosen.append((near, check))
    return chosen


def _precisions(setting: Setting) -> list[str]:
    """Return the base model's own precision and those that are searched."""
    return list(dict.fromkeys([setting.model.identity.precision, *(setting.file.space.precision or [])]))


def _middle(setting: Setting) -> CompressionPlan:
    return dataclasses.replace(setting.model.identity, **_at(setting, 0.5, ("num_hidden_layers", *WIDTHS)))


def _few(setting: Setting) -> list[tuple[CompressionPlan, bool]]:
    """Return the fewest plans that tell depth, widths and precisions apart: for engines whose steps take long.

    The space's least depth, if that is searched; all searched widths at their low ends; every other precision uncut.
    Depth, FFN and hidden size are cut to DEPTH at least. What a width takes in another precision is left to the fit's
    prior. One check, in the middle of the space and in the first other precision, says how far that is off.
    """
    own = setting.model.identity
    others = [precision for precision in _precisions(setting) if precision != own.precision]
    wanted = []
    if setting.file.space.num_hidden_layers is not None:
        wanted.append((dataclasses.replace(own, num_hidden_layers=_shallow(setting)), False))
    narrow = {**_at(setting, 0.0, WIDTHS), **_narrow(setting)}
    wanted.append((_shared(dataclasses.replace(own, **narrow), own), False))
    wanted += [(dataclasses.replace(own, precision=precision), False) for precision in others]
    middle = _shared(_middle(setting), own)
    return [*wanted, (dataclasses.replace(middle, precision=[*others, own.precision][0]), True)]


def _shared(plan: CompressionPlan, own: CompressionPlan) -> CompressionPlan:
    """Return the plan with no more query heads for a key/value head than the base model has."""
    each = own.num_attention_heads // own.num_key_value_heads
    heads = min(plan.num_attention_heads, plan.num_key_value_heads * each)
    return dataclasses.replace(plan, num_attention_heads=heads)


def _all(setting: Setting) -> list[tuple[CompressionPlan, bool]]:
    """Return the plans for engines that start and decode side by side.

    Every precision uncut, and with all searched widths at their low ends; in the base model's own precision also the
    space's least depth and each width by itself. The checks lie in the middle of the space.
    """
    own, precisions = setting.model.identity, _precisions(setting)
    narrow = dataclasses.replace(own, **_at(setting, 0.0, WIDTHS))
    shallow = dataclasses.replace(own, num_hidden_layers=_shallow(setting))
    middle = _middle(setting)
    wanted = [(shallow, False)]
    for names in (("intermediate_size",), ("num_attention_heads", "num_key_value_heads"), ("hidden_size",)):
        wanted.append((dataclasses.replace(own, **{name: getattr(narrow, name) for name in names}), False))
    for precision in precisions:
        if precision != own.precision:
            wanted += [(dataclasses.replace(plan, precision=precision), False) for plan in (own, narrow)]
        if precision == own.precision or precision in SCHEMES:
            wanted.append((dataclasses.replace(middle, precision=precision), True))
    return wanted


def _shallow(setting: Setting) -> int:
    """Return the least depth of the space, but no more than DEPTH of the base model's: a slope wants some distance."""
    wanted, full = setting.file.space.num_hidden_layers, setting.model.identity.num_hidden_layers
    most = max(1, int(DEPTH * full))
    return min(wanted.low, most) if isinstance(wanted, Range) else most


def _narrow(setting: Setting) -> dict[str, int]:
    """Return the searched widths of FFN and residual stream at their low ends, but no more than DEPTH of the base's.

    In light cuts a slope is lost in the noise.
    """
    widths = {}
    for name in ("intermediate_size", "hidden_size"):
        wanted, full = getattr(setting.file.space, name), getattr(setting.model.identity, name)
        if isinstance(wanted, Range):
            steps = math.ceil((1.0 - DEPTH) * full / wanted.step)
            widths[name] = max(min(wanted.low, full - steps * wanted.step), 1)
    return widths


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


def stand_ins(setting: Setting) -> list[Setting]:
    """Return the settings whose batches of requests stand for a server's load: one for each concurrency, rising.

    Requests have the mean lengths of those that the server gets. There is none where no server is timed, and none where
    requests come at a rate: then the server decides how many run at once.
    """
    file, workload = setting.file, setting.workload
    if workload.kind != "serve" or workload.request_rate is not None:
        return []
    prompts = [len(one) for one in setting.prompts] or workload.input_tokens
    lengths = {"input_tokens": round(statistics.fmean(prompts)), "output_tokens": sum(workload.output_tokens) // 2}
    fixed = {"kind": "batch", "ignore_eos": True, **{name: (length, length) for name, length in lengths.items()}}
    found = []
    for together in sorted(set(workload.concurrencies)):
        changed = {**fixed, "requests": together, "max_num_seqs": together}
        section = file.evaluation.workload.model_copy(update=changed)
        evaluation = file.evaluation.model_copy(update={"workload": section})
        its_file = file.model_copy(update={"evaluation": evaluation})
        found.append(dataclasses.replace(setting, file=its_file, prompts=()))
    return found


def missing(setting: Setting) -> list[tuple[CompressionPlan, bool]]:
    """Return the probes that the table lacks, as `probes` does; none where nothing can stand for a server."""
    if setting.workload.kind == "serve" and not stand_ins(setting):
        return []
    table = known(setting)
    timed = set() if table is None else {probe.shape for probe in table.probes}
    return [(plan, check) for plan, check in probes(setting) if shape_of(setting, plan) not in timed]


def speed_table(setting: Setting, engines: Engines, say: Say, ahead: Ahead | None = None) -> SpeedTable | None:
    """Return the table; time what it lacks. None where no probe could be timed.

    Args:
        setting: What the study shares.
        engines: The worker's engines; the baseline's is timed in turn with each probe.
        say: Told what is done.
        ahead: Engines of the first missing probes that are starting already.

    Raises:
        EvaluationError: The baseline's engine failed.
    """
    batches = stand_ins(setting)
    if not batches:
        return _made(setting, engines, [setting.workload], setting, say, ahead)
    with Engines(batches[-1]) as own:  # an engine has room for as many as it is started for
        return _made(setting, own, [each.workload for each in batches], batches[-1], say, None)


def _made(
    setting: Setting, engines: Engines, workloads: Sequence[Workload], started: Setting, say: Say, ahead: Ahead | None
) -> SpeedTable | None:
    """Return the table of a setting; its engines are started as `started` wants them, and timed on some workloads."""
    table = known(setting) or SpeedTable(_base_shape(setting), {}, ())
    left = dict(missing(setting))  # plan → whether it only checks
    total, done = len(left), 0
    while left:
        group = ahead.take() if ahead is not None and not done else None
        if group is None:
            engines.baseline()  # its memory is taken before there is counted what fits
            plans = list(left)
            group = SideBySide(started, engines, plans[: max(1, fitting(started, plans))])
        last = done + len(group.plans)
        say(f"speed table: {f'model {last}' if last == done + 1 else f'models {done + 1} to {last}'} of {total}")
        with group:
            checks = [left.pop(plan, None) for plan in group.plans]  # None: another run has timed it meanwhile
            table = _timed(setting, engines, table, checks, group, workloads, say)
        done = last
        table = _keep(setting, table)
    return table if table.probes else None


def _timed(
    setting: Setting,
    engines: Engines,
    table: SpeedTable,
    checks: Sequence[bool | None],
    group: SideBySide,
    workloads: Sequence[Workload],
    say: Say,
) -> SpeedTable:
    baseline = engines.baseline()
    running = group.ready(say)
    ready = [
        (plan, check, engine)
        for plan, check, engine in zip(group.plans, checks, running, strict=True)
        if engine is not None and check is not None
    ]
    if not ready:
        return table
    watch = GpuWatch.of(baseline.facts())

    def progress(done: int, total: int) -> None:
        watch.look()
        say(f"speed table: timing, turn {done} of {total}")

    each = [engine for _, _, engine in ready]
    every = watch.steady(lambda: _every(each, baseline, [_few_turns(setting, one) for one in workloads], progress))
    for text in watch.record.warnings if watch.record else ():
        LOG.warning("speed table: %s", text)
    for (plan, check, _), timings in zip(ready, every, strict=True):
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


def _few_turns(setting: Setting, workload: Workload) -> Workload:
    """Return a workload as probes are timed on it: random weights end no answer."""
    most = TURNS if setting.machine.device == "cuda" else FEW_TURNS
    few = dataclasses.replace(workload, turns=min(workload.turns, most))
    return batch.of_fixed_lengths(few) if few.kind == "batch" else few


def _every(
    engines: Sequence[EngineProcess],
    baseline: EngineProcess,
    workloads: Sequence[Workload],
    progress: Callable[[int, int], None],
) -> list[dict[int, Timing]]:
    """Return the timings of each engine by batch size, over all workloads."""
    found: list[dict[int, Timing]] = [{} for _ in engines]
    for workload in workloads:
        timed = speed.time_all(engines, baseline, workload, RATIO_SE, progress)
        for known_sizes, timings in zip(found, timed, strict=True):
            known_sizes.update(timings)
    return found
