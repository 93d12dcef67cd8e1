"""The plot of PerfNorm against SpeedNorm of several models."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from search.show.plots.drawing import BLUE, GREY, INK, ORANGE, figure_of, page_of, write
from search.show.plots.labels import put_labels


def plot_scores(
    rows: Sequence[Mapping[str, Any]], path: Path, weight_perf: float = 0.5, weight_speed: float = 0.5
) -> Path:
    """PerfNorm against SpeedNorm of models with their standard errors, the baseline at (1, 0), lines of equal Score.

    rows: name, perf_norm, perf_norm_se, speed_norm, speed_norm_se, score; an error may be None, and a row without the
    other numbers is left out. weight_perf, weight_speed: of the Score.
    """
    weights = (weight_perf, weight_speed)
    rows = [row for row in rows if all(_finite(row[key]) for key in ("perf_norm", "speed_norm", "score"))]
    return write(path, lambda: _scores_png(rows, weights), lambda: _scores_html(rows, weights))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _errors(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [row[key] if _finite(row.get(key)) else 0.0 for row in rows]


def _window(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ranges of SpeedNorm and PerfNorm that hold every model, its errors, and the baseline."""

    def around(key: str, baseline: float) -> tuple[float, float]:
        values, errors = [row[key] for row in rows], _errors(rows, f"{key}_se")
        low = min([baseline, *(value - error for value, error in zip(values, errors, strict=True))])
        high = max([baseline, *(value + error for value, error in zip(values, errors, strict=True))])
        margin = max(0.12 * (high - low), 0.02)
        return low - margin, high + margin

    return around("speed_norm", 0.0), around("perf_norm", 1.0)


def _levels(x: tuple[float, float], y: tuple[float, float], weights: tuple[float, float]) -> list[float]:
    """Round Scores, five to ten of them, whose lines cross the window."""
    perf, speed = weights
    corners = [perf * b + speed * a for a in x for b in y]
    span = max(corners) - min(corners)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, math.inf) if span / step <= 10)
    if math.isinf(step):
        return [perf]
    lowest = max(math.ceil(min(corners) / step), 1)  # a Score is never below 0
    return [round(step * n, 6) for n in range(lowest, math.floor(max(corners) / step) + 1)]


def _line(level: float, x: tuple[float, float], y: tuple[float, float], weights: tuple[float, float]) -> Any:
    """The ends ((x, y), (x, y)) in the window of the line on which the Score is `level`; None for a mere point."""
    perf, speed = weights
    ends = []
    if perf:
        ends += [(a, (level - speed * a) / perf) for a in x]
    if speed:
        ends += [((level - perf * b) / speed, b) for b in y]
    inside = sorted({(a, b) for a, b in ends if x[0] <= a <= x[1] and y[0] <= b <= y[1]})
    return (inside[0], inside[-1]) if len(inside) > 1 else None


def _scores_png(rows: Sequence[Mapping[str, Any]], weights: tuple[float, float]) -> Figure:
    figure = figure_of(8, 6)
    axes = figure.subplots()
    x, y = _window(rows)
    axes.set_xlim(x)
    axes.set_ylim(y)
    taken = []  # what no label may cover
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
            taken.append(label)
    best = max(rows, key=lambda row: row["score"], default=None)
    named = any(row["name"] == "baseline" for row in rows)
    axes.scatter([0], [1], marker="*", s=130, color=INK, zorder=4)
    for row, width, height in zip(rows, _errors(rows, "speed_norm_se"), _errors(rows, "perf_norm_se"), strict=True):
        axes.errorbar(
            row["speed_norm"],
            row["perf_norm"],
            xerr=width,
            yerr=height,
            fmt="o",
            markersize=5.5,
            elinewidth=1,
            capsize=2,
            color=ORANGE if row is best else BLUE,
            zorder=3.5 if row is best else 3,
        )
    labels = [(row["speed_norm"], row["perf_norm"], f"{row['name']}  {row['score']:.3f}") for row in rows]
    if not named:
        labels.append((0.0, 1.0, f"baseline  {weights[0]:.3f}"))
    axes.set_xlabel("SpeedNorm = 1 − time per token / baseline's   (faster →)")
    axes.set_ylabel("PerfNorm = Perf / baseline's   (better →)")
    axes.set_title("PerfNorm and SpeedNorm, ± standard error; grey: equal Score")
    figure.canvas.draw()
    obstacles = [label.get_window_extent() for label in taken]
    for row, width, height in zip(rows, _errors(rows, "speed_norm_se"), _errors(rows, "perf_norm_se"), strict=True):
        ends = [(row["speed_norm"] + a * width, row["perf_norm"] + b * height) for a in (-1, 1) for b in (-1, 1)]
        (left, bottom), (right, top) = axes.transData.transform([ends[0], ends[-1]])
        obstacles.append(Bbox.from_extents(left - 3, (bottom + top) / 2 - 4, right + 3, (bottom + top) / 2 + 4))
        obstacles.append(Bbox.from_extents((left + right) / 2 - 4, bottom - 3, (left + right) / 2 + 4, top + 3))
    put_labels(axes, labels, obstacles, None if best is None else rows.index(best))
    return figure


def _scores_html(rows: Sequence[Mapping[str, Any]], weights: tuple[float, float]) -> Any:
    x, y = _window(rows)
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
    best = max((row["score"] for row in rows), default=None)
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
        x=[row["speed_norm"] for row in rows],
        y=[row["perf_norm"] for row in rows],
        error_x={"array": _errors(rows, "speed_norm_se"), "thickness": 1, "color": BLUE},
        error_y={"array": _errors(rows, "perf_norm_se"), "thickness": 1, "color": BLUE},
        mode="markers+text",
        marker={"size": 9, "color": [ORANGE if row["score"] == best else BLUE for row in rows]},
        text=[html.escape(str(row["name"])) for row in rows],
        textposition="top center",
        customdata=[row["score"] for row in rows],
        hovertemplate="%{text}<br>PerfNorm %{y:.4f}<br>SpeedNorm %{x:.4f}<br>Score %{customdata:.4f}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title="SpeedNorm = 1 − time per token / baseline's (faster →)", range=x)
    figure.update_yaxes(title="PerfNorm = Perf / baseline's (better →)", range=y)
    return page_of(figure, "PerfNorm and SpeedNorm, ± standard error; grey: equal Score", 640)
