"""What eval_result.json and a study's rows hold, written and read by this version and by others."""

import dataclasses
import datetime
import io
import json
import re
from pathlib import Path

import optuna
import pytest
import rich.console

from compressors.plan import CompressionPlan
from evaluator import served
from evaluator.measurement import METRICS
from evaluator.score import Formula, score_of
from evaluator.task_result import TaskResult
from evaluator.workload import Workload
from search.by_hand import report
from search.by_hand.evaluation import RESULT, BaseModel, Confirmed, Evaluation
from search.errors import UsageError
from search.show import tables
from search.show.rows import Row, by_score
from search.show.study_state import FinalistResult, FinalistRow, FinalistScore, TrialSummary
from search.study import dashboard, status
from search.study.record import Record
from tests.measurements import measurement

BASE = CompressionPlan(5, 6, 3, 96, 160, "bfloat16")
PLAN = CompressionPlan(4, 6, 3, 96, 160, "W8A8", quantizer="gptq")
RESULT_OF_A_SERVER = json.loads(
    (Path(__file__).parents[1] / "evaluator" / "results" / "vllm_bench_serve.json").read_text()
)
SERVED = Workload(kind="serve", concurrencies=(8,), requests=128, goodput={"ttft_ms": 500.0})
CIRCUMSTANCES = {"backend": "transformers", "workload": {"batch_sizes": [1]}}


def measured(nll, ratio):
    return measurement(
        perplexity=2.0 + nll,
        nll_nats_per_token=nll,
        nll_nats_per_token_se=0.01,
        shard_nll=(nll - 0.1, nll + 0.1),
        time_per_token_ms=10 * ratio,
        base_time_per_token_ms=10.0,
        time_ratio=ratio,
        tokens_per_sec=100 / ratio,
        notes=("a note",),
        tasks={"quiz": TaskResult(0.5, 0.1, 2, (0.0, 1.0), "digest")},
    )


def evaluation(**changes):
    base, model = measured(1.0, 1.0), measured(1.2, 0.7)
    formula = Formula(perf=(("perplexity", 2.0), ("quiz", 1.0)))
    values = {
        "name": "drop4",
        "score": score_of(model, base, formula),
        "date": "2026-01-01T00:00:00+00:00",
        "model": BaseModel("base", "digest"),
        "description": None,
        "plan": PLAN,
        "base_plan": BASE,
        "formula": formula,
        "circumstances": CIRCUMSTANCES,
        "measurement": model,
        "baseline": base,
        "report_text": Confirmed(3.0, 2.5, 0.8, 0.01, "digest"),
        "settings": {"text": {"window": 32}},
        "words": ("--study", "demo"),
    }
    return Evaluation(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"plan": None, "report_text": None, "description": "by somebody"},
        {"words": None, "study": "demo", "trial": 3},
    ],
    ids=["compressed", "of another origin", "exported"],
)
def test_an_evaluation_is_read_as_it_was_written(changes):
    written = evaluation(**changes)
    assert Evaluation.from_dict(json.loads(json.dumps(written.to_dict()))) == written


def test_an_export_names_its_trial_and_an_evaluation_the_words_of_its_command_line():
    by_hand, exported = evaluation().to_dict(), evaluation(words=None, study="demo", trial=3).to_dict()
    assert set(by_hand) - set(exported) == {"words"}
    assert set(exported) - set(by_hand) == {"study", "trial"}


def test_times_under_other_kinds_stay_beside_those_of_the_score(tmp_path):
    runs = (served.of_result(RESULT_OF_A_SERVER, 8, None),)
    of_decode = evaluation()
    of_server = evaluation(
        measurement=dataclasses.replace(measured(1.2, 0.6), workload=SERVED, served=runs),
        baseline=dataclasses.replace(measured(1.0, 1.0), workload=SERVED, served=runs),
        date="2026-01-02T00:00:00+00:00",
    ).with_speeds_of(of_decode)
    of_batch = evaluation(measurement=dataclasses.replace(measured(1.2, 0.9), workload=Workload(kind="batch")))
    of_batch = of_batch.with_speeds_of(of_server)
    assert [speed.workload.kind for speed in of_batch.speeds] == ["batch", "serve", "decode"]
    assert [speed.workload.kind for speed in evaluation().with_speeds_of(of_batch).speeds] == [
        *("decode", "batch", "serve")
    ]
    assert Evaluation.from_dict(json.loads(json.dumps(of_batch.to_dict()))) == of_batch
    text = report.text(of_batch, tmp_path, "all", None, datetime.date(2026, 1, 3))
    assert "## Speed by kind of workload" in text
    assert (
        "| serve: 128 requests to a server, 8 at once | 10.0000 ± 0.1000 | 6.0000 ± 0.1000 | +0.4000 ± 0.0100 |" in text
    )
    assert "| decode: decode steps, batch sizes 1 | 10.0000 ± 0.1000 | 7.0000 ± 0.1000 | +0.3000 ± 0.0100 |" in text
    assert "## Under load" in text
    alone = report.text(of_decode, tmp_path, "one", None, datetime.date(2026, 1, 3))
    assert "## Speed by kind of workload" not in alone
    assert "is 1.2000 ± 0.0100 nats per token; the baseline's is 1.0000 ± 0.0100" in alone


