"""Plots as files: PNG (matplotlib), or HTML that needs nothing else (plotly), by the path's suffix.

Takes values that were measured elsewhere; knows no model and no study.
"""

from __future__ import annotations

import html
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import plotly.graph_objects as go
import plotly.io
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox
from plotly.subplots import make_subplots

from search.errors import UsageError

BLUE, ORANGE, GREY, INK = "#3b6ea5", "#d9822b", "#9aa3ad", "#2b2f36"
SHADES = ("#3b6ea5", "#6690bd", "#93b2d3", "#bfd1e5")  # of the weights of one part
DPI = 150
FIRST = 3  # layers to go that are marked
PARTS = {
    "embedding": "embedding",
    "attention": "attention",
    "mlp": "MLP",
    "norms": "norms",
    "lm_head": "lm_head",
    "other": "other",
}
FONTS = ("DejaVu Sans", "Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo")


def structure(found: Mapping[str, Any], path: Path) -> Path:
    """What `search.analyze.analyze` found: MB by part, and importance by layer where it was measured."""
    return _write(path, lambda: _structure_png(found), lambda: _structure_html(found))


def scores(rows: Sequence[Mapping[str, Any]], path: Path, weight_perf: float = 0.5, weight_speed: float = 0.5) -> Path:
    """PerfNorm against SpeedNorm of models with their standard errors, the baseline at (1, 0), lines of equal Score.

    rows: name, perf_norm, perf_norm_se, speed_norm, speed_norm_se, score; an error may be None, and a row without the
    other numbers is left out. weight_perf, weight_speed: of the Score.
    """
    weights = (weight_perf, weight_speed)
    rows = [row for row in rows if all(_finite(row[key]) for key in ("perf_norm", "speed_norm", "score"))]
    return _write(path, lambda: _scores_png(rows, weights), lambda: _scores_html(rows, weights))


def shards(base_nll: Sequence[float], nll: Sequence[float], path: Path) -> Path:
    """The loss of the model and of the baseline on each shard of the text, nats per token, and what the model loses."""
    if not base_nll or len(base_nll) != len(nll):
        raise UsageError(
            f"plot {path}: {len(nll)} shards of the model and {len(base_nll)} of the baseline; measure both on "
            "the same shards, at least one"
        )
    return _write(path, lambda: _shards_png(base_nll, nll), lambda: _shards_html(base_nll, nll))


def require_suffix(path: Path) -> None:
    """Raises UsageError for a path that ends in neither .png nor .html; worth asking before anything is measured."""
    if path.suffix not in (".png", ".html"):
        raise UsageError(f"plot {path}: ends in {path.suffix or 'nothing'!r}; choose a name that ends in .png or .html")


