"""What is believed of plans: the study's forecast, and a Gaussian process of its error that trials teach.

Each quantity that the goal optimizes or bounds has a process of its own. A size is known from shapes and has none.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from compressors.plan import CompressionPlan
from evaluator.score import Score
from search.setup.goal import Goal, Known
from search.stages.forecast import Forecast
from search.study import rungs

LEARNS_FROM = 3  # trials, before anything but the forecast counts
UNITS = {"score": 0.02, "perf_norm": 0.04, "speed_norm": 0.04}  # in which the forecast's error is about 1
NOISE = 0.1  # of an observation, in these units
LEAST_ERROR = 1e-6
TIE = 1e-9  # the weight of the improvement where only feasibility counts

Params = dict[str, Any]
Both = tuple[NDArray[np.float64], NDArray[np.float64]]  # means and standard errors, an entry for each candidate


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a trial has taught of a quantity: its parameters, the forecast's error in UNITS, the quantity itself."""

    params: Params
    error: float
    value: float


def quantities(goal: Goal) -> list[str]:
    """Return what is forecast with an error, of what the goal optimizes or bounds."""
    names = [goal.objective, *(bound.quantity for bound in goal.bounds)]
    return [name for name in map(_own_name, names) if name != "size"]


def _own_name(quantity: str) -> str:
    return "speed_norm" if quantity == "time_per_token" else quantity


def observed(
    quantity: str,
    trials: Sequence[FrozenTrial],
    forecast: Forecast,
    plan_of: Callable[[Params], CompressionPlan],
) -> list[Observation]:
    """Return what finished trials teach of a quantity, those pruned at the screen among them.

    Args:
        quantity: One of UNITS.
        trials: The trials, which have a value for all that is searched.
        forecast: The study's forecast.
        plan_of: The plan of a trial's parameters.
    """
    found, shards = [], len(forecast.setting.texts.shards)
    running_mean = rungs.are_running_means(forecast.setting.file.pruner)
    for trial in trials:
        value = learnt(quantity, trial, forecast.setting.goal, shards, running_mean=running_mean)
        if value is not None:
            expected = getattr(forecast.expected(plan_of(trial.params)), quantity)
            found.append(Observation(trial.params, (value - expected) / UNITS[quantity], value))
    return found


def learnt(quantity: str, trial: FrozenTrial, goal: Goal, shards: int, *, running_mean: bool) -> float | None:
    """Return what a finished trial says about a quantity of its plan beyond the forecast; None if nothing."""
    if quantity == "score":
        return rungs.learnt(trial, shards, running_mean=running_mean)
    known = trial.user_attrs
    if trial.state == TrialState.COMPLETE:
        value: float | None = known.get(quantity)
        return value
    if trial.state != TrialState.PRUNED or quantity != "perf_norm":
        return None
    if "loss" in known:
        return math.exp(-known["loss"])
    return _by_cheap_screen(trial, goal, shards) if "cheap_loss" in known else None


def _by_cheap_screen(trial: FrozenTrial, goal: Goal, shards: int) -> float | None:
    """Return the PerfNorm that was expected of a trial that ended after its cheap screen."""
    if goal.objective == "perf_norm":
        return trial.intermediate_values.get(rungs.cheap(shards))
    least, missed = goal.bound("perf_norm"), trial.constraints.get("perf_norm")
    return None if least is None or missed is None else least - missed


