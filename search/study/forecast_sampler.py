"""A sampler that starts from the study's forecast and learns where it is wrong.

The error of the forecast is a Gaussian process over the searched values. Trials that were measured teach it, and so do
those that were pruned at a screen, by what they had until then. The next plan is the one with the largest expected
improvement (Jones, Schonlau and Welch 1998, https://doi.org/10.1023/A:1008306431147) among a random sample of the space
and the neighbours of its best.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import norm

from compressors.plan import CompressionPlan
from search.stages.forecast import SURE, Forecast
from search.study import front, rungs, space

DRAWN = 1000  # plans of the random sample
FRONT_OF = 400  # plans at random, and as many of the best, among which the front is looked for
ROUNDS, BEST = 3, 10  # of the neighbours of the best: how often, and of how many
LEARNS_FROM = 3  # trials, before anything but the forecast counts
UNIT = 0.02  # of Score, in which the forecast's error is about 1
NOISE = 0.1  # of an observation, in these units
NOTHING_LEFT = "nothing_left"  # the system attribute of a trial whose plan can't win, as no other can; it says why

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Observation:
    """What a trial has taught: its parameters, the forecast's error in units of UNIT, its Score."""

    params: Params
    error: float
    score: float


class ForecastSampler(optuna.samplers.BaseSampler):
    """Samples the plan of the largest expected improvement over the best trial.

    Args:
        forecast: The study's forecast.
        seed: The random seed of this trial.
        running_mean: Whether intermediate values are running means and not those of single shards.
    """

    def __init__(self, forecast: Forecast, seed: int, *, running_mean: bool = False) -> None:
        self._forecast, self._running_mean = forecast, running_mean
        self._random = np.random.default_rng(seed)
        self._independent = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return the whole search space of the study file."""
        setting = self._forecast.setting
        return space.distributions(setting.file.space, setting.model.identity)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Sample a parameter that `sample_relative` did not: at random."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> Params:
        """Return the values of the next plan; {} for a trial that was enqueued with its own.

        A plan that can't reach the best trial is proposed only if no other is left; the trial is marked NOTHING_LEFT.
        """
        if not search_space or "fixed_params" in trial.system_attrs:
            return {}
        trials = study.get_trials(deepcopy=False)
        tried = {self._plan(other.params) for other in trials if _complete(other, search_space)}
        observed = self.observations(trials, search_space)
        model = _Residual.fitted(observed, search_space) if len(observed) >= LEARNS_FROM else None
        values = [other.value for other in trials if other.state == TrialState.COMPLETE and other.value is not None]
        best = max(values, default=0.0)

        def worth(candidates: Sequence[Params]) -> NDArray[np.float64]:
            mean, error = self._beliefs(candidates, model)
            gain = (mean - best) / error
            improvement: NDArray[np.float64] = error * (gain * norm.cdf(gain) + norm.pdf(gain))
            return improvement

        candidates = (params for params in self._candidates(search_space, worth) if self._is_new(params, tried))
        first = next(candidates, None)
        if first is None:
            self._mark(study, trial, "every plan that was looked at was tried")
            return {}
        for params in itertools.chain([first], candidates):
            mean, error = self._beliefs([params], model)
            if mean[0] + SURE * error[0] >= best:
                return params
        mean, error = self._beliefs([first], model)
        self._mark(study, trial, f"the most promising one is forecast to score {mean[0]:.4f} ± {error[0]:.4f}")
        return first

    @staticmethod
    def _mark(study: optuna.Study, trial: FrozenTrial, why: str) -> None:
        study._storage.set_trial_system_attr(trial._trial_id, NOTHING_LEFT, why)

    def _is_new(self, params: Params, tried: Collection[CompressionPlan]) -> bool:
        plan = self._plan(params)
        return plan not in tried and self._forecast.setting.infeasible(plan) is None

    def best_plans(self, count: int) -> list[CompressionPlan]:
        """Return the feasible plans with the highest forecast Score, the best first."""
        return self._feasible(lambda plan: self._forecast.expected(plan).score, count)

    def front(self) -> list[CompressionPlan]:
        """Return the feasible plans on the forecast Pareto front of PerfNorm and SpeedNorm, by falling PerfNorm."""
        scored = [(plan, self._forecast.expected(plan)) for plan in self._feasible(lambda plan: 0.0, FRONT_OF)]
        scored += [(plan, self._forecast.expected(plan)) for plan in self.best_plans(FRONT_OF)]
        found = front.pareto(scored, lambda pair: (pair[1].perf_norm, pair[1].speed_norm))
        return [plan for plan, _ in found]

    def fastest(self) -> float:
        """Return the largest SpeedNorm that a feasible plan is forecast to have."""
        plans = self._feasible(lambda plan: -self._forecast.time_ratio(plan)[0], 1)
        return 1.0 - self._forecast.time_ratio(plans[0])[0] if plans else 0.0

    def _feasible(self, value: Callable[[CompressionPlan], float], count: int) -> list[CompressionPlan]:
        setting = self._forecast.setting
        search_space = space.distributions(setting.file.space, setting.model.identity)

        def worth(candidates: Sequence[Params]) -> NDArray[np.float64]:
            return np.array([value(self._plan(params)) for params in candidates])

        plans = dict.fromkeys(self._plan(params) for params in self._candidates(search_space, worth))
        return list(itertools.islice((plan for plan in plans if setting.infeasible(plan) is None), count))

    def observations(
        self, trials: Sequence[FrozenTrial], search_space: Mapping[str, BaseDistribution]
    ) -> list[Observation]:
        """Return what finished trials teach, those pruned at the screen among them."""
        observed, shards = [], len(self._forecast.setting.texts.shards)
        for trial in trials:
            value = rungs.learnt(trial, shards, running_mean=self._running_mean)
            if value is not None and _complete(trial, search_space):
                expected = self._forecast.expected(self._plan(trial.params))
                observed.append(Observation(trial.params, (value - expected.score) / UNIT, value))
        return observed

    def _plan(self, params: Mapping[str, Any]) -> CompressionPlan:
        setting = self._forecast.setting
        return space.plan_of(params, setting.file.space, setting.model.identity)

    def _beliefs(
        self, candidates: Sequence[Params], model: _Residual | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the Score that each candidate is believed to have, and its standard error."""
        expected = [self._forecast.expected(self._plan(params)) for params in candidates]
        mean = np.array([each.score for each in expected])
        error = np.array([each.score_se for each in expected])
        if model is not None:
            residual, spread = model.predict(candidates)
            mean, error = mean + UNIT * residual, UNIT * spread
        return mean, np.maximum(error, 1e-6)

    def _candidates(
        self, search_space: Mapping[str, BaseDistribution], worth: Callable[[Sequence[Params]], NDArray[np.float64]]
    ) -> list[Params]:
        """Return candidates, the most promising first."""
        pool = [{name: self._draw(each) for name, each in search_space.items()} for _ in range(DRAWN)]
        worths = worth(pool)
        for _ in range(ROUNDS):
            top = [pool[index] for index in np.argsort(-worths)[:BEST]]
            known = {tuple(params.items()) for params in pool}
            near = [params for start in top for params in _neighbours(start, search_space)]
            fresh = list({key: params for params in near if (key := tuple(params.items())) not in known}.values())
            if not fresh:
                break
            pool, worths = [*pool, *fresh], np.concatenate([worths, worth(fresh)])
        return [pool[index] for index in np.argsort(-worths, kind="stable")]

    def _draw(self, searched: BaseDistribution) -> Any:
        if isinstance(searched, IntDistribution):
            steps = (searched.high - searched.low) // searched.step
            return searched.low + int(self._random.integers(steps + 1)) * searched.step
        assert isinstance(searched, CategoricalDistribution)
        return searched.choices[int(self._random.integers(len(searched.choices)))]


def _complete(trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]) -> bool:
    """Return whether the trial has a value for all that is searched."""
    return all(name in trial.params for name in search_space)


def _neighbours(params: Params, search_space: Mapping[str, BaseDistribution]) -> list[Params]:
    """Return the parameters with one value changed: a number by a step or two, a category to any other."""
    near = []
    for name, searched in search_space.items():
        values: list[Any] = []
        if isinstance(searched, IntDistribution):
            values = [params[name] + steps * searched.step for steps in (-2, -1, 1, 2)]
            values = [value for value in values if searched.low <= value <= searched.high]
        elif isinstance(searched, CategoricalDistribution):
            values = [value for value in searched.choices if value != params[name]]
        near += [{**params, name: value} for value in values]
    return near


@dataclasses.dataclass(frozen=True)
class _Residual:
    """A Gaussian process of the forecast's error over the searched values, scaled to [0, 1]."""

    regressor: Any
    search_space: Mapping[str, BaseDistribution]

    @classmethod
    def fitted(cls, observed: Sequence[Observation], search_space: Mapping[str, BaseDistribution]) -> _Residual:
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
