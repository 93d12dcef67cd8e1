"""Plots a forecast: what each cut and precision costs, what it pays, and the front of what can be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plotly.subplots import make_subplots

from compressors.plan import short
from search.show.forecast_view import Best, ForecastView
from search.show.plots.drawing import BLUE, GREY, INK, ORANGE, figure_of, page_of, write

ROW = 0.26  # inches


def plot_forecast(view: ForecastView, path: Path) -> Path:
    """Plot a forecast: bars of 1 − PerfNorm and of SpeedNorm for each change, and the forecast Pareto front.

    Args:
        view: The forecast.
        path: The .png or .html file to write.

    Returns:
        The path of the file.

    Raises:
        UsageError: The path has another suffix, or it can't be written.
    """
    return write(path, lambda: _png(view), lambda: _html(view))


def _bars(view: ForecastView) -> list[tuple[str, float, float]]:
    """Return (what changes, 1 − PerfNorm, SpeedNorm) for each row of both panels."""
    return [(cost.change, 1.0 - cost.perf_norm, cost.speed_norm) for cost in view.costs]


def _png(view: ForecastView) -> Figure:
    bars = _bars(view)
    figure = figure_of(13, max(4.0, 1.5 + ROW * len(bars)))
    costs, pays, front = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    _draw_bars(costs, "What it costs: 1 − PerfNorm", bars, [cost for _, cost, _ in bars], (ORANGE, BLUE))
    _draw_bars(pays, "What it pays: SpeedNorm", bars, [paid for _, _, paid in bars], (BLUE, ORANGE))
    pays.tick_params(labelleft=False)
    front.set_title("The best plans of the space, forecast")
    front.set_xlabel("SpeedNorm")
    front.set_ylabel("PerfNorm")
    front.scatter([0], [1], marker="*", s=130, color=INK, zorder=4, label="the base model")
    if view.front:
        x, y = _at(view.front)
        errors = [each.speed_norm_se for each in view.front], [each.perf_norm_se for each in view.front]
        front.errorbar(x, y, errors[1], errors[0], fmt="o", ms=4, color=BLUE, ecolor=GREY, elinewidth=0.8)
        best = max(view.front, key=lambda each: each.score) if view.goal.is_default else view.best[0]
        front.scatter([best.speed_norm], [best.perf_norm], s=60, color=ORANGE, zorder=5, label=short(best.plan))
        _around(front, [0.0, *x], [1.0, *y])
    front.legend(loc="lower left", frameon=False, fontsize=8)
    return figure


def _draw_bars(
    axes: Axes,
    title: str,
    bars: Sequence[tuple[str, float, float]],
    values: Sequence[float],
    colors: tuple[str, str],
) -> None:
    """Draw a panel of bars in the first color, those below 0 in the second."""
    places = range(len(bars))
    axes.set_title(title)
    axes.barh(places, values, color=[colors[value < 0] for value in values])
    axes.set_yticks(places, [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, linewidth=0.8)


def _around(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Show the points, and no error bar that is longer than all of them."""
    for values, limit in ((x, axes.set_xlim), (y, axes.set_ylim)):
        margin = max(0.15 * (max(values) - min(values)), 0.01)
        limit(min(values) - margin, max(values) + margin)


def _at(front: Sequence[Best]) -> tuple[list[float], list[float]]:
    return [each.speed_norm for each in front], [each.perf_norm for each in front]


def _html(view: ForecastView) -> Any:
    bars = _bars(view)
    names = [name for name, _, _ in bars]
    titles = ("What it costs: 1 − PerfNorm", "What it pays: SpeedNorm", "The best plans of the space, forecast")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.06)
    for column, values, color in ((1, [cost for _, cost, _ in bars], ORANGE), (2, [paid for _, _, paid in bars], BLUE)):
        bar = go.Bar(x=values, y=names, orientation="h", marker={"color": color}, showlegend=False)
        figure.add_trace(bar, row=1, col=column)
        figure.update_yaxes(autorange="reversed", showticklabels=column == 1, row=1, col=column)
    x, y = _at(view.front)
    points = go.Scatter(
        x=x,
        y=y,
        mode="markers",
        name="plans",
        marker={"color": BLUE},
        text=[f"{short(each.plan)}<br>Score {each.score:.4f} ± {each.score_se:.4f}" for each in view.front],
        hoverinfo="text+x+y",
        error_x={"array": [each.speed_norm_se for each in view.front], "color": GREY},
        error_y={"array": [each.perf_norm_se for each in view.front], "color": GREY},
    )
    figure.add_trace(points, row=1, col=3)
    own = go.Scatter(x=[0], y=[1], mode="markers", name="the base model", marker={"color": INK, "symbol": "star"})
    figure.add_trace(own, row=1, col=3)
    figure.update_xaxes(title="SpeedNorm", row=1, col=3)
    figure.update_yaxes(title="PerfNorm", row=1, col=3)
    return page_of(figure, f"Forecast of study {view.study} on {view.device}", max(450, 120 + 26 * len(bars)))
