"""Learns from a study's trials how far its forecast is off."""

from __future__ import annotations

import math
from collections.abc import Sequence

from optuna.trial import FrozenTrial

from search.stages.forecast import Forecast


def taught(forecast: Forecast, everything: Sequence[FrozenTrial]) -> Forecast:
    """Return the forecast with the errors that the trials of a study have shown so far."""
    losses, ratios = [], []
    for trial in everything:
        known = trial.user_attrs
        if "forecast_perf_norm" in known and "loss" in known:
            losses.append((-math.log(known["forecast_perf_norm"]), known["loss"]))
        if "forecast_speed_norm" in known and "speed_norm" in known:
            ratios.append((1.0 - known["forecast_speed_norm"], 1.0 - known["speed_norm"]))
    return forecast.taught(losses, ratios) if losses else forecast
