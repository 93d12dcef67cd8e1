"""Places the labels of points so that none covers another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from search.show.plots.drawing import GREY


def put_labels(axes: Axes, labels: Sequence[tuple[float, float, str]], taken: list[Bbox], best: int | None) -> None:
    """Put each label next to its point, or further off with a thin line where there is no room.

    Args:
        axes: The axes, drawn once already.
        labels: The labels as (x, y, text), in the units of the axes.
        taken: Boxes in pixels that no label may cover; the labels' own are added to it.
        best: The index of the label in bold.
    """
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
            outside = size.width * size.height - overlap(box, axes.bbox)
            choices.append((3 * outside + sum(overlap(box, other) for other in taken), dx, dy, align, box))
        _, dx, dy, align, box = min(choices, key=lambda choice: round(choice[0], 3))  # the first of equals: the nearest
        label.set_position((dx, dy))
        label.set_horizontalalignment(align)
        if math.hypot(dx, dy) < 20 and label.arrow_patch is not None:
            label.arrow_patch.set_visible(False)
        taken.append(box)


def _around() -> list[tuple[float, float, Literal["left", "center", "right"]]]:
    """Return places of a label around its point, as offsets in points and an alignment, nearest first."""
    sides = ((0.6, 0.9), (1, 0), (-1, 0), (0, 1.2), (0, -1.2), (0.6, -0.9), (-0.6, 0.9), (-0.6, -0.9))
    return [
        (dx * reach, dy * reach, "left" if dx > 0 else "right" if dx < 0 else "center")
        for reach in (9, 13, 18, 30, 44, 60, 80)
        for dx, dy in sides
    ]


def overlap(box: Bbox, other: Bbox) -> float:
    """Return the area that two boxes share."""
    shared = Bbox.intersection(box, other)
    return 0.0 if shared is None else float(shared.width * shared.height)
