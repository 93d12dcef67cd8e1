"""Samplers and pruners, made from the study file."""

from __future__ import annotations

import numpy as np
import optuna

from search.config.study_file import Pruner, Sampler


def sampler(settings: Sampler, seed: int, worker: int, done: int) -> optuna.samplers.BaseSampler:
    """The sampler for a worker's next trial.

    Seeded anew for every trial from what is in the storage (`done` finished trials), not from a generator's
    state in memory: a study that was killed draws what it would have drawn.
    """
    drawn = int(np.random.SeedSequence([seed, worker, done]).generate_state(1)[0])
    if settings.name == "random":
        return optuna.samplers.RandomSampler(seed=drawn)
    return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=settings.n_startup_trials)


def pruner(settings: Pruner, shards: int) -> optuna.pruners.BasePruner:
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


def wants_running_mean(settings: Pruner) -> bool:
    """Wilcoxon pairs the raw value of each shard; the others compare one curve with another."""
    return settings.name in ("median", "hyperband")
