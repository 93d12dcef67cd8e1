"""What each rung of a study's ladder took and decided, and how well it foretold the next one."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from search.setup.goal import Goal
from search.show.study_state import Rung
from search.study import rungs
from search.study.trials import is_base_model

FEW = 3  # trials at both rungs, below which a rank correlation says nothing


def ladder(trials: Sequence[FrozenTrial], shards: int, goal: Goal) -> tuple[Rung, ...]:
    """Return the rungs that trials reached, in their order.

    Args:
        trials: The finished trials of a study; the base model itself, which climbs no ladder, is left out.
        shards: The number of shards of the search text.
        goal: What the study searches for. Where text does not say which of two plans is better, all rungs before the
            measurement report the same value, and their order says nothing; a size is the same there, too.
    """
    steps = {
        "forecast": rungs.FORECAST,
        "cheap screen": rungs.cheap(shards),
        "screen": rungs.screened(shards),
        "measure": rungs.measured(shards),
    }
    climbed = [trial for trial in trials if not is_base_model(trial) and "seconds" in trial.user_attrs]
    spent = {name: [trial.user_attrs["seconds"].get(name, 0.0) for trial in climbed] for name in steps}
    builds = [trial.user_attrs["seconds"].get("build", 0.0) for trial in climbed]
    spent["measure"] = [sum(both) for both in zip(spent["measure"], builds, strict=True)]
    total = sum(map(sum, spent.values()))
    names = [name for name in steps if any(steps[name] in trial.intermediate_values for trial in climbed)]
    made = []
    for place, name in enumerate(names):
        reached = [trial for trial in climbed if steps[name] in trial.intermediate_values]
        ended = [trial for trial in _decided(reached) if max(trial.intermediate_values) == steps[name]]
        following = names[place + 1] if place + 1 < len(names) else None
        learns = goal.by_text or (following == "measure" and goal.objective != "size")
        pairs = _pairs(reached, steps[name], steps[following]) if following is not None and learns else []
        seconds = sum(spent[name])
        kendall = _kendall(pairs)
        made.append(
            Rung(name, len(reached), len(ended), seconds, seconds / total if total else 0.0, kendall, len(pairs))
        )
    return tuple(made)


def _decided(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that a rung ended, or that were measured: a failure is no decision."""
    return [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def _pairs(trials: Sequence[FrozenTrial], one: int, other: int) -> list[tuple[float, float]]:
    values = [trial.intermediate_values for trial in _decided(trials)]
    return [(each[one], each[other]) for each in values if other in each]


def _kendall(pairs: Sequence[tuple[float, float]]) -> float | None:
    if len(pairs) < FEW:
        return None
    from scipy.stats import kendalltau  # a second of importing, which only a study with trials needs

    value = float(kendalltau(*zip(*pairs, strict=True)).statistic)
    return value if value == value else None  # NaN where all are equal
