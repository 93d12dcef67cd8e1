"""A sampler that starts from the study's forecast and learns where it is wrong.

The error of the forecast is a Gaussian process over the searched values (`search.study.beliefs`). Trials that were
measured teach it, and so do those that were pruned at a screen, by what they had until then. The next plan is the one
with the largest expected improvement (Jones, Schonlau and Welch 1998, https://doi.org/10.1023/A:1008306431147), times
the probability that it reaches the goal's bounds, among a random sample of the space and the neighbours of its best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial

from compressors.plan import CompressionPlan
from search.setup.goal import Goal, Known
from search.show import goal_text
from search.stages.forecast import Forecast
from search.study import beliefs, best, front, space
from search.study.beliefs import Params

DRAWN = 1000  # plans of the random sample
FRONT_OF = 400  # plans at random, and as many of the best, among which the front is looked for
ROUNDS, BEST = 3, 10  # of the neighbours of the best: how often, and of how many
MISSED = 1e3  # by which missing a bound weighs more than what the goal optimizes
NOTHING_LEFT = "nothing_left"  # the system attribute of a trial whose plan can't win, as no other can; it says why


class ForecastSampler(optuna.samplers.BaseSampler):
    """Samples the plan of the largest expected improvement over the best feasible trial.

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
        believed = self._beliefs(trials, search_space)
        leader = best.best_of(trials)
        value = None if leader is None else leader.value
        ranked = self._candidates(search_space, lambda candidates: believed.worth(candidates, value))
        candidates = (params for params in ranked if self._is_new(params, tried))
        first = next(candidates, None)
        if first is None:
            self._mark(study, trial, "every plan that was looked at was tried")
            return {}
        goal = believed.goal
        for params in itertools.chain([first], candidates):
            known = believed.known(params)
            if goal.broken(known) is None and (value is None or goal.can_beat(known, value)):
                return params
        text = _forecast_text(goal, believed.known(first))
        self._mark(study, trial, f"the most promising one is forecast to {text}")
        return first

    @staticmethod
    def _mark(study: optuna.Study, trial: FrozenTrial, why: str) -> None:
        study._storage.set_trial_system_attr(trial._trial_id, NOTHING_LEFT, why)

    def _is_new(self, params: Params, tried: Collection[CompressionPlan]) -> bool:
        plan = self._plan(params)
        return plan not in tried and self._forecast.setting.infeasible(plan) is None

    def best_plans(self, count: int) -> list[CompressionPlan]:
        """Return the feasible plans that the forecast says serve the goal best, the best first.

        Plans that are forecast to miss a bound come after those that are not, the closest first.
        """
        goal, forecast = self._forecast.setting.goal, self._forecast

        def value(plan: CompressionPlan) -> float:
            size = forecast.setting.size_ratio(plan) if goal.objective == "size" else math.nan  # it takes milliseconds
            known = Known(forecast.expected(plan), size)
            missed = sum(max(each, 0.0) for each in goal.constraints(known).values())
            return goal.value(known) - MISSED * missed

        return self._feasible(value, count)

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

    def smallest(self) -> float:
        """Return the smallest size that a feasible plan has, over the base model's."""
        plans = self._feasible(lambda plan: -self._forecast.setting.size_ratio(plan), 1)
        return self._forecast.setting.size_ratio(plans[0]) if plans else 1.0

    def _feasible(self, value: Callable[[CompressionPlan], float], count: int) -> list[CompressionPlan]:
        setting = self._forecast.setting
        search_space = space.distributions(setting.file.space, setting.model.identity)

        def worth(candidates: Sequence[Params]) -> NDArray[np.float64]:
            return np.array([value(self._plan(params)) for params in candidates])

        plans = dict.fromkeys(self._plan(params) for params in self._candidates(search_space, worth))
        return list(itertools.islice((plan for plan in plans if setting.infeasible(plan) is None), count))

    def observations(
        self, trials: Sequence[FrozenTrial], search_space: Mapping[str, BaseDistribution], quantity: str = "score"
    ) -> list[beliefs.Observation]:
        """Return what finished trials teach of a quantity, those pruned at the screen among them."""
        known = [trial for trial in trials if _complete(trial, search_space)]
        return beliefs.observed(quantity, known, self._forecast, self._plan, running_mean=self._running_mean)

    def _beliefs(self, trials: Sequence[FrozenTrial], search_space: Mapping[str, BaseDistribution]) -> beliefs.Beliefs:
        goal, residuals = self._forecast.setting.goal, {}
        for quantity in beliefs.quantities(goal):
            observed = self.observations(trials, search_space, quantity)
            if len(observed) >= beliefs.LEARNS_FROM:
                residuals[quantity] = beliefs.Residual.fitted(observed, search_space)
        return beliefs.Beliefs(self._forecast, goal, self._plan, residuals)

    def _plan(self, params: Mapping[str, Any]) -> CompressionPlan:
        setting = self._forecast.setting
        return space.plan_of(params, setting.file.space, setting.model.identity)

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


def _forecast_text(goal: Goal, known: Known) -> str:
    if goal.is_default:
        return f"score {known.score.score:.4f} ± {known.score.score_se:.4f}"
    return f"have {goal_text.of_known(goal, known)}"


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
