"""What servers did under each load of a workload of kind serve, as rows of text and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from evaluator.measurement import Measurement
from evaluator.served import Quantiles, Served

HEADER = (
    *("load", "model", "tokens/s", "requests/s", "good requests/s", "TTFT, ms", "TPOT, ms", "ITL, ms"),
    "end to end, ms",
)
CAPTION = "Times: p50 / p95 / p99 over the requests, means of all runs; the baseline's are of its own measurement."


def rows(served: Sequence[Served], base_served: Sequence[Served]) -> list[list[str]]:
    """Return the cells under HEADER: of each load a row of the baseline and one of the model; none without a server.

    Args:
        served: What the model's server did under each load.
        base_served: The same of the base model's.
    """
    of_base = {run.load: run for run in base_served}
    found = []
    for run in served:
        base = of_base.get(run.load)
        if base is not None:
            found.append(_row("baseline", base))
        found.append(_row("model", run))
    return found


def render(measurement: Measurement, baseline: Measurement) -> Table:
    """Return the table."""
    table = Table(title="Under load", caption=CAPTION)
    for number, name in enumerate(HEADER):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in rows(measurement.served, baseline.served):
        table.add_row(*row)
    return table


def _row(name: str, run: Served) -> list[str]:
    good = "" if run.goodput_per_s is None else f"{run.goodput_per_s:.3g}"
    speeds = [f"{run.tokens_per_s:,.1f}", f"{run.requests_per_s:.3g}", good]
    return [run.load, name, *speeds, *map(_times, (run.ttft_ms, run.tpot_ms, run.itl_ms, run.e2el_ms))]


def _times(times: Quantiles) -> str:
    return " / ".join(f"{value:,.1f}" for value in (times.p50, times.p95, times.p99))
