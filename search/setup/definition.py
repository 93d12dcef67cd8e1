"""The part of a study's definition that its study file alone decides. Imports no torch, so that it is quick to ask."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from compressors.plan import OPTIONS
from search.config.space_section import Space
from search.config.study_file import StudyFile
from search.setup.goal import Goal

OLDER = {"goal": str(Goal())}  # entries that a definition leaves out where they hold this: studies may be older


def of_file(file: StudyFile) -> dict[str, Any]:
    """Return what must not change under a study's name, as far as the study file alone says it; JSON values.

    `search.setup.keys.definition` adds what depends on the model, the texts and the machine.
    """
    evaluation = file.evaluation
    values: dict[str, Any] = {
        "model": {"source": file.source_shown},
        "space": searched(file.space),
        "max_size_mb": file.limits.max_size_mb,
        "score": {**file.score.weights, **({"length": "penalise"} if file.score.length == "penalise" else {})},
        "evaluation": {
            "workload": evaluation.workload.of_kind,
            "speed": evaluation.speed,
            "compile": evaluation.compile,
        },
        "pruner": file.pruner.name,  # decides what is reported: raw shards, or running means
    }
    goal = Goal.of(file.goal)
    if not goal.is_default:
        values["goal"] = str(goal)
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def filled(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return a definition with the entries that were left out, so that two can be compared."""
    whole = {**OLDER, **definition}
    evaluation = whole.get("evaluation", {})
    if "workload" in evaluation:
        whole["evaluation"] = {**evaluation, "workload": {"kind": "decode", **evaluation["workload"]}}
    return whole


def searched(space: Space) -> dict[str, Any]:
    """Return the space without its integer ranges, which may change when a study is resumed."""
    found = {}
    for name, value in space.model_dump().items():
        if name in OPTIONS and value in (OPTIONS[name], [OPTIONS[name]]):
            continue  # a choice that is not searched is left out, and studies may be older than it
        found[name] = "searched" if isinstance(value, dict) else value
    return found
