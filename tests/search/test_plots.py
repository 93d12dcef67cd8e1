"""Plots are real files of a sensible size that show what they are given; nothing is fetched, nothing half-written."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from compressors.statistics.activations import Calibration
from evaluator.score import Score
from search.by_hand import analyze
from search.errors import UsageError
from search.show import plots
from search.show.plots import drawing, labels
from search.show.plots import scores as scores_plot
from search.show.plots import shards as shards_plot
from search.show.rows import Result, Row


def a_row(name, perf_norm, speed_norm, error=0.01, score=None):
    score = max(perf_norm + speed_norm, 0) / 2 if score is None else score
    measured = Score(perf_norm, error, speed_norm, error, score, error)
    return Row(name, "", Result(None, {}, measured))


ROWS = [
    a_row("drop_28", 0.7, 0.18),
    a_row("w8a8", 0.99, 0.31, 0.02),
    a_row("$x$ 한국어", 0.9, 0.05, math.nan),
    a_row("<b>bold</b>", 0.4, -0.2, 0.0),
]


@pytest.fixture(scope="module")
def found(pico_llama):
    nothing = torch.zeros(0)
    influence = torch.tensor([0.9, 0.02, 0.04, 0.03, 0.5])
    return analyze.analysis_of(pico_llama, Calibration(influence, nothing, nothing, nothing, {}))


def draw(kind, path, found):
    if kind == "structure":
        return plots.plot_structure(found, path)
    if kind == "scores":
        return plots.plot_scores(ROWS, path)
    return plots.plot_shards([2.5, 3.0, 2.75], [2.75, 3.5, 2.5], path)


@pytest.mark.parametrize("kind", ["structure", "scores", "shards"])
def test_a_png_has_a_sensible_size_and_all_colors(kind, found, tmp_path):
    path = draw(kind, tmp_path / "new" / "plot.png", found)
    assert path == tmp_path / "new" / "plot.png"
    assert os.listdir(path.parent) == ["plot.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        width, height = image.size
        pixels = np.asarray(image.convert("RGB"))
    assert 1000 <= width <= 1600
    assert 600 <= height <= 1100
    assert 20_000 < path.stat().st_size < 500_000
    for color in (drawing.BLUE, drawing.ORANGE):  # both are drawn: a bar or a point of each
        wanted = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)])
        assert (np.abs(pixels.astype(int) - wanted).max(axis=-1) < 4).sum() > 30
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all(), "nothing is cut off at the edge"


@pytest.mark.parametrize("kind", ["structure", "scores", "shards"])
def test_html_needs_no_other_file_and_shows_the_values(kind, found, tmp_path):
    path = draw(kind, tmp_path / "plot.html", found)
    assert os.listdir(tmp_path) == ["plot.html"]
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"<script[^>]*\ssrc=|<link[^>]*\shref=|@import", page)
    assert '"showSendToCloud": false' in page
    data = page[page.rindex("Plotly.newPlot(") :]
    assert not re.search("https?://", data.replace("https://plot.ly", "", 1))
    wanted = {
        "structure": ["Size by part", "q_proj", "Importance by layer", "goes as number 1"],
        "scores": ["drop_28", "baseline", "SpeedNorm", "PerfNorm"],
        "shards": ["nats per token", "+0.1667"],
    }[kind]
    for text in wanted:
        assert text in data
    assert "<b>bold" not in data.replace("\\u003c", "<"), "a name is text, not markup"


def test_structure_without_importance_is_one_panel(pico_llama, tmp_path):
    found = analyze.analysis_of(pico_llama)
    path = plots.plot_structure(found, tmp_path / "plot.png")
    with Image.open(path) as image:
        assert image.size[1] < 600
    page = plots.plot_structure(found, tmp_path / "plot.html").read_text(encoding="utf-8")
    assert "block influence" not in page[page.rindex("Plotly.newPlot(") :]


def test_lines_of_equal_score_are_lines_of_equal_score():
    x, y = (-0.1, 0.4), (0.3, 1.1)
    levels = scores_plot._levels(x, y, (0.5, 0.5))
    assert levels == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    drawn = 0
    for weights in ((0.5, 0.5), (0.8, 0.2), (1.0, 0.0), (0.0, 1.0)):
        for level in scores_plot._levels(x, y, weights):
            line = scores_plot._line(level, x, y, weights)
            for speed, perf in line or ():
                drawn += 1
                assert weights[0] * perf + weights[1] * speed == pytest.approx(level)
                assert x[0] <= speed <= x[1]
                assert y[0] <= perf <= y[1]
    assert drawn > 30


def test_every_model_its_errors_and_the_baseline_are_in_the_window():
    (left, right), (low, high) = scores_plot._window(scores_plot.points_of(ROWS))
    assert left < -0.2
    assert right > 0.31 + 0.02
    assert low < 0.4
    assert high > 0.99 + 0.02
    assert left < 0 < right
    assert low < 1 < high


def test_labels_cover_neither_each_other_nor_the_edge():
    """Twelve models on one spot: each name can still be read."""
    rows = [a_row(f"model_{n}", 0.7 + n / 1e4, 0.18, score=0.44) for n in range(12)]
    figure = scores_plot._scores_png(scores_plot.points_of(rows), None, (0.5, 0.5))
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts if text.get_text().startswith(("model_", "baseline"))]
    assert len(boxes) == 13
    for place, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 + 1
        assert box.x1 - 1 <= axes.bbox.x1
        assert all(labels.overlap(box, other) < 1 for other in boxes[:place])


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ROWS[:1],
        [Row("broken", "", failure="NotFinite", reason="its loss")],
        [a_row("nan", 0.7, 0.1, score=math.nan)],
    ],
    ids=["none", "one", "failed", "not finite"],
)
def test_few_or_no_models_are_drawn_too(rows, tmp_path):
    assert plots.plot_scores(rows, tmp_path / "plot.png").stat().st_size > 10_000


def test_the_baseline_among_the_models_is_named_once():
    points = scores_plot.points_of([*ROWS, a_row("baseline", 1.0, 0.0)])
    (axes,) = scores_plot._scores_png(points, None, (0.5, 0.5)).axes
    assert [text.get_text() for text in axes.texts].count("baseline  0.500") == 1


@pytest.mark.parametrize("name", ["plot.svg", "plot", "plot.PNG.jpg"])
def test_another_suffix_is_refused_and_nothing_is_written(name, tmp_path):
    with pytest.raises(UsageError, match=r"choose a name that ends in \.png or \.html") as caught:
        plots.plot_scores(ROWS, tmp_path / "new" / name)
    assert caught.value.exit_status == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("base", "model"), [([], []), ([1.0], [1.0, 2.0])])
def test_shards_that_do_not_match_are_refused(base, model, tmp_path):
    with pytest.raises(UsageError, match="measure both on the same shards"):
        plots.plot_shards(base, model, tmp_path / "plot.png")
    assert os.listdir(tmp_path) == []


def test_one_shard_has_no_error(tmp_path):
    assert shards_plot._verdict([0.25]) == "Model − baseline: +0.2500 nats per token on average"
    assert shards_plot._verdict([0.1, 0.3]) == "Model − baseline: +0.2000 ± 0.1000 nats per token on average"
    plots.plot_shards([1.0], [1.25], tmp_path / "plot.png")


def test_a_place_that_cannot_be_written_is_one_line_and_the_old_plot_stays(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="nothing was changed there"):
        plots.plot_scores(ROWS, tmp_path / "file" / "plot.png")
    path = tmp_path / "plot.png"
    path.write_text("old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(UsageError, match="No space left on device"):
        plots.plot_scores(ROWS, path)
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "plot.png"]


def test_drawing_leaves_no_global_state(tmp_path):
    import sys

    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.plot_scores(ROWS, tmp_path / "plot.png")
    assert dict(matplotlib.rcParams) == before
    assert "tkinter" not in sys.modules


def test_the_model_that_the_goal_prefers_stands_out(tmp_path):
    """The color of each point, in the order of the rows, is in the page."""

    def colors(best):
        text = plots.plot_scores(ROWS, tmp_path / "plot.html", best=best).read_text()
        found = re.search(r'"color":\[("#[^\]]*")\]', text)
        return json.loads(f"[{found[1]}]")

    by_score, by_goal = colors(None), colors(ROWS[-1].name)
    assert by_score.count(drawing.ORANGE) == by_goal.count(drawing.ORANGE) == 1
    assert by_goal[-1] == drawing.ORANGE