def _write(path: Path, png: Callable[[], Figure], page: Callable[[], Any]) -> Path:
    """Written beside its place and renamed. Raises UsageError for another suffix or a place that can't be written."""
    path = Path(path)
    require_suffix(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            written = Path(scratch, path.name)
            if path.suffix == ".png":
                _save(png, written)
            else:
                # plotly's own button would send the numbers to its maker
                config = {"displaylogo": False, "showSendToCloud": False}
                plotly.io.write_html(page(), written, include_plotlyjs=True, include_mathjax=False, config=config)
            written.replace(path)
    except OSError as error:
        raise UsageError(f"plot {path}: {error.strerror or error}; nothing was changed there") from None
    return path


def _save(png: Callable[[], Figure], path: Path) -> None:
    there = set(font_manager.fontManager.get_font_names())
    style: Any = {
        "font.family": [font for font in FONTS if font in there],  # names of models may be Korean
        "font.size": 9,
        "text.parse_math": False,  # a $ in a name is a $
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": GREY,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        png().savefig(path, dpi=DPI, format="png")


def _figure(width: float, height: float) -> Figure:
    """Of width × height inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _page(figure: Any, title: str, height: int) -> Any:
    figure.update_layout(
        title=title,
        template="plotly_white",
        height=height,
        font={"color": INK},
        legend={"orientation": "h", "y": -0.15},
    )
    return figure


# -- structure -----------------------------------------------------------------------------------------------


def _title(found: Mapping[str, Any]) -> str:
    name = Path(found["model"]).name
    return f"{name}: {found['parameters'] / 1e6:,.1f}M parameters, {found['bytes'] / 1e6:,.1f} MB"


def _structure_png(found: Mapping[str, Any]) -> Figure:
    parts = [part for part in found["parts"] if part["count"]]
    order = found["drop_order"]
    figure = _figure(9, 6.4 if order is not None else 3.2)
    figure.suptitle(_title(found), fontsize=12, fontweight="bold", x=0.01, ha="left")
    if order is None:
        _bars_of_parts(figure.subplots(), parts)
        return figure
    upper, lower = figure.subplots(2, 1, height_ratios=(1, 1.15), gridspec_kw={"hspace": 0.12})
    _bars_of_parts(upper, parts)
    _bars_of_layers(lower, found["layers"], order)
    return figure


def _bars_of_parts(axes: Axes, parts: Sequence[Mapping[str, Any]]) -> None:
    widest = max(part["bytes"] for part in parts) / 1e6
    for row, part in enumerate(parts):
        left = 0.0
        for place, weight in enumerate(part["parts"]):
            width = weight["bytes"] / 1e6
            color = SHADES[place % len(SHADES)]
            axes.barh(row, width, left=left, height=0.62, color=color, edgecolor="white", linewidth=1)
            name = weight["name"].rpartition(".")[2]
            fitting = [text for text in (name, name.removesuffix("_proj")) if width > widest * 0.013 * len(text)]
            if fitting and len(part["parts"]) > 1:
                name, ink = fitting[0], "white" if place % len(SHADES) < 2 else INK
                axes.text(left + width / 2, row, name, ha="center", va="center", fontsize=7.5, color=ink)
            left += width
        text = f"{left:,.1f} MB  {100 * part['share']:.1f} %" if part["share"] >= 0.0005 else f"{left:,.2f} MB"
        axes.text(left + widest * 0.01, row, text, va="center", fontsize=8.5)
    axes.set_yticks(range(len(parts)), [PARTS.get(part["name"], part["name"]) for part in parts])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlim(0, widest * 1.17)
    axes.set_xlabel("MB (1e6 bytes)")
    axes.set_title("Size by part")


def _bars_of_layers(axes: Axes, layers: Sequence[Mapping[str, Any]], order: Sequence[int]) -> None:
    influence = [layer["block_influence"] for layer in layers]
    first = order[:FIRST]
    colors = [ORANGE if place in first else BLUE for place in range(len(layers))]
    axes.bar(range(len(layers)), influence, color=colors, width=0.78)
    for rank, place in enumerate(first, start=1):
        axes.annotate(
            str(rank),
            (place, influence[place]),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=ORANGE,
            fontweight="bold",
        )
    step = max(1, math.ceil(len(layers) / 32))
    axes.set_xticks(range(0, len(layers), step), [str(layer["index"]) for layer in layers[::step]], fontsize=8)
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.tick_params(axis="x", length=0)
    if _skewed(influence):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("layer")
    axes.set_ylabel("1 − cos(input, output)")
    marked = f"; in orange the {len(first)} that would go first" if first else ""
    axes.set_title(f"Importance by layer (block influence){marked}")


def _skewed(values: Sequence[float]) -> bool:
    """Whether a linear axis would show little but the largest: the first and the last layer often do most."""
    return min(values) > 0 and max(values) > 10 * sorted(values)[len(values) // 2]


def _structure_html(found: Mapping[str, Any]) -> Any:
    parts = [part for part in found["parts"] if part["count"]]
    order = found["drop_order"]
    titles = ["Size by part", *(["Importance by layer (block influence)"] if order is not None else [])]
    figure = make_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=0.2)
    for part in parts:
        for place, weight in enumerate(part["parts"]):
            name = html.escape(weight["name"])
            figure.add_bar(
                y=[PARTS.get(part["name"], part["name"])],
                x=[weight["bytes"] / 1e6],
                orientation="h",
                marker_color=SHADES[place % len(SHADES)],
                showlegend=False,
                name=name,
                text=[html.escape(weight["name"].rpartition(".")[2]) if len(part["parts"]) > 1 else ""],
                textposition="inside",
                insidetextanchor="middle",
                constraintext="inside",
                hovertemplate=f"{name}<br>%{{x:,.2f}} MB, {weight['parameters']:,} parameters<extra></extra>",
                row=1,
                col=1,
            )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    figure.update_xaxes(title="MB (1e6 bytes)", row=1, col=1)
    if order is not None:
        rank = {place: number for number, place in enumerate(order, start=1)}
        goes = [f"goes as number {rank[place]}" if place in rank else "stays" for place in range(len(found["layers"]))]
        figure.add_bar(
            x=[layer["index"] for layer in found["layers"]],
            y=[layer["block_influence"] for layer in found["layers"]],
            marker_color=[ORANGE if place in order[:FIRST] else BLUE for place in range(len(found["layers"]))],
            customdata=goes,
            hovertemplate="layer %{x}: %{y:.4f}, %{customdata}<extra></extra>",
            showlegend=False,
            row=2,
            col=1,
        )
        skewed = _skewed([layer["block_influence"] for layer in found["layers"]])
        scale = {"type": "log", "dtick": "D2"} if skewed else {}
        figure.update_yaxes(title="1 − cos(input, output)", **scale, row=2, col=1)
        figure.update_xaxes(title="layer", row=2, col=1)
    return _page(figure, html.escape(_title(found)), 420 * len(titles))


# -- scores --------------------------------------------------------------------------------------------------


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
    figure = _figure(8, 6)
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
    _put_labels(axes, labels, obstacles, None if best is None else rows.index(best))
    return figure


def _put_labels(axes: Axes, labels: Sequence[tuple[float, float, str]], taken: list[Bbox], best: int | None) -> None:
    """Beside each point where there is room, further off with a thin line where there is not. labels: (x, y, text)."""
    points = axes.transData.transform([(x, y) for x, y, _ in labels])
    scale = axes.figure.dpi / 72
    taken += [Bbox.from_extents(a - 7, b - 7, a + 7, b + 7) for a, b in points]
    for place, ((x, y, text), point) in enumerate(zip(labels, points, strict=True)):
        label = axes.annotate(
            text,
            (x, y),
            (0, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            fontweight="bold" if place == best else "normal",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4},
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=5,
        )
        label.set_in_layout(False)
        size = Text.get_window_extent(label)  # without its line
        choices = []
        for dx, dy, align in _around():
            left = point[0] + dx * scale - {"left": 0.0, "center": size.width / 2, "right": size.width}[align]
            box = Bbox.from_bounds(left, point[1] + dy * scale - size.height / 2, size.width, size.height)
            outside = size.width * size.height - _overlap(box, axes.bbox)
            choices.append((3 * outside + sum(_overlap(box, other) for other in taken), dx, dy, align, box))
        _, dx, dy, align, box = min(choices, key=lambda choice: round(choice[0], 3))  # the first of equals: the nearest
        label.set_position((dx, dy))
        label.set_horizontalalignment(align)
        if math.hypot(dx, dy) < 20 and label.arrow_patch is not None:
            label.arrow_patch.set_visible(False)
        taken.append(box)


def _around() -> list[tuple[float, float, Literal["left", "center", "right"]]]:
    """Places of a label around its point, in points, nearest first."""
    sides = ((0.6, 0.9), (1, 0), (-1, 0), (0, 1.2), (0, -1.2), (0.6, -0.9), (-0.6, 0.9), (-0.6, -0.9))
    return [
        (dx * reach, dy * reach, "left" if dx > 0 else "right" if dx < 0 else "center")
        for reach in (9, 13, 18, 30, 44, 60, 80)
        for dx, dy in sides
    ]


def _overlap(box: Bbox, other: Bbox) -> float:
    shared = Bbox.intersection(box, other)
    return 0.0 if shared is None else float(shared.width * shared.height)


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
    return _page(figure, "PerfNorm and SpeedNorm, ± standard error; grey: equal Score", 640)


# -- shards --------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, nan for a single value."""
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
    figure = _figure(9, 5.6)
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
    return _page(figure, "", 640)
