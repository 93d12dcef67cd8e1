"""Screen and time the plans of a study's space, and write them as a table that searches can be replayed on.

    PYTHONPATH=.:$PYTHONPATH python3 benchmarks/search/collect.py OUT.json --study NAME --config-dir DIRECTORY
        [--drawn 40] [--seed 0] [--processes 4] [--only screens|times] [KEY=VALUE ...]

All plans of the space, or so many drawn at random, are screened as a trial is, on all shards, by several processes that
share the caches; the forecast's table of damage is made first. Then its table of speed, and every shape is timed in
turn with the base model in an engine with random weights, which takes the time that real ones take. What OUT.json
holds is not timed again, nor screened again by the same methods, so that `--only screens` can run beside other work,
and in parts; `--only times` runs alone, before or after them.
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
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution

from compressors.plan import CompressionPlan
from evaluator import speed
from evaluator.speed_table import SpeedTable
from search.config import compose
from search.setup import keys
from search.setup import setting as settings
from search.stages import damage_table, speed_table
from search.stages.bench import Bench
from search.stages.engines import Engines
from search.stages.forecast import Forecast
from search.stages.screen import Screener
from search.stages.side_by_side import Ahead, SideBySide, fitting
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
    parser.add_argument("--only", choices=["screens", "times"])
    arguments = parser.parse_intermixed_args()
    setting = prepared(arguments)
    if arguments.only != "times":
        screens(arguments, setting)
    if arguments.only != "screens":
        times(arguments, setting)
    agreement(json.loads(arguments.out.read_text()), setting)


def screens(arguments: argparse.Namespace, setting: settings.Setting) -> None:
    """Make the table of damage, screen the plans that the file lacks, and write what is known of them."""
    table, rows = read(arguments, setting)
    wanted = [plan for plan, row in rows.items() if row["nll"] is None or row["key"] != keys.plan_digest(setting, plan)]
    said(f"{len(wanted)} plans to screen of {len(rows)}")
    if not wanted:
        return
    began = time.monotonic()
    screener = Screener(setting)
    base_nll = screener.base_nll(said)
    damage = damage_table.damage_table(setting, screener, said)
    damage_s = time.monotonic() - began
    said(f"table of damage after {damage_s:.0f} s")
    began = time.monotonic()
    parts = [(arguments, index, wanted[index :: arguments.processes]) for index in range(arguments.processes)]
    if arguments.processes == 1:
        screened = [screen_all(*parts[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            screened = pool.starmap(screen_all, parts)
    known = dict(itertools.chain.from_iterable(part.items() for part in screened))
    said(f"{len(known)} plans screened in {time.monotonic() - began:.0f} s")
    table |= {
        "device": setting.machine.device_name,
        "damage_s": table.get("damage_s", round(damage_s, 1)),
        "base_nll": [round(value, 5) for value in base_nll],
        "damage": damage.to_dict(),
    }
    for plan, row in known.items():
        rows[plan] |= {"key": keys.plan_digest(setting, plan), **row}
    write(arguments.out, table, rows)


def times(arguments: argparse.Namespace, setting: settings.Setting) -> None:
    """Make the table of speed and time every shape that is not timed yet; write both to the file."""
    table, rows = read(arguments, setting)
    began = time.monotonic()
    probes = [] if speed_table.stand_ins(setting) else [plan for plan, _ in speed_table.missing(setting)]
    with Bench.of(setting) as bench, Ahead(setting, bench.engines, probes) as ahead:
        bench.baseline(said)
        speed_table.speed_table(setting, bench.engines, said, ahead)
    spent = time.monotonic() - began
    said(f"table of speed after {spent:.0f} s")
    forecast = Forecast.known(setting)
    untimed = [plan for plan, row in rows.items() if row["time_ratio"] is None]
    wanted = [plan for plan in untimed if setting.infeasible(plan) is None]  # the table may be another machine's
    timed = time_shapes(setting, {speed_table.shape_of(setting, plan) for plan in wanted})
    for plan in wanted:
        ratio, error = timed.get(speed_table.shape_of(setting, plan), (None, None))
        rows[plan] |= {"time_ratio": ratio, "time_ratio_se": error}
    table["timed_on"] = setting.machine.device_name
    table["speed"] = None if forecast.speed is None else forecast.speed.to_dict()
    table["speed_s"] = table.get("speed_s", round(spent, 1))
    write(arguments.out, table, rows)


def read(
    arguments: argparse.Namespace, setting: settings.Setting
) -> tuple[dict[str, Any], dict[CompressionPlan, dict[str, Any]]]:
    """Return what the file holds beside its plans, and a row for each plan: those of the file and those wanted."""
    plans = listed(setting)
    if arguments.drawn:
        plans = dict(random.Random(arguments.seed).sample(sorted(plans.items(), key=str), arguments.drawn))
    new = {"key": None, "nll": None, "kl": None, "screen_s": None, "time_ratio": None, "time_ratio_se": None}
    rows = {plan: {"params": params, **new} for plan, params in plans.items()}
    table = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"speed": None, "damage": None}
    table |= {"study": setting.file.study_name, "config": setting.model.checkpoint.config}
    for row in table.pop("plans", []):
        rows[space.plan_of(row["params"], setting.file.space, setting.model.identity)] = {**new, **row}
    return table, rows


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
    if not plans:
        return found
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


def write(path: pathlib.Path, table: dict, rows: dict[CompressionPlan, dict]) -> None:
    """Write the table with a plan a line, which git shows well; plans of which nothing is known are left out."""
    head = json.dumps(table)[:-1]
    known = [row for row in rows.values() if row["nll"] is not None or row["time_ratio"] is not None]
    lines = ",\n".join(map(json.dumps, known))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}, "plans": [\n{lines}\n]}}\n')


def agreement(table: dict, setting: settings.Setting) -> None:
    """Print how well the forecasts order what was screened and timed."""
    from scipy.stats import kendalltau

    rows = [row for row in table["plans"] if row["nll"] is not None]
    if not rows:
        return
    base = sum(table["base_nll"]) / len(table["base_nll"])
    speeds = None if table["speed"] is None else SpeedTable.from_dict(table["speed"])
    made = Forecast(setting, speeds, damage_table.DamageTable.from_dict(table["damage"]))
    plans = [space.plan_of(row["params"], setting.file.space, setting.model.identity) for row in rows]
    expected = [made.expected(plan) for plan in plans]
    forecast = [each.perf_norm for each in expected]
    perf = [math.exp(base - sum(row["nll"]) / len(row["nll"])) for row in rows]
    compare("PerfNorm, forecast against screened", forecast, perf)
    timed = [place for place, row in enumerate(rows) if row["time_ratio"] is not None]
    if timed:
        speed_forecast = [expected[place].speed_norm for place in timed]
        speed_norm = [1 - rows[place]["time_ratio"] for place in timed]
        compare("SpeedNorm, forecast against timed", speed_forecast, speed_norm)
        scores = [[perf_norm[place] + speed for place, speed in zip(timed, speeds, strict=True)]
                  for perf_norm, speeds in ((forecast, speed_forecast), (perf, speed_norm))]  # fmt: skip
        print(f"Score: tau {kendalltau(*scores).statistic:.3f}")


def compare(what: str, forecast: list[float], found: list[float]) -> None:
    from scipy.stats import kendalltau

    off = sorted(abs(a - b) for a, b in zip(forecast, found, strict=True))
    print(f"{what}: Kendall tau {kendalltau(forecast, found).statistic:.3f}, median error "
          f"{off[len(off) // 2]:.4f}, largest {off[-1]:.4f} over {len(found)} plans")  # fmt: skip


if __name__ == "__main__":
    main()
