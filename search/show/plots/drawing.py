"""Holds what all plots share: colors, fonts, and how a plot becomes a file."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import plotly.io
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from search.errors import UsageError

BLUE, ORANGE, GREY, INK = "#3b6ea5", "#d9822b", "#9aa3ad", "#2b2f36"
DPI = 150
FONTS = ("DejaVu Sans", "Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo")


def require_suffix(path: Path) -> None:
    """Raise UsageError for a path that ends in neither .png nor .html; ask this before anything is measured."""
    if path.suffix not in (".png", ".html"):
        raise UsageError(f"plot {path}: ends in {path.suffix or 'nothing'!r}; choose a name that ends in .png or .html")


def write(path: Path, png: Callable[[], Figure], page: Callable[[], Any]) -> Path:
    """Write a plot, which appears whole or not at all, and return its path.

    Args:
        path: The .png or .html file to write.
        png: Draws the plot with matplotlib.
        page: Draws the plot with plotly.

    Raises:
        UsageError: The path has another suffix, or it can't be written.
    """
    path = Path(path)
    require_suffix(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            written = Path(scratch, path.name)
            if path.suffix == ".png":
                _save(png, written)
            else:
                # plotly's own button would send the numbers to its vendor
                config = {"displaylogo": False, "showSendToCloud": False}
                plotly.io.write_html(page(), written, include_plotlyjs=True, include_mathjax=False, config=config)
            written.replace(path)
    except OSError as error:
        raise UsageError(f"plot {path}: {error.strerror or error}; nothing was changed there") from None
    return path


def _save(png: Callable[[], Figure], path: Path) -> None:
    installed = set(font_manager.fontManager.get_font_names())
    style: Any = {
        "font.family": [font for font in FONTS if font in installed],  # names of models may be Korean
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


def figure_of(width: float, height: float) -> Figure:
    """Return an empty figure; width and height are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def page_of(figure: Any, title: str, height: int) -> Any:
    """Give a plotly figure the common layout and return it; the height is in pixels."""
    figure.update_layout(
        title=title,
        template="plotly_white",
        height=height,
        font={"color": INK},
        legend={"orientation": "h", "y": -0.15},
    )
    return figure