@pytest.mark.parametrize(
    "other",
    [
        {"measurement": dataclasses.replace(measured(1.2, 0.7), weights_sha256="others")},
        {"measurement": dataclasses.replace(measured(1.2, 0.7), device="another")},
        {"measurement": dataclasses.replace(measured(1.2, 0.7), engine_version="2")},
        {"measurement": dataclasses.replace(measured(1.2, 0.7), timing_samples=0)},
        {"model": BaseModel("base", "others")},
    ],
)
def test_times_of_other_weights_or_another_machine_do_not_stay(other):
    of_batch = evaluation(measurement=dataclasses.replace(measured(1.2, 0.9), workload=Workload(kind="batch")))
    assert of_batch.with_speeds_of(evaluation(**other)).other_speeds == ()
    assert of_batch.with_speeds_of(None).other_speeds == ()


def test_confirmed_numbers_stay_with_their_weights():
    """`evaluate` of an exported model writes over the export's own numbers, and on another device too."""
    exported = evaluation(words=None, study="demo", trial=3, confirmed={"score": 0.52})
    elsewhere = dataclasses.replace(measured(1.2, 0.9), device="another")
    assert evaluation(measurement=elsewhere).with_speeds_of(exported).confirmed == {"score": 0.52}
    retrained = dataclasses.replace(measured(1.2, 0.9), weights_sha256="others")
    assert evaluation(measurement=retrained).with_speeds_of(exported).confirmed is None


def test_keys_of_another_version_are_ignored_and_missing_options_get_their_defaults():
    values = evaluation().to_dict()
    for place in (values, *(values[key] for key in ("model", "plan", "base_plan", "formula", "report_text"))):
        place["from_the_future"] = 1
    for key in ("measurement", "baseline"):
        values[key]["from_the_future"] = 1
        values[key]["workload"]["from_the_future"] = 1
        values[key]["tasks"]["quiz"]["from_the_future"] = 1
    for key in ("quantizer", "kv_cache"):
        del values["plan"][key], values["base_plan"][key]
    for key in ("words", "description", "settings", "report_text"):
        del values[key]
    read = Evaluation.from_dict(json.loads(json.dumps(values)))
    expected = evaluation(words=None, description=None, settings={}, report_text=None)
    assert read.measurement == expected.measurement
    assert read.plan == CompressionPlan(4, 6, 3, 96, 160, "W8A8")
    assert read.score == expected.score
    assert (read.words, read.description, read.settings, read.report_text) == (None, None, {}, None)


@pytest.mark.parametrize("key", ["measurement", "formula", "base_plan", "perf_norm", "name"])
def test_a_file_without_what_every_evaluation_has_is_none(tmp_path, key):
    values = evaluation().to_dict()
    del values[key]
    with pytest.raises(ValueError, match="not a whole evaluation"):
        Evaluation.from_dict(values)
    (tmp_path / RESULT).write_text(json.dumps(values))
    assert Evaluation.read(tmp_path) is None


@pytest.mark.parametrize(
    ("keys", "value", "says"),
    [
        (("baseline", "shard_nll"), [0.9, 1.0, 1.1], "has 2 shards, and baseline.shard_nll has 3"),
        (("baseline", "tasks", "quiz", "correct"), [1.0], "the task quiz has another number of items for the"),
        (("settings", "text"), "embedded", "settings.text is 'embedded', and not an object"),
        (("settings", "score"), [], "settings.score is [], and not an object"),
        (("settings", "evaluation"), {"length_tolerance": "0.1"}, "length_tolerance is '0.1', and not a number"),
        (("settings", "goal"), {"minimize": "score"}, "settings.goal.minimize: score is better when it is larger"),
        (("settings", "goal"), None, "settings.goal: "),
        (("confirmed",), {"score": 0.52}, "confirmed has no trial"),
        (("confirmed",), {"score": 0.52, "trial": 3, "key": "x"}, "confirmed has no plan"),
        (("confirmed",), {"trial": 3, "key": "x", "plan": PLAN.to_dict()}, "confirmed has no score"),
    ],
)
def test_what_a_report_can_not_read_is_damaged(tmp_path, keys, value, says):
    values = evaluation().to_dict()
    place = values
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / RESULT).write_text(json.dumps(values))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError) as caught:
        report.evaluated(tmp_path)
    assert f"{RESULT} is damaged (not a whole evaluation: " in str(caught.value)
    assert says in str(caught.value)


