"""States whether a model beats the base model, whose Score follows from the definition."""

from __future__ import annotations

from search.setup.goal import Goal
from search.show.confirmed_row import ConfirmedRow
from search.show.study_state import Contender, StudyState, TrialSummary

ERRORS = 2.0  # the standard errors by which a Score must exceed the base model's

PRINTED = 5e-5  # a smaller difference is not seen in four decimals


def of_study(state: StudyState) -> str | None:
    """Return a sentence where the best of a study is no better than the base model, beyond the error; else None.

    Where the best trials are confirmed, it is the verdict on the best of them.
    """
    if state.confirmed_best is not None:
        return of_confirmed(state.confirmed_best)
    if state.confirmed_miss is not None:
        return no_confirmed(state.goal, state.confirmed_miss)
    if not state.goal.is_default:
        return _of_goal(state)
    base, others = state.base_score, state.contenders
    if base is None or not (others or state.pruned or state.failed):
        return None
    if not others:
        ended = f"{state.pruned} pruned, {state.failed} failed"
        return f"no plan beats the base model (Score {base:g} by definition): no other plan was measured ({ended})"
    best = max(others, key=lambda one: one.score)
    better = [one for one in others if beats(one, base)]
    if best in better:
        return None
    if better:
        other = max(better, key=lambda one: one.score)
        return (
            f"{best.name} does not beat the base model beyond the error, and {other.name} does: their Scores are "
            f"{with_error(best)} and {with_error(other)}, the base model's is {base:g} by definition"
        )
    return f"no plan beats the base model{_beyond(best, base)}: the best is {best.name} with {_numbers(best, base)}"


def of_confirmed(row: ConfirmedRow) -> str:
    """Return the verdict on a confirmed trial as a sentence, with its numbers."""
    than = {"BETTER": "is BETTER than", "WORSE": "is WORSE than", "SAME": "is the SAME as"}
    numbers = (row.says or "").partition(": ")[2]
    score = f"Score {row.score:.4f} ± {row.score_se:.4f}"
    how = f"confirmed on the {row.text}" + (f" by {row.pairs} fresh pairs of processes" if row.pairs else "")
    if row.of_goal is not None:
        return f"{how}: trial {row.trial}: {row.of_goal}" + (f"; {row.bounds_says}" if row.bounds_says else "")
    if row.verdict not in than:
        return f"{how}: whether trial {row.trial} ({score}) beats the base model is UNDECIDED: {numbers}"
    return f"{how}: trial {row.trial} ({score}) {than[row.verdict]} the base model: {numbers}"


def no_confirmed(goal: Goal, row: ConfirmedRow) -> str:
    """Return the sentence for a study whose confirmed trials all miss the goal's bounds, with the best measured one."""
    return (
        f"no confirmed trial reaches the goal ({goal}): trial {row.trial}, the best as it was measured, has "
        f"{row.of_goal} on the {row.text}" + (f"; {row.bounds_says}" if row.bounds_says else "")
    )


def of_trial(trial: TrialSummary, base: float | None) -> str | None:
    """Return a sentence where a measured trial is no better than the base model, beyond the error; else None."""
    if trial.feasible is False:
        return f"trial {trial.trial} misses the goal's bounds: {trial.result}"
    if trial.result is not None:
        return None
    if trial.is_base:
        return f"trial {trial.trial} is the base model itself: its Score is {trial.score:g} by definition"
    one = Contender(f"trial {trial.trial}", trial.score or 0.0, trial.score_se)
    if base is None or beats(one, base):
        return None
    return f"{one.name} does not beat the base model{_beyond(one, base)}: it has {_numbers(one, base)}"


def _of_goal(state: StudyState) -> str | None:
    best = state.best
    if best is None:
        return no_feasible(state)
    if best.is_base:
        return f"no plan does better than the base model ({best.result}): the goal is to {state.goal}"
    return None


def no_feasible(state: StudyState) -> str | None:
    """Return a sentence where no measured trial reaches the goal's bounds, with the closest one; else None."""
    closest = state.closest
    if closest is None:
        return None
    return f"no measured trial reaches the goal ({state.goal}); the closest is trial {closest.trial}: {closest.result}"


def beats(one: Contender, base: float) -> bool:
    """Return whether a model is better than the base model by more than `ERRORS` standard errors."""
    return one.score - base > ERRORS * (one.score_se or 0.0) + PRINTED


def with_error(one: Contender) -> str:
    """Return the Score with its standard error, where it is known."""
    return f"{one.score:.4f}" + ("" if one.score_se is None else f" ± {one.score_se:.4f}")


def _beyond(one: Contender, base: float) -> str:
    return " beyond the error" if one.score > base + PRINTED else ""


def _numbers(one: Contender, base: float) -> str:
    difference = f"{one.score - base:+.4f}".replace("-", "−")
    margin = "" if one.score_se is None else f", where {ERRORS:g} standard errors are {ERRORS * one.score_se:.4f}"
    return f"Score {with_error(one)}, {difference} against {base:g} by definition{margin}"
