"""The part of a study's definition that its study file alone decides. Imports no torch, so that it is quick to ask."""

from __future__ import annotations

import json
from typing import Any

from compressors.plan import OPTIONS
from search.config.study_file import Space, StudyFile


def of_file(file: StudyFile) -> dict[str, Any]:
    """Return what must not change under a study's name, as far as the study file alone says it; JSON values.

    `search.setup.keys.definition` adds what depends on the model, the texts and the machine.
    """
    evaluation = file.evaluation
    values = {
        "model": {"source": file.source_shown},
        "space": searched(file.space),
        "max_size_mb": file.limits.max_size_mb,
        "score": file.score.model_dump(),
        "evaluation": {
            "workload": evaluation.workload.model_dump(),
            "speed": evaluation.speed,
            "compile": evaluation.compile,
        },
        "pruner": file.pruner.name,  # decides what is reported: raw shards, or running means
    }
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def searched(space: Space) -> dict[str, Any]:
    """Return the space without its integer ranges, which may change when a study is resumed."""
    found = {}
    for name, value in space.model_dump().items():
        if name in OPTIONS and value in (OPTIONS[name], [OPTIONS[name]]):
            continue  # a choice that is not searched is left out, and studies may be older than it
        found[name] = "searched" if isinstance(value, dict) else value
    return found