def test_a_file_that_was_cut_off_is_none(tmp_path):
    (tmp_path / RESULT).write_text(json.dumps(evaluation().to_dict())[:-100])
    assert Evaluation.read(tmp_path) is None
    assert Evaluation.read(tmp_path / "nowhere") is None


def test_a_row_has_the_numbers_of_its_evaluation(tmp_path):
    one = evaluation()
    row = one.row(tmp_path, before=True).to_dict()
    metrics = [name for name in row if name in METRICS]
    todays = ["total_parameters", "model_size_mb", "perplexity", "kl_nats_per_token", "time_per_token_ms"]
    todays_columns = {name for name, metric in METRICS.items() if metric.column is not None and not metric.optional}
    assert set(metrics) == todays_columns  # what was asked for
    assert [name for name in metrics if name in todays] == todays
    assert list(row) == [
        *("name", "path", "plan", *metrics),
        *("perf_norm", "perf_norm_se", "speed_norm", "speed_norm_se", "score", "score_se"),
        "before",
    ]
    assert (row["path"], row["before"], row["plan"]["quantizer"]) == (str(tmp_path), True, "gptq")
    assert (row["score"], row["perplexity"]) == (one.score.score, one.measurement.perplexity)
    baseline = one.baseline_row().to_dict()
    assert (baseline["perf_norm"], baseline["speed_norm"], baseline["score"]) == (1.0, 0.0, 0.5)
    assert (baseline["path"], baseline["kl_nats_per_token"]) == ("base", 0.0)
    assert baseline["plan"] == BASE.to_dict()


def test_a_row_that_failed_has_its_reason_and_comes_last(tmp_path):
    failed = Row("broken", "submit/broken", failure="NotFinite", reason="its loss is NaN")
    expected = {"name": "broken", "path": "submit/broken", "failure": "NotFinite", "reason": "its loss is NaN"}
    assert failed.to_dict() == expected
    one = evaluation()
    rows = by_score([failed, one.baseline_row(), one.row(tmp_path)])
    assert [row.name for row in rows] == ["drop4", "baseline", "broken"]
    assert tables.comparison(rows).row_count == 3


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"model": BaseModel("other", "other digest")}, "another base model: other"),
        ({"circumstances": {**CIRCUMSTANCES, "backend": "vllm"}}, "measured with another backend: not comparable"),
        ({"formula": Formula(weight_perf=0.9)}, "scored by another formula: not comparable"),
    ],
)
def test_a_comparison_says_what_can_not_be_compared(tmp_path, changes, remark):
    rows = report.compared([(tmp_path / "one", evaluation()), (tmp_path / "two", evaluation(**changes))])
    assert [row.remark for row in rows] == [None, None, remark]
    assert rows[2].to_dict()["remark"] == remark
    assert "remark" not in rows[1].to_dict()


BEFORE = {"score": 0.6, "score_se": 0.01, "perf_norm": 0.7, "perf_norm_se": 0.02, "speed_norm": 0.5,
          "speed_norm_se": 0.0, "kl_nats_per_token": None}  # fmt: skip
STORED = {"trial": 3, "name": "model_kd_drop3", "path": "submit/model_kd_drop3", "before": BEFORE,
          "weights_sha256": "digest", "after": {**BEFORE, "score": 0.7}, "tokens": 512, "seconds": 1.5,
          "held_out_kl": [0.3, 0.2], "stopped": "tokens"}  # fmt: skip


def test_a_finalist_is_read_as_it_is_stored():
    row = FinalistRow.from_dict(STORED)
    assert row.result is not None
    assert (row.before.score, row.result.after.score, row.result.held_out_kl) == (0.6, 0.7, (0.3, 0.2))
    assert row.to_dict() == STORED
    failed = {key: STORED[key] for key in ("trial", "name", "path", "before")}
    failed |= {"failure": "UsageError", "reason": "holds another model"}
    assert FinalistRow.from_dict(failed).to_dict() == failed


def test_a_finalist_of_another_version_is_read():
    older = {key: value for key, value in STORED.items() if key != "weights_sha256"}
    newer = {**STORED, "more": 1, "after": {**STORED["after"], "more": 1}}
    assert FinalistRow.from_dict(newer) == FinalistRow.from_dict(STORED)
    row = FinalistRow.from_dict(older)
    assert isinstance(row.result, FinalistResult)
    assert row.result.weights_sha256 is None
    assert FinalistScore.from_dict({"score": 0.5}).score_se is None


