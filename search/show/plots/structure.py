"""The plot of a model's structure: MB by part, and importance by layer."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from plotly.subplots import make_subplots

from search.show.plots.drawing import BLUE, INK, ORANGE, figure_of, page_of, write

SHADES = ("#3b6ea5", "#6690bd", "#93b2d3", "#bfd1e5")  # for the weights of one part
FIRST = 3  # layers that would be dropped first and are marked
PARTS = {
    "embedding": "embedding",
    "attention": "attention",
    "mlp": "MLP",
    "norms": "norms",
    "lm_head": "lm_head",
    "other": "other",
}


def plot_structure(found: Mapping[str, Any], path: Path) -> Path:
    """Plot a model's structure: MB by part, and importance by layer where it was measured.

    Args:
        found: The structure (`search.by_hand.analyze.analyze`).
        path: The .png or .html file to write.

    Returns:
        The path of the file.

    Raises:
        UsageError: The path has another suffix, or it can't be written.
    """
    return write(path, lambda: _structure_png(found), lambda: _structure_html(found))


def _title(found: Mapping[str, Any]) -> str:
    name = Path(found["model"]).name
    return f"{name}: {found['parameters'] / 1e6:,.1f}M parameters, {found['bytes'] / 1e6:,.1f} MB"


def _structure_png(found: Mapping[str, Any]) -> Figure:
    parts = [part for part in found["parts"] if part["count"]]
    order = found["drop_order"]
    figure = figure_of(9, 6.4 if order is not None else 3.2)
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
    """Return whether a linear axis would hide all values except the largest; the outer layers often do most."""
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
    return page_of(figure, html.escape(_title(found)), 420 * len(titles))
