"""Test the dtype that a device computes in, and what is given back between two models."""

import gc
import weakref

import torch

from compressors.device import compute_dtype, release


def test_only_a_cpu_computes_in_float32_whatever_the_models_dtype_is():
    assert compute_dtype("cpu") is torch.float32
    assert [compute_dtype(device) for device in ("cuda", "cuda:1", "mps")] == [None, None, None]


def in_a_cycle():
    """A model that only the collector can free."""
    model = torch.nn.Linear(4, 4)
    model.itself = [model]
    return weakref.ref(model)


def test_a_model_in_a_cycle_is_freed_by_each_release():
    for _ in range(3):
        model = in_a_cycle()
        assert model() is not None
        release("cpu")
        assert model() is None


def test_what_was_imported_is_set_aside_but_not_while_an_error_may_hold_a_model(monkeypatch):
    monkeypatch.setattr("compressors.device._set_aside", {"modules": 0})
    gc.unfreeze()
    try:
        raise ValueError
    except ValueError:
        release("cpu")
        assert gc.get_freeze_count() == 0
    release("cpu")
    frozen = gc.get_freeze_count()
    assert frozen > 10_000
    release("cpu")  # nothing was imported since
    assert gc.get_freeze_count() <= frozen
