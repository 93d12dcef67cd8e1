"""Learns from a study's trials how far its forecast is off."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial

from compressors.plan import CompressionPlan
from search.stages.forecast import Forecast
from search.study.trials import finished


def taught(forecast: Forecast, everything: Sequence[FrozenTrial]) -> Forecast:
    """Return the forecast with the errors that the trials of a study have shown so far.

    A trial that was stopped does not count: it is tried again, and would count twice.
    """
    losses, ratios = [], []
    for trial in finished(list(everything)):
        known = trial.user_attrs
        if "loss" in known and "plan" in known and forecast.damage is not None:
            losses.append((forecast.damage.loss(CompressionPlan.from_dict(known["plan"]))[0], known["loss"]))
        if "forecast_speed_norm" in known and "speed_norm" in known:
            ratios.append((1.0 - known["forecast_speed_norm"], 1.0 - known["speed_norm"]))
    return forecast.taught(losses, ratios)
