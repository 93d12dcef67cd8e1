"""Plots the loss on each shard of the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from plotly.subplots import make_subplots

from search.errors import UsageError
from search.show.plots.drawing import BLUE, GREY, INK, ORANGE, figure_of, page_of, write


def plot_shards(base_nll: Sequence[float], nll: Sequence[float], path: Path) -> Path:
    """Plot the loss of the model and the baseline on each shard of the text, and the difference.

    Args:
        base_nll: The baseline's loss on each shard, in nats per token.
        nll: The model's loss on each shard, in nats per token.
        path: The .png or .html file to write.

    Returns:
        The path of the file.

    Raises:
        UsageError: There are no shards, the numbers of shards differ, or the file can't be written.
    """
    if not base_nll or len(base_nll) != len(nll):
        raise UsageError(
            f"plot {path}: {len(nll)} shards of the model and {len(base_nll)} of the baseline; measure both on "
            "the same shards, at least one"
        )
    return write(path, lambda: _shards_png(base_nll, nll), lambda: _shards_html(base_nll, nll))


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, which is nan for a single value."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _verdict(deltas: Sequence[float]) -> str:
    mean, error = _mean(deltas)
    error_text = "" if math.isnan(error) else f" ± {error:.4f}"
    return f"Model − baseline: {mean:+.4f}{error_text} nats per token on average"


def _shards_png(base_nll: Sequence[float], nll: Sequence[float]) -> Figure:
    places = range(len(nll))
    deltas = [model - base for model, base in zip(nll, base_nll, strict=True)]
    figure = figure_of(9, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.3, 1))
    size = 5.0 if len(nll) <= 40 else 3.0
    upper.vlines(places, base_nll, nll, color=GREY, linewidth=1, alpha=0.7, zorder=1)
    upper.plot(places, base_nll, "o", color=INK, markersize=size + 2, label="baseline", markerfacecolor="white")
    upper.plot(places, nll, "o", color=BLUE, markersize=size, label="model")
    upper.set_ylabel("nats per token")
    upper.set_title("Loss by shard of the text")
    upper.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    lower.bar(places, deltas, color=[ORANGE if delta > 0 else BLUE for delta in deltas], width=0.78)
    lower.axhline(0, color=INK, linewidth=0.8)
    lower.axhline(_mean(deltas)[0], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    lower.set_ylabel("nats per token")
    lower.set_xlabel("shard")
    lower.set_title(_verdict(deltas))
    if len(nll) <= 32:
        lower.set_xticks(places)
    else:
        lower.xaxis.set_major_locator(MaxNLocator(20, integer=True))
    lower.set_xlim(-0.7, len(nll) - 0.3)
    lower.margins(y=0.12)
    return figure


def _shards_html(base_nll: Sequence[float], nll: Sequence[float]) -> Any:
    places = list(range(len(nll)))
    deltas = [model - base for model, base in zip(nll, base_nll, strict=True)]
    titles = ("Loss by shard of the text", _verdict(deltas))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.12)
    for name, values, color in (("baseline", base_nll, GREY), ("model", nll, BLUE)):
        figure.add_scatter(
            x=places, y=list(values), name=name, mode="markers", marker={"color": color, "size": 9}, row=1, col=1
        )
    colors = [ORANGE if delta > 0 else BLUE for delta in deltas]
    figure.add_bar(x=places, y=deltas, name="model − baseline", marker_color=colors, showlegend=False, row=2, col=1)
    figure.update_yaxes(title="nats per token")
    figure.update_xaxes(title="shard", row=2, col=1)
    return page_of(figure, "", 640)
