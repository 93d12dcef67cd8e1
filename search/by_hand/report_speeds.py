"""Writes what a report says of speed under each kind of workload, and of servers under each load."""

from __future__ import annotations

from collections.abc import Sequence

from evaluator.workload import Workload
from search.by_hand.evaluation import Evaluation
from search.show import served_table

HEADER = ("workload", "baseline, ms per token", "model, ms per token", "SpeedNorm", "measured")


def parts(evaluation: Evaluation) -> list[str]:
    """Return the sections of the report in Markdown; none where one kind alone was timed, and no server."""
    return [*_by_kind(evaluation), *_under_load(evaluation)]


def workload_in_words(workload: Workload) -> str:
    """Return what a workload times, in a few words."""
    if workload.kind == "decode":
        return f"decode steps, batch sizes {', '.join(map(str, workload.batch_sizes))}"
    if workload.kind == "batch":
        return f"{workload.requests} requests given at once, at most {workload.sizes[0]} running"
    load = f"{', '.join(map(str, workload.concurrencies))} at once"
    if workload.request_rate is not None:
        load = f"{workload.request_rate:g} a second"
    return f"{workload.requests} requests to a server, {load}"


def _by_kind(evaluation: Evaluation) -> list[str]:
    speeds = evaluation.speeds
    if len(speeds) < 2:
        return []
    rows = []
    for speed in speeds:
        base = f"{speed.base_time_per_token_ms:.4f} ± {speed.base_time_per_token_ms_se:.4f}"
        own = f"{speed.time_per_token_ms:.4f} ± {speed.time_per_token_ms_se:.4f}"
        norm = f"{1.0 - speed.time_ratio:+.4f} ± {speed.time_ratio_se:.4f}"
        rows.append([f"{speed.workload.kind}: {workload_in_words(speed.workload)}", base, own, norm, speed.date])
    told = "The Score above is made of the first. The others are what `evaluate` measured of this model before."
    return ["## Speed by kind of workload", _table(HEADER, rows), told]


def _under_load(evaluation: Evaluation) -> list[str]:
    for speed in evaluation.speeds:
        rows = served_table.rows(speed.served, speed.base_served)
        if rows:
            limits = ", ".join(f"{name} {value:g}" for name, value in speed.workload.goodput.items())
            good = f" A good request keeps {limits}." if limits else ""
            return ["## Under load", _table(served_table.HEADER, rows), f"{served_table.CAPTION}{good}"]
    return []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
