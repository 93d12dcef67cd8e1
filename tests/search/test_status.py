"""Tests of what people read about a study: a line for each trial, errors of Scores, and what beats the base model."""

import dataclasses
import io

import pytest
import rich.console

from compressors.plan import CompressionPlan
from evaluator.task_result import TaskResult
from search.show import baseline_text, progress, tables, verdict
from search.show.study_state import Contender, StudyState, TrialSummary
from tests.measurements import measurement

PLAN = CompressionPlan(30, 32, 8, 2048, 4096, "bfloat16")
BASELINE = measurement(
    perplexity=3.0,
    time_per_token_ms=10.0,
    base_time_per_token_ms=10.0,
    time_ratio_se=0.039,
    timing_samples=96,
    tokens_per_sec=100.0,
)
PREDICTED = dataclasses.replace(
    BASELINE, time_per_token_ms=1.0, tokens_per_sec=1000.0, timing_samples=0, time_ratio_se=0.0
)


def state_of(**changes):
    values = {
        **{"study": "s", "trials": 20, "finished": 20, "complete": 0, "pruned": 0, "failed": 0, "running": 0},
        **{"waiting": 0, "baseline": None, "best": None, "pareto": (), "pruned_at": {}, "ended": (), "distilled": ()},
        **{"best_of_all": None, "base_score": 0.5, **changes},
    }
    return StudyState(**values)


def printed(table, width=140):
    console = rich.console.Console(file=io.StringIO(), width=width)
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def ended(number, reason="screen: 0.449 against 0.500 of trial 1 (4 of 12 shards, wilcoxon)", **changes):
    values = {"trial": number, "state": "PRUNED", "score": None, "reason": reason, "plan": PLAN, **changes}
    return TrialSummary(**values)


# -- the ended trials ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [50, 60, 80, 100, 140, 200])
def test_each_ended_trial_is_one_line_that_fits_the_terminal(width):
    long = "infeasible: heads: 5 query heads can't be shared by 3 key/value heads; choose a multiple of 3 " * 3
    trials = (ended(3), ended(4, reason=long), ended(5, reason="two\nlines"), ended(6, reason=None))
    lines = printed(tables.status_table(state_of(ended=trials)), width)
    rows = [line for line in lines if line.split()[:1] in (["3"], ["4"], ["5"], ["6"])]
    assert len(rows) == 4
    assert len(lines) == 7  # the state, a title, a heading, and the trials
    assert all(len(line) <= width for line in lines)
    assert rows[1].endswith("…")
    assert ("0.449" in rows[0]) or width < 60


@pytest.mark.parametrize(("count", "shown", "hidden"), [(12, 12, 0), (13, 12, 1), (20, 12, 8), (1, 1, 0), (0, 0, 0)])
def test_the_trials_that_are_left_out_are_counted(count, shown, hidden):
    state = state_of(ended=tuple(ended(number) for number in range(count)))
    lines = printed(tables.status_table(state))
    assert sum("screen: 0.449" in line for line in lines) == shown
    assert (f"… and {hidden} more (--all)" in lines) == (hidden > 0)
    everything = printed(tables.status_table(state, everything=True))
    assert sum("screen: 0.449" in line for line in everything) == count
    assert not any("more (--all)" in line for line in everything)


def test_brackets_in_a_reason_are_no_markup():
    (line,) = printed(tables.status_table(state_of(ended=(ended(3, reason="space [W8A8] [bold]x[/]"),))))[-1:]
    assert line.endswith("space [W8A8] [bold]x[/]")


def test_a_failed_trial_is_told_from_a_pruned_one():
    failed = ended(3, reason="out of memory", state="FAIL", failure="EngineOutOfMemory")
    nameless = ended(4, reason=None, state="FAIL")
    assert [line.split("  ")[-1] for line in printed(tables.status_table(state_of(ended=(failed, nameless))))[-2:]] == [
        "EngineOutOfMemory: out of memory",
        "failed",
    ]


def test_stopped_trials_are_counted_as_stopped_and_not_as_failed():
    state = state_of(complete=3, stopped=1, finished=3)
    assert printed(tables.status_table(state))[0] == "study s: 3 of 20 trials finished (3 complete, 1 stopped)"
    assert state.to_dict()["stopped"] == 1
    assert "stopped" not in state_of().to_dict()


# -- what beats the base model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contenders", "said"),
    [
        ([("trial 1", 0.5456, 0.0335)], "no plan beats the base model beyond the error: the best is trial 1 with Score "
         "0.5456 ± 0.0335, +0.0456 against 0.5 by definition, where 2 standard errors are 0.0670"),
        ([("trial 1", 0.47, 0.01)], "no plan beats the base model: the best is trial 1 with Score 0.4700 ± 0.0100, "
         "−0.0300 against 0.5 by definition, where 2 standard errors are 0.0200"),
        ([("trial 1", 0.5, 0.0)], "no plan beats the base model: the best is trial 1 with Score 0.5000 ± 0.0000"),
        ([("trial 1", 0.52, 0.01)], "no plan beats the base model beyond the error"),  # exactly 2 standard errors
        ([("trial 1", 0.6, None)], None),  # of an older version, without an error
        ([("trial 1", 0.5001, 0.0)], None),
        ([("trial 1", 0.7213, 0.004), ("trial 5", 0.51, 0.1)], None),
        ([("trial 1", 0.55, 0.05), ("trial 5", 0.53, 0.001)], "trial 1 does not beat the base model beyond the error, "
         "and trial 5 does: their Scores are 0.5500 ± 0.0500 and 0.5300 ± 0.0010, the base model's is 0.5"),
    ],
)  # fmt: skip
def test_a_study_states_when_no_plan_beats_the_base_model_beyond_the_error(contenders, said):
    sentence = verdict.of_study(state_of(complete=2, contenders=tuple(Contender(*one) for one in contenders)))
    assert sentence is said is None or sentence.startswith(said)


