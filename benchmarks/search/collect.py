"""Screen and time the plans of a study's space, and write them as a table that searches can be replayed on.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/search/collect.py OUT.json --study NAME --config-dir DIRECTORY
        [--drawn 40] [--seed 0] [--processes 4] [--no-times] [KEY=VALUE ...]

All plans of the space, or so many drawn at random, are screened as a trial is, on all shards, by several processes that
share the caches; the forecast's tables are made first. Every shape is timed in turn with the base model in an engine
with random weights, which takes the time that real ones take.
"""

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import pathlib
import random
import time

from optuna.distributions import CategoricalDistribution, IntDistribution

from compressors.plan import CompressionPlan
from evaluator import speed
from search.config import compose
from search.setup import setting as settings
from search.stages import speed_table
from search.stages.bench import Bench
from search.stages.engines import Engines
from search.stages.forecast import Forecast
from search.stages.screen import Screener
from search.stages.side_by_side import SideBySide, fitting
from search.study import space

RATIO_SE, TURNS = 0.006, 16  # hundreds of shapes are timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("words", nargs="*", help="KEY=VALUE for the study file")
    parser.add_argument("--study", required=True)
    parser.add_argument("--config-dir", type=pathlib.Path)
    parser.add_argument("--drawn", type=int, help="plans drawn at random; without it all plans of the space")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--screen-s", type=float, default=math.inf, help="seconds after which no screen begins")
    parser.add_argument("--no-times", action="store_true")
    arguments = parser.parse_intermixed_args()
    setting = prepared(arguments)
    began = time.monotonic()
    with Bench.of(setting) as bench:
        bench.begin(said, forecast=True)
    tables_s = time.monotonic() - began
    said(f"tables after {tables_s:.0f} s")
    forecast = Forecast.known(setting)
    plans = listed(setting)
    found = len(plans)
    if arguments.drawn:
        plans = dict(random.Random(arguments.seed).sample(sorted(plans.items(), key=str), arguments.drawn))
    said(f"{len(plans)} of {found} plans")
    times = {} if arguments.no_times else time_shapes(setting, {speed_table.shape_of(setting, plan) for plan in plans})
    began = time.monotonic()
    screener = Screener(setting)
    base_nll = screener.base_nll(said)
    parts = [(arguments, index, list(plans)[index :: arguments.processes]) for index in range(arguments.processes)]
    if arguments.processes == 1:
        screened = [screen_all(*parts[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            screened = pool.starmap(screen_all, parts)
    screens = dict(itertools.chain.from_iterable(part.items() for part in screened))
    said(f"{len(screens)} plans screened in {time.monotonic() - began:.0f} s")
    rows = []
    for plan in filter(screens.__contains__, plans):
        params, expected = plans[plan], forecast.expected(plan)
        ratio, error = times.get(speed_table.shape_of(setting, plan), (None, None))
        rows.append(
            {"params": params, **screens[plan], "time_ratio": ratio, "time_ratio_se": error,
             "forecast_perf_norm": round(expected.perf_norm, 5), "forecast_speed_norm": round(expected.speed_norm, 5),
             "forecast_score_se": round(expected.score_se, 5)}
        )  # fmt: skip
    table = {
        "study": setting.file.study_name,
        "device": setting.machine.device_name,
        "config": setting.model.checkpoint.config,
        "tables_s": round(tables_s, 1),
        "base_nll": [round(value, 5) for value in base_nll],
        "speed": None if forecast.speed is None else forecast.speed.to_dict(),
        "damage": None if forecast.damage is None else forecast.damage.to_dict(),
    }
    write(arguments.out, table, rows)
    agreement(rows, base_nll)


def said(text: str) -> None:
    print("…", text, flush=True)


def prepared(arguments: argparse.Namespace) -> settings.Setting:
    return settings.prepare(compose.load(arguments.study, arguments.words, arguments.config_dir), said)


def listed(setting: settings.Setting) -> dict[CompressionPlan, dict]:
    """Return the feasible plans of the space, each with the parameters that lead to it first."""
    searched = space.distributions(setting.file.space, setting.model.identity)
    values = []
    for each in searched.values():
        if isinstance(each, IntDistribution):
            values.append(range(each.low, each.high + 1, each.step))
        else:
            assert isinstance(each, CategoricalDistribution)
            values.append(each.choices)
    plans: dict[CompressionPlan, dict] = {}
    total = math.prod(map(len, values))
    drawn = random.Random(0)
    some = itertools.product(*values) if total < 5000 else ([drawn.choice(v) for v in values] for _ in range(5000))
    for one in some:
        params = dict(zip(searched, one, strict=True))
        plan = space.plan_of(params, setting.file.space, setting.model.identity)
        if setting.infeasible(plan) is None:
            plans.setdefault(plan, params)
    return plans


def screen_all(arguments: argparse.Namespace, index: int, plans: list[CompressionPlan]) -> dict[CompressionPlan, dict]:
    """Screen plans one after the other."""
    setting = prepared(arguments)
    screener = Screener(setting)
    found = {}
    began = time.monotonic()
    for number, plan in enumerate(plans):
        started = time.monotonic()
        if started - began > arguments.screen_s:
            break
        screen = screener.screen(plan, lambda text: None)
        spent = time.monotonic() - started
        kl = [value for value in screen.kl if value is not None]
        found[plan] = {
            "nll": [round(value, 5) for value in screen.nll],
            "kl": round(sum(kl) / len(kl), 5) if kl else None,
            "screen_s": round(spent, 2),
        }
        if number % 10 == 0:
            said(f"process {index}: {number} of {len(plans)} plans, {spent:.1f} s")
    return found


def time_shapes(setting: settings.Setting, shapes: set) -> dict:
    """Return each shape's time per token over the base model's, with its standard error."""
    own = setting.model.identity
    plans = {}
    for shape in sorted(shapes, key=str):
        sizes = {name: getattr(shape, name) for name in
                 ("precision", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                  "num_key_value_heads")}  # fmt: skip
        plan = dataclasses.replace(own, **sizes)
        if speed_table.shape_of(setting, plan) != speed_table.shape_of(setting, own):
            plans[shape] = plan
    found = {speed_table.shape_of(setting, own): (1.0, 0.0)}
    began = time.monotonic()
    with Engines(setting) as engines:
        baseline = engines.baseline()
        workload = dataclasses.replace(setting.workload, turns=min(setting.workload.turns, TURNS))
        start = 0
        while left := list(plans)[start:]:
            group = left[: max(1, fitting(setting, [plans[shape] for shape in left]))]
            with SideBySide(setting, engines, [plans[shape] for shape in group]) as running:
                each = zip(group, running.ready(said), strict=True)
                ready = [(shape, engine) for shape, engine in each if engine is not None]
                timed = speed.time_all([engine for _, engine in ready], baseline, workload, RATIO_SE)
            for (shape, _), timings in zip(ready, timed, strict=True):
                weights = {size: timing.base_time_per_token_ms for size, timing in timings.items()}
                total = sum(weights.values())
                ratio = sum(weights[size] * timing.time_ratio for size, timing in timings.items()) / total
                error = math.hypot(*(weights[size] * timing.time_ratio_se for size, timing in timings.items())) / total
                found[shape] = (round(ratio, 5), round(error, 5))
            start += len(group)
            said(f"timed {start} of {len(plans)} shapes, {time.monotonic() - began:.0f} s")
    return found


def write(path: pathlib.Path, table: dict, rows: list[dict]) -> None:
    """Write the table with a plan a line, which git shows well."""
    head = json.dumps(table)[:-1]
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}, "plans": [\n{lines}\n]}}\n')


