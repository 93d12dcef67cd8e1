"""Creates the samplers and pruners that a study file names."""

from __future__ import annotations

import numpy as np
import optuna

from search.config.study_file import Pruner, Sampler
from search.stages.forecast import Forecast
from search.study.forecast_sampler import ForecastSampler


def sampler(
    settings: Sampler, seed: int, worker: int, done: int, forecast: Forecast | None = None
) -> optuna.samplers.BaseSampler:
    """Return the sampler for a worker's next trial.

    Every trial gets a new seed, derived from what the storage holds. A killed study therefore draws the same values
    when it is resumed as it would have drawn otherwise.

    Args:
        settings: The sampler's section of the study file.
        seed: The seed of the study.
        worker: The number of the worker, from 0.
        done: The number of finished trials.
        forecast: The study's forecast, for the sampler `forecast`; without it that samples at random.
    """
    drawn = int(np.random.SeedSequence([seed, worker, done]).generate_state(1)[0])
    if settings.name == "forecast" and forecast is not None:
        return ForecastSampler(forecast, drawn)
    if settings.name == "gp":
        return optuna.samplers.GPSampler(seed=drawn, n_startup_trials=settings.n_startup_trials)
    if settings.name in ("random", "forecast"):
        return optuna.samplers.RandomSampler(seed=drawn)
    return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=settings.n_startup_trials)


def pruner(settings: Pruner, shards: int) -> optuna.pruners.BasePruner:
    """Return the pruner of a study whose search text has this number of shards."""
    if settings.name == "wilcoxon":
        return optuna.pruners.WilcoxonPruner(p_threshold=settings.p_threshold, n_startup_steps=settings.n_startup_steps)
    if settings.name == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=settings.n_startup_trials, n_warmup_steps=settings.n_startup_steps, n_min_trials=2
        )
    if settings.name == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=max(1, settings.n_startup_steps),
            max_resource=shards,
            reduction_factor=settings.reduction_factor,
        )
    return optuna.pruners.NopPruner()
