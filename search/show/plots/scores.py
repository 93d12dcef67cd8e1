"""Plots PerfNorm against SpeedNorm of several models."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from search.show.plots.drawing import BLUE, GREY, INK, ORANGE, figure_of, page_of, write
from search.show.plots.labels import put_labels
from search.show.rows import Row


class Point(NamedTuple):
    """Point holds a model of the plot: SpeedNorm is x, PerfNorm is y, and the errors are their standard errors."""

    name: str
    x: float
    y: float
    x_error: float
    y_error: float
    score: float


def plot_scores(
    rows: Iterable[Row], path: Path, weight_perf: float = 0.5, weight_speed: float = 0.5, best: str | None = None
) -> Path:
    """Plot PerfNorm against SpeedNorm of evaluated models, with the baseline at (1, 0) and lines of equal Score.

    Args:
        rows: The models; those without a result, or without a finite one, are left out.
        path: The .png or .html file to write.
        weight_perf: The weight of PerfNorm in the Score.
        weight_speed: The weight of SpeedNorm in the Score.
        best: The name of the model that stands out, empty: none does; None: the one with the best Score.

    Returns:
        The path of the file.

    Raises:
        UsageError: The path has another suffix, or it can't be written.
    """
    weights = (weight_perf, weight_speed)
    points = points_of(rows)
    chosen = max(points, key=lambda point: point.score, default=None)
    if best is not None:
        chosen = next((point for point in points if point.name == best), None)
    return write(path, lambda: _scores_png(points, chosen, weights), lambda: _scores_html(points, chosen, weights))


def points_of(rows: Iterable[Row]) -> list[Point]:
    """Return the models that can be drawn. An error that is not finite becomes 0."""
    points = []
    for row in rows:
        if row.result is None:
            continue
        score = row.result.score
        if all(map(math.isfinite, (score.perf_norm, score.speed_norm, score.score))):
            x_error, y_error = (e if math.isfinite(e) else 0.0 for e in (score.speed_norm_se, score.perf_norm_se))
            points.append(Point(row.name, score.speed_norm, score.perf_norm, x_error, y_error, score.score))
    return points


def _window(points: Sequence[Point]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the ranges of SpeedNorm and PerfNorm that hold every model, its errors, and the baseline."""

    def around(values: Sequence[tuple[float, float]], baseline: float) -> tuple[float, float]:
        low = min([baseline, *(value - error for value, error in values)])
        high = max([baseline, *(value + error for value, error in values)])
        margin = max(0.12 * (high - low), 0.02)
        return low - margin, high + margin

    x = around([(point.x, point.x_error) for point in points], 0.0)
    return x, around([(point.y, point.y_error) for point in points], 1.0)


def _levels(x: tuple[float, float], y: tuple[float, float], weights: tuple[float, float]) -> list[float]:
    """Return round Scores, five to ten of them, whose lines cross the window."""
    perf, speed = weights
    corners = [perf * b + speed * a for a in x for b in y]
    span = max(corners) - min(corners)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, math.inf) if span / step <= 10)
    if math.isinf(step):
        return [perf]
    lowest = max(math.ceil(min(corners) / step), 1)  # a Score is never below 0
    return [round(step * n, 6) for n in range(lowest, math.floor(max(corners) / step) + 1)]


def _line(level: float, x: tuple[float, float], y: tuple[float, float], weights: tuple[float, float]) -> Any:
    """Return the ends ((x, y), (x, y)) of the line on which the Score is `level`; None for less than a line."""
    perf, speed = weights
    ends = []
    if perf:
        ends += [(a, (level - speed * a) / perf) for a in x]
    if speed:
        ends += [((level - perf * b) / speed, b) for b in y]
    inside = sorted({(a, b) for a, b in ends if x[0] <= a <= x[1] and y[0] <= b <= y[1]})
    return (inside[0], inside[-1]) if len(inside) > 1 else None


