"""The rungs of a trial, each reported to Optuna as an intermediate value, which dashboards draw.

    step            value
    0               the forecast value, where both tables are there or it is known without them
    1 … S           each shard of the full screen, see `search.study.screening`
    S + 1           the value by the cheap screen, for plans whose own repair or rounding takes long
    S + 2           the mean over the shards of the full screen; where the goal is time or size, the predicted value
    S + 3           the measured value, by default the Score

Pruners see the shards alone. A pruned trial has the value of the last step that it reached.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.config.study_file import Pruner

FORECAST = 0


def cheap(shards: int) -> int:
    """Return the step of the cheap screen."""
    return shards + 1


def screened(shards: int) -> int:
    """Return the step of the mean over the shards."""
    return shards + 2


def measured(shards: int) -> int:
    """Return the step of the measured Score."""
    return shards + 3


def of_shards(values: Mapping[int, float], shards: int) -> dict[int, float]:
    """Return the values of the shards alone, by step."""
    return {step: value for step, value in values.items() if 1 <= step <= shards}


class ShardsAlone(optuna.pruners.BasePruner):
    """Asks another pruner, which sees the shards of the full screen and no other rung.

    Args:
        pruner: The other pruner.
        shards: The number of shards.
    """

    def __init__(self, pruner: optuna.pruners.BasePruner, shards: int) -> None:
        self._pruner, self._shards = pruner, shards

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return whether the trial is to be pruned."""
        seen = copy.copy(trial)
        seen.intermediate_values = of_shards(trial.intermediate_values, self._shards)
        return self._pruner.prune(study, seen)


def are_running_means(settings: Pruner) -> bool:
    """Return whether running means of the shards are reported, which the pruner compares.

    Wilcoxon pairs the value of each shard.
    """
    return settings.name in ("median", "hyperband")


def learnt(trial: FrozenTrial, shards: int, *, running_mean: bool) -> float | None:
    """Return what a finished trial says about its plan's Score beyond the forecast; None if nothing.

    Args:
        trial: The trial.
        shards: The number of shards of the full screen.
        running_mean: Whether shards were reported as running means.
    """
    if trial.state == TrialState.COMPLETE:
        return trial.value
    if trial.state != TrialState.PRUNED:
        return None
    by_shard = of_shards(trial.intermediate_values, shards)
    if by_shard:
        values = [by_shard[step] for step in sorted(by_shard)]
        return values[-1] if running_mean else math.fsum(values) / len(values)
    return trial.intermediate_values.get(cheap(shards))
