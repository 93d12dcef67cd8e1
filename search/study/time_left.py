"""Estimates how long a study will still take, from how far its trials came and how long each stage took."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial

from search.study.trials import is_base_model

ENOUGH = 3  # suggested trials from which on the queued ones, which are all measured, no longer count


@dataclasses.dataclass(frozen=True)
class TimeLeft:
    """TimeLeft holds the estimate for the trials that are missing.

    Attributes:
        seconds: The time until the last of them has ended.
        stages: The mean seconds of each stage, and the share of the trials that reach it.
    """

    seconds: float
    stages: Mapping[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self)


def estimate(done: Sequence[FrozenTrial], trials: int, workers: int, limit_s: float = math.inf) -> TimeLeft | None:
    """Return the time that the missing trials will take; None before a trial has shown how long stages take.

    A stage counts with the share of trials that reach it: most end at the screen, and few are measured.

    Args:
        done: The finished trials.
        trials: The number of finished trials that the study is to hold.
        workers: The number of trials that run at once.
        limit_s: The seconds after which no trial begins.
    """
    told = [trial for trial in done if "seconds" in trial.user_attrs and not is_base_model(trial)]
    suggested = [trial for trial in told if "fixed_params" not in trial.system_attrs]
    counted = suggested if len(suggested) >= ENOUGH else told
    if not counted:
        return None
    spent: dict[str, list[float]] = {}
    for trial in told:
        for stage, seconds in trial.user_attrs["seconds"].items():
            spent.setdefault(stage, []).append(float(seconds))
    stages = {}
    for stage, seconds in spent.items():
        share = sum(stage in trial.user_attrs["seconds"] for trial in counted) / len(counted)
        stages[stage] = (sum(seconds) / len(seconds), share)
    each = sum(mean * share for mean, share in stages.values())
    return TimeLeft(min(each * max(trials - len(done), 0) / workers, limit_s), stages)