def agreement(rows: list[dict], base_nll: tuple[float, ...]) -> None:
    """Print how well the forecasts order what was screened and measured."""
    from scipy.stats import kendalltau

    base = sum(base_nll) / len(base_nll)
    perf = [math.exp(base - sum(row["nll"]) / len(row["nll"])) for row in rows]
    tau = kendalltau([row["forecast_perf_norm"] for row in rows], perf).statistic
    print(f"PerfNorm, forecast against screened: Kendall tau {tau:.3f} over {len(rows)} plans")
    timed = [(row, own) for row, own in zip(rows, perf, strict=True) if row["time_ratio"] is not None]
    if timed:
        speed_tau = kendalltau([row["forecast_speed_norm"] for row, _ in timed],
                               [1 - row["time_ratio"] for row, _ in timed]).statistic  # fmt: skip
        scores = [(0.5 * row["forecast_perf_norm"] + 0.5 * row["forecast_speed_norm"],
                   0.5 * own + 0.5 * (1 - row["time_ratio"])) for row, own in timed]  # fmt: skip
        tau = kendalltau(*zip(*scores, strict=True)).statistic
        off = sorted(abs(row["forecast_speed_norm"] - 1 + row["time_ratio"]) for row, _ in timed)
        print(f"SpeedNorm, forecast against timed: tau {speed_tau:.3f}, median error {off[len(off) // 2]:.4f}, "
              f"largest {off[-1]:.4f} over {len(timed)} plans; Score: tau {tau:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