def test_a_trial_has_only_the_keys_of_what_it_reached():
    pruned = TrialSummary(1, "PRUNED", None, stage="screen", reason="weak", plan=PLAN).to_dict()
    assert list(pruned) == ["trial", "state", "score", "stage", "reason", "plan"]
    assert pruned["score"] is None
    assert pruned["plan"] == PLAN.to_dict()


# -- where a metric is shown: more may be added, so these tests look only for the first ones ------------------


def printed(table):
    """Return the words of each line of a table."""
    console = rich.console.Console(file=io.StringIO(), width=300)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


def in_order(found, expected):
    """Return those of `expected` that were found, in the order in which they stand."""
    return [one for one in found if one in expected]


def test_a_comparison_shows_metrics_before_and_after_the_scores(tmp_path):
    one = evaluation()
    table = tables.comparison([one.row(tmp_path), one.baseline_row()])
    todays = [
        *("experiment", "params", "perplexity", "KL", "ms/token", "PerfNorm", "SpeedNorm", "Score", "MB", "remark")
    ]
    heading, *lines = printed(table)
    assert in_order(heading, todays) == todays
    model, baseline = (dict(zip(heading, line, strict=False)) for line in lines)  # a remark may be empty
    cells = {
        "experiment": "drop4",
        "params": "0.4M",
        "perplexity": "3.200",
        "KL": "–",
        "ms/token": "7.000",
        "MB": "0.5",
    }
    assert cells.items() <= model.items()
    cells |= {"experiment": "baseline", "perplexity": "3.000", "KL": "0.0000", "ms/token": "10.000"}
    assert cells.items() <= baseline.items()


def test_a_report_has_the_base_models_value_where_it_is_known(tmp_path):
    lines = report.text(evaluation(), tmp_path, "drop4", None, datetime.date(2026, 1, 1)).splitlines()
    rows = [
        "| parameters | 0.4M | 0.4M |",
        "| model_size_mb | 0.5 | 0.5 |",
        "| perplexity | 3.0000 | 3.2000 |",
        "| time_per_token_ms | 10.0000 ± 0.1000 | 7.0000 ± 0.1000 |",
        "| tokens_per_sec | 100.0 | 142.9 |",
        "| KL to the base, nats per token | 0 | – |",
        "| top-1 agreement with the base | 1 | – |",
        "| accuracy, quiz | 0.5000 ± 0.1000 | 0.5000 ± 0.1000 |",
    ]
    assert in_order(lines, rows) == rows


def test_the_documentation_shows_the_line_of_the_report_text_as_it_is_written(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "read-a-report.md").read_text()
    written = report.text(evaluation(), tmp_path, "one", None, datetime.date(2026, 1, 3))
    shown, said = (
        [re.sub(r"[-+]?\d+\.\d+", "N", line) for line in text.splitlines() if line.startswith("On text that neither")]
        for text in (page, written)
    )
    assert shown == said


@pytest.mark.parametrize("kl", [None, 0.125])
def test_a_trials_note_compares_it_with_the_baseline(kl):
    one = evaluation()
    measured = dataclasses.replace(one.measurement, kl_nats_per_token=kl)
    record = Record(1, plan=PLAN, stage="measure", measurement=measured, score=one.score)
    lines = dashboard.trial_note(record, one.baseline).splitlines()
    rows = [
        "| perplexity | 3.200 | 3.000 |",
        "| time per token | 7.000 ms | 10.000 ms, in turn |",
        "| size | 0.5 MB | 0.5 MB |",
        "| parameters | 400,000 | 400,000 |",
        *([] if kl is None else ["| KL to the base | 0.1250 nats per token | 0 |"]),
    ]
    assert in_order(lines, rows) == rows
    assert any("KL" in line for line in lines) == (kl is not None)


def test_status_shows_the_attributes_of_a_trial():
    one = evaluation()
    record = Record(1, plan=PLAN, measurement=one.measurement, score=one.score)
    study = optuna.create_study(direction="maximize")
    study.add_trial(
        optuna.trial.create_trial(value=0.6, user_attrs={**record.attributes(), "plan": PLAN.to_dict(), "more": 1})
    )
    state = status.of(study)
    todays = ["perplexity", "time_per_token_ms", "model_size_mb", "total_parameters", "plan"]
    assert in_order(state.to_dict()["best"], todays) == todays
    assert not {"more", "metrics", "tokens_per_sec", "kl_nats_per_token"} & set(state.to_dict()["best"])
    heading, trial = printed(tables.status_table(state))[-2:]
    columns = ["trial", "plan", "perplexity", "PerfNorm", "SpeedNorm", "Score", "MB"]
    assert in_order(heading, columns) == columns
    score = f"0.6000±{one.score.score_se:.4f}"
    assert in_order(trial, cells := ["★0", "3.200", score, "0.5"]) == cells
