"""Writes plots as files: PNG (matplotlib), or HTML that needs no other file (plotly), by the path's suffix."""

from search.show.plots.drawing import require_suffix
from search.show.plots.forecast import plot_forecast
from search.show.plots.scores import plot_scores
from search.show.plots.shards import plot_shards
from search.show.plots.structure import plot_structure

__all__ = ["plot_forecast", "plot_scores", "plot_shards", "plot_structure", "require_suffix"]