def _scores_png(points: Sequence[Point], best: Point | None, weights: tuple[float, float]) -> Figure:
    figure = figure_of(8, 6)
    axes = figure.subplots()
    x, y = _window(points)
    axes.set_xlim(x)
    axes.set_ylim(y)
    level_labels = _draw_levels(axes, x, y, weights)
    axes.scatter([0], [1], marker="*", s=130, color=INK, zorder=4)
    for point in points:
        axes.errorbar(
            point.x,
            point.y,
            xerr=point.x_error,
            yerr=point.y_error,
            fmt="o",
            markersize=5.5,
            elinewidth=1,
            capsize=2,
            color=ORANGE if point is best else BLUE,
            zorder=3.5 if point is best else 3,
        )
    axes.set_xlabel("SpeedNorm = 1 − time per token / baseline's   (faster →)")
    axes.set_ylabel("PerfNorm = Perf / baseline's   (better →)")
    axes.set_title("PerfNorm and SpeedNorm, ± standard error; grey: equal Score")
    labels = [(point.x, point.y, f"{point.name}  {point.score:.3f}") for point in points]
    if not any(point.name == "baseline" for point in points):
        labels.append((0.0, 1.0, f"baseline  {weights[0]:.3f}"))
    figure.canvas.draw()
    obstacles = [label.get_window_extent() for label in level_labels]
    obstacles += [box for point in points for box in _boxes_of_errors(axes, point)]
    put_labels(axes, labels, obstacles, None if best is None else points.index(best))
    return figure


def _draw_levels(axes: Axes, x: tuple[float, float], y: tuple[float, float], weights: tuple[float, float]) -> list[Any]:
    """Draw the lines of equal Score; return the labels inside the axes, which no other label may cover."""
    inside = []
    for level in _levels(x, y, weights):
        line = _line(level, x, y, weights)
        if line is None:
            continue
        axes.plot(*zip(*line, strict=True), color=GREY, linewidth=0.7, alpha=0.6, zorder=1)
        to_the_right = line[1][0] == x[1]
        label = axes.annotate(
            f"{level:g}",
            line[1],
            (4, 0) if to_the_right else (2, 5),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=GREY,
        )
        if not to_the_right:
            label.set_in_layout(False)
            inside.append(label)
    return inside


def _boxes_of_errors(axes: Axes, point: Point) -> tuple[Bbox, Bbox]:
    """Return the boxes around the two error bars, in pixels."""
    low, high = (point.x - point.x_error, point.y - point.y_error), (point.x + point.x_error, point.y + point.y_error)
    (left, bottom), (right, top) = axes.transData.transform([low, high])
    x, y = (left + right) / 2, (bottom + top) / 2
    return Bbox.from_extents(left - 3, y - 4, right + 3, y + 4), Bbox.from_extents(x - 4, bottom - 3, x + 4, top + 3)


def _scores_html(points: Sequence[Point], best: Point | None, weights: tuple[float, float]) -> Any:
    x, y = _window(points)
    figure = go.Figure()
    for level in _levels(x, y, weights):
        line = _line(level, x, y, weights)
        if line is not None:
            figure.add_scatter(
                x=[end[0] for end in line],
                y=[end[1] for end in line],
                mode="lines+text",
                text=["", f"{level:g}"],
                textposition="middle right" if line[1][0] == x[1] else "top right",
                textfont={"color": GREY, "size": 11},
                line={"color": "rgba(154, 163, 173, 0.6)", "width": 1},
                hoverinfo="skip",
                showlegend=False,
                cliponaxis=False,
            )
    figure.add_scatter(
        x=[0],
        y=[1],
        mode="markers+text",
        marker={"symbol": "star", "size": 14, "color": INK},
        text=["baseline"],
        textposition="bottom center",
        hovertemplate=f"baseline: Score {weights[0]:.4f}<extra></extra>",
        showlegend=False,
    )
    figure.add_scatter(
        x=[point.x for point in points],
        y=[point.y for point in points],
        error_x={"array": [point.x_error for point in points], "thickness": 1, "color": BLUE},
        error_y={"array": [point.y_error for point in points], "thickness": 1, "color": BLUE},
        mode="markers+text",
        marker={"size": 9, "color": [ORANGE if point is best else BLUE for point in points]},
        text=[html.escape(point.name) for point in points],
        textposition="top center",
        customdata=[point.score for point in points],
        hovertemplate="%{text}<br>PerfNorm %{y:.4f}<br>SpeedNorm %{x:.4f}<br>Score %{customdata:.4f}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title="SpeedNorm = 1 − time per token / baseline's (faster →)", range=x)
    figure.update_yaxes(title="PerfNorm = Perf / baseline's (better →)", range=y)
    return page_of(figure, "PerfNorm and SpeedNorm, ± standard error; grey: equal Score", 640)
