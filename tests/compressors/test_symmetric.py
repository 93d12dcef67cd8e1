"""Symmetric matrices are packed into half of their numbers without a loss."""

import pytest
import torch

from compressors.statistics.symmetric import pack, packed_size, unpack


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 64])
def test_a_symmetric_matrix_comes_back_bit_for_bit(width):
    matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(width))
    matrix = matrix + matrix.T
    before = matrix.clone()
    packed = pack(matrix)
    assert torch.equal(matrix, before)
    assert packed.shape == (packed_size(width),)
    assert torch.equal(unpack(packed, width), matrix)


def test_half_of_the_numbers_are_kept():
    assert packed_size(8960) == 8960 * 8961 // 2
    assert packed_size(9) <= 9 * 10 // 2 + 5
