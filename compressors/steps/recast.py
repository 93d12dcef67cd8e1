"""Write the model as an architecture that vLLM serves, where its own can't hold these sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from compressors.choices import Value
from compressors.model.family import recast
from compressors.plan import CompressionPlan
from compressors.steps import Build

VERSIONS: Mapping[tuple[str, Value], str] = {}


def applies(plan: CompressionPlan, base: CompressionPlan) -> bool:
    """Say yes: whether anything has to change is the family's to know."""
    return True


def shapes(made: Build) -> Build:
    """Do what `run` does."""
    return run(made)


def run(made: Build) -> Build:
    """Write a Qwen2 whose hidden_size / heads is not its head_dim as the Llama that computes the same."""
    return dataclasses.replace(made, checkpoint=recast(made.checkpoint, made.family))
