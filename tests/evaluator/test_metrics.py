"""The records of `evaluator.measurement` give the names, the order and the text that people are used to."""

import pytest

from evaluator.measurement import METRICS, OF_ANSWERS
from evaluator.metrics import COUNT, SCORE_COLUMN, Metric, Shown, shown

NUMBERS = {
    "perplexity": 1234.56789,
    "kl_nats_per_token": 0.123456,
    "top1_agreement": None,
    "time_per_token_ms": 2.34567,
    "tokens_per_sec": 1426.31,
    "model_size_mb": 2558.83,
    "total_parameters": 1_279_391_488,
}


def in_place(kind):
    found = [(each, name) for name, each in shown(METRICS, kind).items() if name not in OF_ANSWERS]
    assert len({each.place for each, _ in found}) == len(found)
    return found


def test_a_trial_has_these_attributes_in_this_order():
    assert [name for name, metric in METRICS.items() if metric.attribute] == [
        "perplexity",
        "kl_nats_per_token",
        "top1_agreement",
        "time_per_token_ms",
        "tokens_per_sec",
        "model_size_mb",
        "total_parameters",
        "tokens_per_answer",
        "length_ratio",
        "seconds_per_answer",
    ]


def test_status_has_these_numbers_in_this_order():
    assert [name for name, metric in METRICS.items() if metric.status] == [
        "perplexity",
        "kl_nats_per_token",
        "time_per_token_ms",
        "model_size_mb",
        "total_parameters",
        "tokens_per_answer",
        "length_ratio",
        "seconds_per_answer",
    ]


def test_mlflow_has_the_manuals_names():
    by_kind = {
        kind: {name for name, metric in METRICS.items() if metric.mlflow == kind} for kind in ("metric", "parameter")
    }
    assert by_kind == {
        "metric": {"tokens_per_sec", "time_per_token_ms", "perplexity", *OF_ANSWERS},
        "parameter": {"number_of_layers", "number_of_heads", "hidden_dim", "total_parameters", "model_size_mb"},
    }


def test_a_table_of_models_has_these_columns_and_cells():
    columns = in_place("column")
    before = [each.title for each, _ in columns if each.place < SCORE_COLUMN]
    after = [each.title for each, _ in columns if each.place > SCORE_COLUMN]
    assert (before, after) == (["params", "perplexity", "KL", "ms/token"], ["MB"])
    cells = [each.text(NUMBERS[name]) for each, name in columns]
    assert cells == ["1.28B", "1,234.568", "0.1235", "2.346", "2558.8"]


def test_a_report_has_these_rows():
    rows = in_place("row")
    assert [(each.title, each.text(NUMBERS[name], 0.01)) for each, name in rows] == [
        ("parameters", "1.28B"),
        ("model_size_mb", "2558.8"),
        ("perplexity", "1,234.5679"),
        ("time_per_token_ms", "2.3457 ± 0.0100"),
        ("tokens_per_sec", "1,426.3"),
        ("KL to the base, nats per token", "0.12346"),
        ("top-1 agreement with the base", "–"),
    ]
    assert {name: metric.base_text for name, metric in METRICS.items() if metric.base is not None} == {
        "kl_nats_per_token": "0",
        "top1_agreement": "1",
        "length_ratio": "1",
    }


def test_what_is_known_of_answers_alone_stands_beside_the_time():
    assert OF_ANSWERS == ("tokens_per_answer", "length_ratio", "seconds_per_answer")
    for kind, titles in [
        ("column", ["ms/token", "s/answer", "length"]),
        ("front", ["length"]),
        ("note", ["time per token", "time per answer", "tokens per answer", "length of answers, over the baseline's"]),
    ]:
        known = shown(METRICS, kind)
        assert [one.title for name, one in known.items() if name in (*OF_ANSWERS, "time_per_token_ms")] == titles
        assert len({one.place for one in known.values()}) == len(known)


def test_a_pareto_front_has_these_columns():
    columns = [(each.title, each.place < SCORE_COLUMN, each.text(NUMBERS[name])) for each, name in in_place("front")]
    assert columns == [("perplexity", True, "1234.568"), ("MB", False, "2558.8")]


def test_a_trials_note_has_these_rows():
    rows = [(each.title, METRICS[name].with_unit(each.text(NUMBERS[name]))) for each, name in in_place("note")]
    assert rows == [
        ("perplexity", "1234.568"),
        ("time per token", "2.346 ms"),
        ("size", "2558.8 MB"),
        ("parameters", "1,279,391,488"),
        ("KL to the base", "0.1235 nats per token"),
    ]


@pytest.mark.parametrize("record", [{"status": True}, {"attribute": True, "front": Shown("t", 1, ".2f")}])
def test_a_metric_that_the_storage_lacks_can_not_be_shown_of_a_trial(record):
    with pytest.raises(ValueError, match="needs"):
        Metric(**record)


@pytest.mark.parametrize(("count", "text"), [(134_500_000, "134.5M"), (999_999_999, "1000.0M"), (10**9, "1.00B")])
def test_a_count_is_written_in_millions_or_billions(count, text):
    assert Shown("parameters", 0, COUNT).text(count) == text


def test_an_error_is_written_only_where_it_is_asked_for():
    assert Shown("t", 0, ".2f").text(1.0, 0.5) == "1.00"
    assert Shown("t", 0, ".2f", with_error=True).text(1.0) == "1.00"
