"""Engines side by side: all are ready, all end, and one that is still starting when they are closed ends too."""

import dataclasses
import os
import threading
from pathlib import Path

import pytest

from search.config import compose
from search.setup import setting as settings
from search.stages import side_by_side
from search.stages.engines import Engines
from search.stages.side_by_side import Ahead, SideBySide
from tests.waiting import AT_ONCE_S, LONG_S, until

STUDY = """
defaults: [_base, _self_]
study_name: side-by-side
storage: sqlite:///{home}/studies.db
outputs: {home}/outputs
model: {{source: {model}}}
text: {{calibration: embedded, window: 32, shards: 4, calibration_windows: 4, report: null}}
evaluation: {{backend: transformers, workload: {{turns: 4, decode_steps: 4, prompt_tokens: 4}}}}
tracking: {{mlflow: false}}
"""


@pytest.fixture
def prepared(tmp_path, pico_llama):
    (tmp_path / "side-by-side.yaml").write_text(STUDY.format(home=tmp_path, model=pico_llama))
    return settings.prepare(compose.load("side-by-side", config_dir=tmp_path))


def plans(prepared):
    own = prepared.model.identity
    return [dataclasses.replace(own, num_hidden_layers=layers) for layers in (2, 3)]


def gone(pids):
    """Whether no process is left within a while, and no zombie either."""
    return until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), AT_ONCE_S)


def test_every_plan_gets_an_engine_of_its_shape_and_nothing_is_left(prepared):
    with Engines(prepared) as engines:
        with SideBySide(prepared, engines, plans(prepared)) as group:
            running = group.ready(pytest.fail)
            assert len({engine.pid for engine in running}) == 2
            assert all(engine.decode_steps(1, 4, 2, 0) for engine in running)
            assert len(list((prepared.outputs / "forecast").glob("probes-*/*/*/config.json"))) == 2
            pids = [engine.pid for engine in running]
        assert gone(pids)
    assert not list((prepared.outputs / "forecast").glob("probes-*"))


def test_an_engine_that_is_closed_while_it_starts_ends(prepared, monkeypatch):
    started, closed = [], threading.Event()
    with Engines(prepared) as engines:
        start = engines.start

        def slow(*arguments, **options):
            engine = start(*arguments, **options)
            started.append(engine.pid)
            assert closed.wait(LONG_S)
            return engine

        monkeypatch.setattr(engines, "start", slow)
        group = SideBySide(prepared, engines, plans(prepared))
        assert until(lambda: len(started) == 2)
        group.close()
        closed.set()
        assert group.ready(pytest.fail) == [None, None]
        assert gone(started)


def test_a_plan_that_cannot_be_built_leaves_the_others(prepared):
    own = prepared.model.identity
    impossible = dataclasses.replace(own, num_hidden_layers=own.num_hidden_layers + 1)
    told = []
    with (
        Engines(prepared) as engines,
        SideBySide(prepared, engines, [impossible, *plans(prepared)]) as group,
    ):
        first, *others = group.ready(told.append)
        assert first is None
        assert all(engine is not None and engine.alive for engine in others)
    assert len(told) == 1
    assert "layers" in told[0]


def test_without_a_gpu_ahead_starts_the_base_model_alone(prepared):
    with Engines(prepared) as engines:
        with Ahead(prepared, engines, plans(prepared)) as ahead:
            assert ahead.take() is None
        assert engines.baseline().alive
        assert os.path.exists(f"/proc/{engines.baseline().pid}")


def test_what_fits_is_counted_by_each_plan_s_own_size(prepared, monkeypatch):
    on_gpu = dataclasses.replace(prepared, machine=dataclasses.replace(prepared.machine, device="cuda"))
    two, three = (prepared.model.checkpoint.size_bytes * prepared.size_ratio(plan) for plan in plans(prepared))
    engine = side_by_side.engine_bytes(on_gpu)
    for room, expected in ((engine, 0), (two + engine, 1), (two + three + 2 * engine, 2), (two + three + engine, 1)):
        monkeypatch.setattr(side_by_side, "room_on_gpu", lambda room=room: room)
        assert side_by_side.fitting(on_gpu, plans(prepared)) == expected
    assert side_by_side.fitting(on_gpu, plans(prepared), share=0.5) == 0


def test_without_a_gpu_the_machine_s_memory_decides_and_one_runs_in_any_case(prepared, monkeypatch):
    two, three = (prepared.model.checkpoint.size_bytes * prepared.size_ratio(plan) for plan in plans(prepared))
    engine = side_by_side.HOST_BYTES
    for room, expected in ((0, 1), (two + engine, 1), (two + three + 2 * engine + 1, 2)):
        monkeypatch.setattr(side_by_side, "room_on_host", lambda device, room=room: room)
        assert side_by_side.fitting(prepared, plans(prepared)) == expected
    assert side_by_side.fitting(prepared, []) == 0
