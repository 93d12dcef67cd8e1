"""Plots a model's structure: MB by part, and importance by layer."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from plotly.subplots import make_subplots

from compressors.model.structure import LayerStructure, Part
from search.show.analysis import Analysis
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


def plot_structure(analysis: Analysis, path: Path) -> Path:
    """Plot a model's structure: MB by part, and importance by layer where it was measured.

    Args:
        analysis: The analysis of the model.
        path: The .png or .html file to write.

    Returns:
        The path of the file.

    Raises:
        UsageError: The path has another suffix, or it can't be written.
    """
    return write(path, lambda: _structure_png(analysis), lambda: _structure_html(analysis))


def _title(analysis: Analysis) -> str:
    model = analysis.structure
    return f"{Path(analysis.model).name}: {model.parameters / 1e6:,.1f}M parameters, {model.bytes / 1e6:,.1f} MB"


def _structure_png(analysis: Analysis) -> Figure:
    figure = figure_of(9, 3.2 if analysis.block_influence is None else 6.4)
    figure.suptitle(_title(analysis), fontsize=12, fontweight="bold", x=0.01, ha="left")
    if analysis.block_influence is None:
        _bars_of_parts(figure.subplots(), analysis)
        return figure
    upper, lower = figure.subplots(2, 1, height_ratios=(1, 1.15), gridspec_kw={"hspace": 0.12})
    _bars_of_parts(upper, analysis)
    _bars_of_layers(lower, analysis.structure.layers, analysis.block_influence, analysis.drop_order or ())
    return figure


def _parts(analysis: Analysis) -> list[Part]:
    return [part for part in analysis.structure.parts if part.count]


def _bars_of_parts(axes: Axes, analysis: Analysis) -> None:
    parts = _parts(analysis)
    widest = max(part.bytes for part in parts) / 1e6
    for row, part in enumerate(parts):
        left = 0.0
        for place, weight in enumerate(part.parts):
            width = weight.bytes / 1e6
            color = SHADES[place % len(SHADES)]
            axes.barh(row, width, left=left, height=0.62, color=color, edgecolor="white", linewidth=1)
            name = weight.name.rpartition(".")[2]
            fitting = [text for text in (name, name.removesuffix("_proj")) if width > widest * 0.013 * len(text)]
            if fitting and len(part.parts) > 1:
                name, ink = fitting[0], "white" if place % len(SHADES) < 2 else INK
                axes.text(left + width / 2, row, name, ha="center", va="center", fontsize=7.5, color=ink)
            left += width
        share = analysis.share(part)
        text = f"{left:,.1f} MB  {100 * share:.1f} %" if share >= 0.0005 else f"{left:,.2f} MB"
        axes.text(left + widest * 0.01, row, text, va="center", fontsize=8.5)
    axes.set_yticks(range(len(parts)), [PARTS.get(part.name, part.name) for part in parts])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.set_xlim(0, widest * 1.17)
    axes.set_xlabel("MB (1e6 bytes)")
    axes.set_title("Size by part")


def _bars_of_layers(
    axes: Axes, layers: Sequence[LayerStructure], influence: Sequence[float], order: Sequence[int]
) -> None:
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
    axes.set_xticks(range(0, len(layers), step), [str(layer.index) for layer in layers[::step]], fontsize=8)
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


def _structure_html(analysis: Analysis) -> Any:
    influence, order = analysis.block_influence, analysis.drop_order or ()
    titles = ["Size by part", *(["Importance by layer (block influence)"] if influence is not None else [])]
    figure = make_subplots(rows=len(titles), cols=1, subplot_titles=titles, vertical_spacing=0.2)
    for part in _parts(analysis):
        for place, weight in enumerate(part.parts):
            name = html.escape(weight.name)
            figure.add_bar(
                y=[PARTS.get(part.name, part.name)],
                x=[weight.bytes / 1e6],
                orientation="h",
                marker_color=SHADES[place % len(SHADES)],
                showlegend=False,
                name=name,
                text=[html.escape(weight.name.rpartition(".")[2]) if len(part.parts) > 1 else ""],
                textposition="inside",
                insidetextanchor="middle",
                constraintext="inside",
                hovertemplate=f"{name}<br>%{{x:,.2f}} MB, {weight.parameters:,} parameters<extra></extra>",
                row=1,
                col=1,
            )
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed", row=1, col=1)
    figure.update_xaxes(title="MB (1e6 bytes)", row=1, col=1)
    if influence is not None:
        rank = {place: number for number, place in enumerate(order, start=1)}
        goes = [f"goes as number {rank[place]}" if place in rank else "stays" for place in range(len(influence))]
        figure.add_bar(
            x=[layer.index for layer in analysis.structure.layers],
            y=list(influence),
            marker_color=[ORANGE if place in order[:FIRST] else BLUE for place in range(len(influence))],
            customdata=goes,
            hovertemplate="layer %{x}: %{y:.4f}, %{customdata}<extra></extra>",
            showlegend=False,
            row=2,
            col=1,
        )
        scale = {"type": "log", "dtick": "D2"} if _skewed(influence) else {}
        figure.update_yaxes(title="1 − cos(input, output)", **scale, row=2, col=1)
        figure.update_xaxes(title="layer", row=2, col=1)
    return page_of(figure, html.escape(_title(analysis)), 420 * len(titles))
