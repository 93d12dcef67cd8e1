"""Writes the lines with which a run begins: what is searched, on what, and where it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressors.plan import short
from evaluator.metrics import short_count
from search import secrets
from search.config.study_file import StudyFile
from search.setup.setting import Setting
from search.study import space

NAMES_SHOWN = 3  # files of a text that are named


def lines(setting: Setting, finished: int, dashboard: str) -> list[str]:
    """Return the lines.

    Args:
        setting: What the study shares.
        finished: The number of finished trials that the storage holds.
        dashboard: The command that shows the study.
    """
    file, model, machine = setting.file, setting.model, setting.machine
    base = model.checkpoint
    speed = "timed in turn with the base model" if file.evaluation.is_timed else "speed predicted"
    dimensions = space.searched(file.space)
    count, exact = space.count_plans(file.space, model.identity)
    plans = f"{'' if exact else 'up to '}{count:,} plan{'' if count == 1 else 's'}"
    rows = {
        f"study {file.study_name}": f"{file.trials} trials, {finished} finished",
        "model": f"{file.source_shown}: {short(model.identity)}, {short_count(base.total_parameters)} parameters, "
        f"{base.size_bytes / 1e6:.1f} MB",
        "space": f"{plans}: {', '.join(dimensions)}" if dimensions else f"{plans}: nothing is searched",
        **({} if setting.goal.is_default else {"goal": str(setting.goal)}),
        "texts": _texts(file),
        "engine": f"{machine.backend} ({machine.engine_version}), {speed}",
        "device": f"{machine.device}, {machine.device_name}",
        "storage": secrets.masked(file.storage),
        "dashboard": secrets.masked(dashboard),
    }
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def _texts(file: StudyFile) -> str:
    text = file.text
    return (
        f"calibration {_named(text.calibration)}; search {_named(text.search)}, {text.shards} shards of "
        f"{text.windows_per_shard} × {text.window} tokens"
    )


def _named(names: Sequence[str] | Mapping[str, float] | str) -> str:
    if isinstance(names, str):
        return names
    if isinstance(names, Mapping):
        names = [f"{name} × {weight:g}" for name, weight in names.items()]
    more = [f"and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else []
    return ", ".join([*names[:NAMES_SHOWN], *more])
