"""Fixtures: each family's model in turn, for tests that hold for every family."""

import pytest

from compressors.model import family
from compressors.model.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def base(pico):
    return Checkpoint.read(pico)


@pytest.fixture(scope="module")
def its_family(base):
    return family.family_of(base)
