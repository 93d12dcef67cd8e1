"""Refuses a study file that does not fit the stored study, before anything slow is imported or read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from compressors.plan import DIMENSIONS
from search.config.study_file import StudyFile
from search.setup.definition import filled, of_file
from search.study import storage

LATER = ("model", "score", "evaluation")  # sections to which model, tasks and machine add entries
NAMED_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?")  # a hub id, or the embedded model


def refuse_another_definition(file: StudyFile) -> None:
    """Compare the study file with the stored study, as far as the file alone decides its definition.

    What the file may have wrong in itself, such as a model that is not there, is left to what checks it.

    Raises:
        StudyMismatch: The study was created with another definition.
        StorageError: The storage can't be used.
    """
    if not storage.exists(file.storage):
        return
    opened = storage.open_storage(file.storage)
    try:
        study = optuna.load_study(storage=opened, study_name=file.study_name)
    except KeyError:
        return
    stored = study.user_attrs.get("definition")
    if stored is None:
        return  # another program's, which is refused later
    asked = filled(of_file(file))
    _leave_to_others(asked, file, study)
    known_later = {name: {**stored.get(name, {}), **asked[name]} for name in LATER if name in asked}
    storage.require_same(
        file.study_name,
        {**stored, **_read_from(study.user_attrs.get("file", {}))},
        {**stored, **asked, **known_later, **_read_from(file.model_dump(mode="json"))},
    )


def _read_from(file: Mapping[str, Any]) -> dict[str, Any]:
    """Return what changes the digests of a definition whatever the texts are."""
    text, parts = file.get("text", {}), file.get("evaluation", {}).get("perf", [])
    windows = text.get("shards", 0) * text.get("windows_per_shard", 1)
    return {
        "text": {"window": text.get("window"), "shards × windows_per_shard": windows},
        "perf": sorted(part.get("metric") for part in parts),
    }


def _leave_to_others(asked: dict[str, Any], file: StudyFile, study: optuna.Study) -> None:
    """Take out what may be wrong in itself, which is the better thing to tell."""
    source = file.model.source
    if not (Path(source).is_dir() or NAMED_MODEL.fullmatch(source)):
        del asked["model"]
    stored = study.user_attrs.get("file", {}).get("space", {})
    for name in DIMENSIONS:
        high = (stored.get(name) or {}).get("high") if isinstance(stored.get(name), dict) else stored.get(name)
        size = asked["space"].get(name)
        if isinstance(size, int) and (high is None or size > high):  # perhaps more than the model has
            asked["space"][name] = study.user_attrs.get("definition", {}).get("space", {}).get(name)