def test_a_study_whose_other_plans_were_all_pruned_says_so():
    sentence = (
        "no plan beats the base model (Score 0.7 by definition): no other plan was measured (19 pruned, 0 failed)"
    )
    assert verdict.of_study(state_of(complete=1, pruned=19, base_score=0.7)) == sentence
    assert verdict.of_study(state_of(complete=1, finished=1)) is None  # it has only begun
    assert verdict.of_study(state_of(complete=1, pruned=19, base_score=None)) is None


def test_an_exported_trial_that_does_not_beat_the_base_model_says_so():
    trial = TrialSummary(7, "COMPLETE", 0.51, score_se=0.02, stage="done")
    assert verdict.of_trial(trial, 0.5).startswith(
        "trial 7 does not beat the base model beyond the error: it has Score"
    )
    assert verdict.of_trial(dataclasses.replace(trial, score=0.6), 0.5) is None
    base = TrialSummary(0, "COMPLETE", 0.5, score_se=0.0, stage="baseline")
    assert verdict.of_trial(base, 0.5) == "trial 0 is the base model itself: its Score is 0.5 by definition"


# -- the baseline's line, and lines of a run -----------------------------------------------------------------------


def test_the_baselines_line_has_the_accuracies_and_the_noise_floor():
    quiz = TaskResult(0.4286, 0.187, 7, (1.0,) * 7)
    measured = dataclasses.replace(BASELINE, tasks={"quiz": quiz})
    lines = printed(tables.status_table(state_of(baseline=measured)))
    assert lines[1] == (
        "baseline: perplexity 3.000, 10.00 ms per token, 0.5 MB, accuracy of quiz 0.429 ± 0.187 (transformers, cpu)"
    )
    assert lines[2] == "noise floor: SpeedNorm 0 ± 0.039, the base model timed against itself"


@pytest.mark.parametrize("rate", [False, True])
def test_a_speed_that_was_not_timed_is_called_predicted(rate):
    text = baseline_text.numbers(PREDICTED, rate=rate)
    assert text == "perplexity 3.000, speed predicted from weight bytes, 0.5 MB"
    assert baseline_text.noise_floor(PREDICTED) is None


def test_models_whose_timing_is_noisy_are_named():
    noisy = (Contender("trial 1", 0.6, 0.02, 0.051), Contender("trial 2", 0.6, 0.02, 0.05))
    assert printed(tables.status_table(state_of(contenders=noisy)))[-1].endswith("exceeds 0.05 in trial 1")
    assert baseline_text.noisy(0.05, "trial 2") is None
    assert baseline_text.noisy(None, "trial 2") is None


def an_end(**changes):
    return {
        **{"trial": 7, "plan": None, "score": None, "score_se": None, "speed_norm_se": None, "seconds": 3.2},
        **{"stage": "screen", "reason": "", "failure": "", "stopped": False, "by_definition": False, **changes},
    }


@pytest.mark.parametrize(
    ("event", "said"),
    [
        ({"score": 0.5456, "score_se": 0.0335}, "trial   7 Score 0.5456 ± 0.0335  3 s"),
        ({"score": 0.5, "by_definition": True, "reason": "the base model itself: 0.5 by definition"},
         "trial   7 Score 0.5000  (the base model itself: 0.5 by definition)"),
        ({"failure": "Interrupted", "stopped": True},
         "trial   7 stopped at screen  3 s  (tried again by the next run)"),
        ({"failure": "NotFinite", "reason": "NaN"}, "trial   7 FAILED at screen: NaN"),
        ({}, "trial   7 pruned at screen  3 s"),
    ],
)  # fmt: skip
def test_the_line_of_an_ended_trial(event, said):
    assert progress.line(an_end(**event)) == said


def test_steps_name_their_trial_and_a_noisy_timing_is_warned_of_once(capsys):
    with progress.Live(20) as live:
        live({"event": "say", "text": "starting the engine", "trial": 3})
        live(an_end(event="end", score=0.5, score_se=0.1, speed_norm_se=0.39))
        live(an_end(event="end", score=0.5, score_se=0.1, speed_norm_se=0.39))
    err = capsys.readouterr().err
    assert "… trial 3: starting the engine" in err
    assert err.count("the standard error of SpeedNorm is 0.390, above 0.05") == 1


def test_the_time_left_is_told_by_stage(capsys):
    left = {"seconds": 200.0, "stages": {"plan": (0.0, 1.0), "screen": (2.1, 1.0), "measure": (38.0, 0.2)}}
    done = {"finished": 5, "trials": 20, "pruned": 0, "failed": 0, "left": left}
    with progress.Live(20) as live:
        live({"event": "done", **done})
        live({"event": "done", **done})  # within a minute
    said = "… 5 of 20 trials, about 3 min left: a trial takes screen 2 s + measure 38 s (20%)"
    assert capsys.readouterr().err.splitlines() == [said]
