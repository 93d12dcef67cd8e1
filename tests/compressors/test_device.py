"""Test the dtype that a device computes in."""

import torch

from compressors.device import compute_dtype


def test_only_a_cpu_computes_in_float32_whatever_the_models_dtype_is():
    assert compute_dtype("cpu") is torch.float32
    assert [compute_dtype(device) for device in ("cuda", "cuda:1", "mps")] == [None, None, None]
