"""A sampler that starts from the study's forecast and learns where it is wrong.

The error of the forecast is a Gaussian process over the searched values (`search.study.beliefs`). Trials that were
measured teach it, and so do those that were pruned at a screen, by what they had until then. The next plan is the one
with the largest expected improvement (Jones, Schonlau and Welch 1998, https://doi.org/10.1023/A:1008306431147), times
the probability that it reaches the goal's bounds, among a random sample of the space and the neighbours of its best.

A plan whose own repair takes long waits after its cheap screen as long as others promise more (`promises_more`). That
is successive halving without brackets (Li et al. 2018, https://jmlr.org/papers/v18/16-558.html), decided by expected
improvement.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from compressors.plan import CompressionPlan, short
from search.setup.goal import Goal, Known
from search.show import goal_text
from search.stages.forecast import Forecast
from search.study import beliefs, best, front, space
from search.study.beliefs import Params
from search.study.trials import finished

DRAWN = 1000  # plans of the random sample
FRONT_OF = 400  # plans at random, and as many of the best, among which the front is looked for
AT_ONCE = 128  # plans that are looked at together, from the most promising one down
ROUNDS, BEST = 3, 10  # of the neighbours of the best: how often, and of how many
MISSED = 1e3  # by which missing a bound weighs more than what the goal optimizes
NOTHING_LEFT = "nothing_left"  # the system attribute of a trial whose plan can't win, as no other can; it says why
WAITS = "waits"  # the system attribute of a trial that ended early since another plan promises more; it says which
WAIT_IN_A_ROW = 4  # trials, at most: then one that waits goes on


class ForecastSampler(optuna.samplers.BaseSampler):
    """Samples the plan of the largest expected improvement over the best feasible trial.

    Args:
        forecast: The study's forecast.
        seed: The random seed of this trial.
    """

    def __init__(self, forecast: Forecast, seed: int) -> None:
        self._forecast = forecast
        self._random = np.random.default_rng(seed)
        self._independent = optuna.samplers.RandomSampler(seed=seed)
        self._plans: dict[tuple[tuple[str, Any], ...], CompressionPlan] = {}

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

        A plan that can't beat what it has to is proposed only if no other is left; the trial is marked NOTHING_LEFT.
        """
        if not search_space or "fixed_params" in trial.system_attrs:
            return {}
        trials = [other for other in study.get_trials(deepcopy=False) if _complete(other, search_space)]
        believed = self._beliefs(trials, search_space)
        leader = best.to_beat_of(trials)
        value = None if leader is None else leader.value
        candidates = self._ranked(trials, search_space, believed, value)
        first = next(filter(self._is_feasible, candidates), None)
        if first is None:
            self._mark(study, trial, "every plan that was looked at was tried")
            return {}
        goal = believed.goal
        for start in range(0, len(candidates), AT_ONCE):
            some = candidates[start : start + AT_ONCE]
            for params, known in zip(some, believed.known(some), strict=True):
                may_win = goal.broken(known) is None and (value is None or goal.can_beat(known, value))
                if may_win and self._is_feasible(params):
                    return params
        text = _forecast_text(goal, believed.known([first])[0])
        self._mark(study, trial, f"the most promising one is forecast to {text}")
        return first

    def promises_more(self, study: optuna.Study, running: FrozenTrial, least: float = 1.0) -> str | None:
        """Say which plan promises more than a running trial's, by all that is known of both; None if none does.

        A plan promises the improvement that is expected of it. The repair of one plan takes as long as the cheap
        screens of many, so the trial may wait. It is proposed again when no other promises more, and after
        WAIT_IN_A_ROW trials that wait, the most promising of them goes on.

        Args:
            study: The study.
            running: The trial as far as it is, with the value of its last rung.
            least: The factor by which the other has to promise more.
        """
        setting = self._forecast.setting
        search_space = space.distributions(setting.file.space, setting.model.identity)
        trials = [other for other in study.get_trials(deepcopy=False) if _complete(other, search_space)]
        others = [other for other in trials if other.number != running.number]
        plan = self._plan(running.params)
        if plan in self._waiting(others) or _waits_in_a_row(others) >= WAIT_IN_A_ROW:
            return None
        seen = copy.copy(running)
        seen.state = TrialState.PRUNED  # what a trial that ends here teaches
        leader = best.best_of(others)
        value = None if leader is None else leader.value
        believed = self._beliefs([*others, seen], search_space)
        ranked = self._ranked([*others, seen], search_space, believed, value)
        best_other = next(filter(self._is_feasible, ranked), None)
        if best_other is None:
            return None
        own, other = believed.worth([running.params, best_other], value)
        if other <= least * own:
            return None
        named = short(self._plan(best_other))
        return f"it is expected to gain {own:.4f} over the best trial, and {named} {other:.4f}; it waits"

    def _ranked(
        self,
        trials: Sequence[FrozenTrial],
        search_space: Mapping[str, BaseDistribution],
        believed: beliefs.Beliefs,
        value: float | None,
    ) -> list[Params]:
        """Return the parameters of plans that are still to be tried, the one that promises most first."""
        waiting = self._waiting(trials)
        tried = {self._plan(other.params) for other in trials} - waiting.keys()
        ranked = self._candidates(search_space, lambda candidates: believed.worth(candidates, value), waiting.values())
        if waiting and _waits_in_a_row(trials) >= WAIT_IN_A_ROW:
            ranked = [params for params in ranked if self._plan(params) in waiting]
        return [params for params in ranked if self._plan(params) not in tried]

    def _waiting(self, trials: Sequence[FrozenTrial]) -> dict[CompressionPlan, Params]:
        """Return the parameters of the plans whose last trial waits."""
        last = {self._plan(trial.params): trial for trial in trials}
        return {plan: trial.params for plan, trial in last.items() if WAITS in trial.system_attrs}

    @staticmethod
    def _mark(study: optuna.Study, trial: FrozenTrial, why: str) -> None:
        study._storage.set_trial_system_attr(trial._trial_id, NOTHING_LEFT, why)

    def _is_feasible(self, params: Params) -> bool:
        return self._forecast.setting.infeasible(self._plan(params)) is None

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
        last = {self._plan(trial.params): trial for trial in trials if _complete(trial, search_space)}
        known = list(last.values())  # of a plan that waited and went on, what its screen said at last
        return beliefs.observed(quantity, known, self._forecast, self._plan)

    def _beliefs(self, trials: Sequence[FrozenTrial], search_space: Mapping[str, BaseDistribution]) -> beliefs.Beliefs:
        goal, residuals = self._forecast.setting.goal, {}
        for quantity in beliefs.quantities(goal):
            observed = self.observations(trials, search_space, quantity)
            if len(observed) >= beliefs.LEARNS_FROM:
                residuals[quantity] = beliefs.Residual.fitted(observed, search_space)
        return beliefs.Beliefs(self._forecast, goal, self._plan, residuals)

    def _plan(self, params: Mapping[str, Any]) -> CompressionPlan:
        key, setting = tuple(params.items()), self._forecast.setting
        if key not in self._plans:  # each candidate is looked at several times
            self._plans[key] = space.plan_of(params, setting.file.space, setting.model.identity)
        return self._plans[key]

    def _candidates(
        self,
        search_space: Mapping[str, BaseDistribution],
        worth: Callable[[Sequence[Params]], NDArray[np.float64]],
        more: Iterable[Params] = (),
    ) -> list[Params]:
        """Return candidates, `more` among them, the most promising first."""
        pool = [{name: params[name] for name in search_space} for params in more]
        pool += [{name: self._draw(each) for name, each in search_space.items()} for _ in range(DRAWN)]
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


def _waits_in_a_row(trials: Sequence[FrozenTrial]) -> int:
    """Return how many of the last finished trials wait; those that were stopped and are tried again do not count."""
    ended = reversed(finished(list(trials)))
    return sum(1 for _ in itertools.takewhile(lambda trial: WAITS in trial.system_attrs, ended))


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