@dataclasses.dataclass(frozen=True)
class Beliefs:
    """Beliefs about plans of one study.

    Attributes:
        forecast: The study's forecast.
        goal: What the study searches for.
        plan_of: The plan of a candidate.
        residuals: The process of each quantity of which enough was seen.
    """

    forecast: Forecast
    goal: Goal
    plan_of: Callable[[Params], CompressionPlan]
    residuals: Mapping[str, Residual]

    @functools.cached_property
    def _expected(self) -> Callable[[CompressionPlan], Score]:
        return functools.cache(self.forecast.expected)

    def of(self, quantity: str, candidates: Sequence[Params]) -> Both:
        """Return the mean and the standard error of a quantity, larger for better plans, for each candidate."""
        if quantity == "size":
            sizes = [self.forecast.setting.size_ratio(self.plan_of(params)) for params in candidates]
            return 1.0 - np.array(sizes), np.full(len(sizes), LEAST_ERROR)
        name = _own_name(quantity)
        expected = [self._expected(self.plan_of(params)) for params in candidates]
        mean = np.array([getattr(each, name) for each in expected])
        error = np.array([getattr(each, f"{name}_se") for each in expected])
        if name in self.residuals:
            residual, spread = self.residuals[name].predict(candidates)
            # of PerfNorm and SpeedNorm the forecast's own error is learnt as well (`search.study.taught`): a bound is
            # not to be ruled out by a process that has seen three trials, nor a Score by trials that were not timed
            untimed = self.forecast.setting.formula.weight_speed * np.array([each.speed_norm_se for each in expected])
            least = untimed if name == "score" else error
            mean, error = mean + UNITS[name] * residual, np.maximum(UNITS[name] * spread, least)
        return mean, np.maximum(error, LEAST_ERROR)

    def worth(self, candidates: Sequence[Params], best: float | None) -> NDArray[np.float64]:
        """Return the expected improvement over a value, times the probability that the bounds are reached.

        Where nothing reaches them yet, that probability alone counts (Gardner et al. 2014, Bayesian optimization with
        inequality constraints, https://proceedings.mlr.press/v32/gardner14.html).

        Args:
            candidates: The candidates.
            best: The best feasible trial's value; None without one.
        """
        mean, error = self.of(self.goal.objective, candidates)
        gain = (mean - (best or 0.0)) / error
        density = np.exp(-gain * gain / 2) / math.sqrt(2 * math.pi)
        improvement: NDArray[np.float64] = error * (gain * ndtr(gain) + density)
        if not self.goal.bounds:
            return improvement
        chance = np.ones(len(mean))
        for bound in self.goal.bounds:
            its_mean, its_error = self.of(bound.quantity, candidates)
            chance = chance * ndtr((its_mean - bound.least) / its_error)
        return chance + TIE * improvement if best is None else chance * improvement

    def known(self, candidates: Sequence[Params]) -> list[Known]:
        """Return what is believed of each candidate, in place of what is forecast.

        Where tasks count, the error of what text tells of Perf is inf: no plan is ruled out by it.
        """
        plans = [self.plan_of(params) for params in candidates]
        scores = [self._expected(plan) for plan in plans]
        for name in quantities(self.goal):
            means, errors = self.of(name, candidates)
            if self.forecast.setting.tasks and name != "speed_norm":
                errors = np.full(len(errors), math.inf)
            scores = [
                dataclasses.replace(score, **{name: float(mean), f"{name}_se": float(error)})
                for score, mean, error in zip(scores, means, errors, strict=True)
            ]
        sizes = self.forecast.setting.size_ratio if self.goal.objective == "size" else lambda plan: math.nan
        return [Known(score, sizes(plan)) for score, plan in zip(scores, plans, strict=True)]


@dataclasses.dataclass(frozen=True)
class Residual:
    """A Gaussian process of the forecast's error over the searched values, scaled to [0, 1]."""

    regressor: Any
    search_space: Mapping[str, BaseDistribution]

    @classmethod
    def fitted(cls, observed: Sequence[Observation], search_space: Mapping[str, BaseDistribution]) -> Residual:
        """Return the process that has seen these trials."""
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern

        kernel = ConstantKernel(1.0, (0.05, 100.0)) + ConstantKernel(1.0, (0.05, 100.0)) * Matern(
            1.0, (0.3, 5.0), nu=2.5
        )
        regressor = GaussianProcessRegressor(kernel, alpha=NOISE**2, random_state=0)
        points = _points([each.params for each in observed], search_space)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bound that is reached is no concern of the user's
            regressor.fit(points, [each.error for each in observed])
        return cls(regressor, search_space)

    def predict(self, candidates: Sequence[Params]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the mean and the standard deviation of the error of each candidate, in units of UNITS."""
        mean, spread = self.regressor.predict(_points(candidates, self.search_space), return_std=True)
        return mean, spread


def _points(candidates: Sequence[Params], search_space: Mapping[str, BaseDistribution]) -> NDArray[np.float64]:
    """Return the candidates as points: a number in [0, 1], a category as one column for each choice."""
    columns = []
    for name, searched in search_space.items():
        values = [params[name] for params in candidates]
        if isinstance(searched, IntDistribution):
            span = max(searched.high - searched.low, 1)
            columns.append([(value - searched.low) / span for value in values])
        elif isinstance(searched, CategoricalDistribution):
            columns += [[0.7 * (value == choice) for value in values] for choice in searched.choices]
    return np.array(columns, dtype=float).T
