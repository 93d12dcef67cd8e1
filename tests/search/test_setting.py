"""Tests of a study's setting: its texts, which are read once and share nothing, its limits and its digests."""

import collections
import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from compressors.errors import CheckpointError, InfeasiblePlan
from compressors.statistics import second_moments
from compressors.steps import stream
from evaluator import texts
from evaluator.errors import EvaluationError
from search.by_hand import compress
from search.config import validation
from search.errors import ConfigError, UsageError
from search.say import silent
from search.setup import collect, keys, machine, own_text, setting
from search.setup import texts as setup_texts
from search.stages import measure


def prose(start, count):
    return "\n\n".join(
        f"Paragraph {number} of the text that a test has made itself says {number * number % 9973} and no word more."
        for number in range(start, start + count)
    )


@pytest.fixture
def prepared(tmp_path, pico_llama):
    (tmp_path / "fit.txt").write_text(prose(0, 120))
    (tmp_path / "search.txt").write_text(prose(1000, 80))

    def prepare(model=pico_llama, export=None, limits=None, space=None, warn=silent, **text):
        values = {
            "study_name": "texts",
            "outputs": str(tmp_path / "outputs"),
            "model": {"source": str(model)},
            "export": export or {},
            "limits": limits or {},
            "space": space or {},
            "evaluation": {"backend": "transformers", "device": "cpu"},
            "text": {
                "window": 32,
                "calibration_windows": 1,
                "moments_windows": 4,
                "shards": 2,
                "calibration": [str(tmp_path / "fit.txt")],
                "search": [str(tmp_path / "search.txt")],
                **text,
            },
        }
        return setting.prepare(validation.validate(values, "this test"), warn=warn)

    return prepare


@pytest.fixture
def read(monkeypatch):
    """Count how often each file is read."""
    counts = collections.Counter()
    read_documents = texts.read_documents

    def counted(paths):
        counts.update(Path(path).name for path in paths)
        return read_documents(paths)

    monkeypatch.setattr(texts, "read_documents", counted)
    return counts


def test_a_text_is_read_once_until_it_changes(prepared, read, tmp_path):
    (tmp_path / "report.txt").write_text(prose(2000, 80))
    whole = prepared(report=[str(tmp_path / "report.txt")])
    assert len(setup_texts.report_shards(whole.file, whole.texts)) == 2
    first = setup_texts.calibration_documents(whole.texts)
    assert read == {"fit.txt": 1, "search.txt": 1, "report.txt": 1}
    (tmp_path / "fit.txt").write_text(prose(100, 121))
    assert setup_texts.calibration_documents(prepared().texts) != first
    assert read["fit.txt"] == 2


def are_of(tokenizer, windows, digit):
    """Whether each window is of the file whose paragraphs have numbers of five digits that begin with `digit`."""
    return [bool(re.search(rf"\b{digit}\d{{4}}\b", tokenizer.decode(window))) for window in windows]


def shards_of(whole, digit):
    return are_of(whole.texts.moments.tokenizer, [window for (window,) in whole.texts.shards], digit)


def test_files_that_judge_take_turns_however_long_the_first_one_is(prepared, tmp_path):
    (tmp_path / "long.txt").write_text(prose(10_000, 4000))
    (tmp_path / "short.txt").write_text(prose(90_000, 80))
    names = [str(tmp_path / name) for name in ("long.txt", "short.txt")]
    alike = prepared(search=names, shards=8, windows_per_shard=1, window=64)
    assert shards_of(alike, 9) == [False, True] * 4
    heavier = prepared(search=dict(zip(names, (3.0, 1.0), strict=True)), shards=8, window=64)
    assert sum(shards_of(heavier, 9)) == 2
    assert sum(shards_of(heavier, 9)[:4]) == 1
    judged = prepared(report=names, shards=8, window=64)
    report = setup_texts.report_shards(judged.file, judged.texts)
    assert sum(are_of(judged.texts.moments.tokenizer, [window for (window,) in report], 9)) == 4


def test_moments_take_8192_tokens_of_each_domain_on_a_cpu_or_what_it_has(prepared, tmp_path):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text(prose(3000, 3000))
    short.write_text(prose(7000, 60))
    said = []
    both = prepared(calibration=[str(long), str(short)], moments_windows=None, warn=said.append).texts.moments.windows
    assert len(both["0-long"]) == 8192 // 32 == second_moments.windows_on("cpu", 32)
    tokens = sum(map(len, both["1-short"]))
    assert 0 < tokens < 8192
    assert [line for line in said if "1-short" in line and f"{len(both['1-short'])} windows" in line]
    with pytest.raises(
        EvaluationError, match=f"256 windows of 32 tokens were asked for.* makes {len(both['1-short'])}"
    ):
        _ = prepared(calibration=[str(long), str(short)], moments_windows=256).texts.moments.windows
    assert second_moments.windows_on("cuda", 1024) == 32
    assert second_moments.windows_on("cpu", 1 << 20) == 2  # what is fitted on one is judged on the other


def test_a_study_that_names_no_number_of_windows_is_the_one_that_names_that_number(prepared):
    space = {"intermediate_size": {"low": 64, "high": 96, "step": 32}, "repair": ["ridge"]}
    none, same, other = (prepared(space=space, moments_windows=count) for count in (None, 8192 // 32, 8))
    for key in (keys.definition, keys.fitted_to):
        assert key(none) == key(same) != key(other)
    assert keys.definition(none)["moments_windows"] == 256


@pytest.mark.parametrize(
    ("family", "weighed"), [("llama", False), ("qwen3", False), ("exaone4", True), ("gemma3_text", True)]
)
def test_keys_say_how_tokens_are_weighed_where_a_norm_follows(
    prepared, write_pico_model, tmp_path, monkeypatch, family, weighed
):
    of_model = prepared(model=write_pico_model(tmp_path / "model", family))
    by_size = dataclasses.replace(of_model.model.identity, intermediate_size=128)
    repaired = dataclasses.replace(by_size, repair="ridge")

    def named():
        return keys.plan_digest(of_model, repaired), keys.moments_key(of_model), keys.fitted_to(of_model)

    before, of_activations = named(), keys.plan_digest(of_model, by_size)
    monkeypatch.setattr(second_moments, "WEIGHTING", 0)
    assert [one != other for one, other in zip(before, named(), strict=True)] == [weighed] * 3
    assert keys.plan_digest(of_model, by_size) == of_activations


def test_weights_decide_what_repairs_are_fitted_to(prepared, tmp_path):
    (tmp_path / "more.txt").write_text(prose(50_000, 120))
    names = [str(tmp_path / name) for name in ("fit.txt", "more.txt")]
    alike, named = prepared(calibration=names), prepared(calibration=dict.fromkeys(names, 2.0))
    heavier = prepared(calibration=dict(zip(names, (1.0, 3.0), strict=True)), calibration_windows=4, window=64)
    repaired = dataclasses.replace(alike.model.identity, intermediate_size=128, repair="ridge")
    assert keys.plan_digest(named, repaired) == keys.plan_digest(alike, repaired)
    assert keys.plan_digest(heavier, repaired) != keys.plan_digest(
        prepared(calibration=names, calibration_windows=4, window=64), repaired
    )
    assert collect.moments_for(heavier, repaired).shares() == {"0-fit": 0.5, "1-more": 1.5}
    assert sum(are_of(heavier.texts.moments.tokenizer, heavier.texts.calibration_windows, 5)) == 3


def test_what_the_model_writes_shares_its_weight(prepared, monkeypatch):
    monkeypatch.setattr(own_text, "LENGTH", 40)
    monkeypatch.setattr(own_text, "AT_ONCE", 4)
    mixed = prepared(calibration={"embedded": 3.0, "self": 1.0})
    shares = mixed.texts.moments.shares
    kinds = [name for name in shares if name not in ("topics", "docstrings", "code")]
    assert math.isclose(sum(shares.values()), 4.0)
    assert math.isclose(sum(shares[name] for name in kinds), 1.0)
    assert len(kinds) >= 2


def test_second_moments_use_the_text_as_it_was_when_the_study_began(prepared, tmp_path, monkeypatch):
    first = prepared()
    plan = dataclasses.replace(first.model.identity, intermediate_size=128)
    repaired = dataclasses.replace(plan, repair="ridge")
    cut = collections.Counter()
    windows = texts.windows
    monkeypatch.setattr(texts, "windows", lambda *args, **more: cut.update(["cut"]) or windows(*args, **more))
    monkeypatch.setattr(setup_texts, "tokenizer_of", None)  # there is one already
    plain = keys.plan_digest(first, plan)
    assert not cut  # no moments are needed, and no text for them
    digest = keys.plan_digest(first, repaired)
    (tmp_path / "fit.txt").write_text(prose(0, 20) + "\n\n" + prose(500, 100))
    with_moments = collect.moments_for(
        dataclasses.replace(first, machine=dataclasses.replace(first.machine, threads=1)), repaired
    )
    assert with_moments.windows() == first.texts.moments.windows
    assert keys.plan_digest(first, repaired) == digest
    assert cut == {"cut": 1}
    monkeypatch.undo()
    second = prepared()  # the text beyond the one calibration window is another
    assert second.texts.calibration_windows == first.texts.calibration_windows
    assert keys.plan_digest(second, plan) == plain
    assert keys.plan_digest(second, repaired) != digest
    assert collect.moments_for(second, repaired).path != with_moments.path


@pytest.mark.parametrize("domain", ["topics", "docstrings", "code"])
def test_a_report_text_that_shares_text_with_the_calibration_is_refused(prepared, tmp_path, domain):
    document = setup_texts._embedded_domains()[domain][0]
    (tmp_path / "report.txt").write_text(prose(2000, 80) + "\n\n" + document.text)
    whole = prepared(calibration="embedded", report=[str(tmp_path / "report.txt")])
    with pytest.raises(UsageError, match=r"text\.calibration and text\.report share text"):
        setup_texts.report_shards(whole.file, whole.texts)


@pytest.mark.parametrize("part", ["calibration", "search"])
def test_shared_text_is_refused_for_search_and_report(prepared, tmp_path, part):
    (tmp_path / "other.txt").write_text(prose(70 if part == "calibration" else 1070, 80))
    whole = prepared(report=[str(tmp_path / "other.txt")])
    with pytest.raises(UsageError, match=rf"text\.{part} and text\.report share text"):
        setup_texts.report_shards(whole.file, whole.texts)
    if part == "calibration":
        with pytest.raises(UsageError, match=r"text\.calibration and text\.search share text"):
            prepared(search=[str(tmp_path / "other.txt")])


def keys_of(whole):
    plan = dataclasses.replace(whole.model.identity, intermediate_size=128, repair="ridge")
    return keys.definition(whole), keys.plan_digest(whole, plan), keys.moments_key(whole)


def test_what_the_search_text_holds_too_is_left_out_of_the_calibration_text_and_said(prepared, tmp_path):
    said = []
    before = prepared(warn=said.append, calibration_windows=20)
    assert not said
    (tmp_path / "mixed.txt").write_text(prose(0, 60) + "\n\n" + prose(1040, 1).upper() + "\n\n" + prose(60, 60))
    mixed = [str(tmp_path / "mixed.txt")]
    after = prepared(warn=said.append, calibration_windows=20, calibration=mixed)
    shared = prose(1040, 1)
    assert said == [
        f"text: 0.86% of text.calibration is in text.search too and is left out: mixed.txt:121 and search.txt:81 both "
        f'hold "{shared.upper()[:59]}…"'
    ]
    assert after.texts.shards == before.texts.shards  # the numbers of a study depend on the search text
    assert after.texts.digest == before.texts.digest
    documents = setup_texts.calibration_documents(after.texts)
    assert "\n\n".join(document.text for document in documents) == prose(0, 120)
    (windows,) = after.texts.moments.windows.values()
    assert all("1040" not in after.texts.moments.tokenizer.decode(window) for window in windows)
    assert keys_of(prepared(calibration_windows=20, calibration=mixed)) == keys_of(after)  # the same in a second run


def test_several_files_of_calibration_text_lose_only_what_is_shared(prepared, tmp_path):
    (tmp_path / "more.txt").write_text(prose(1000, 1))
    (tmp_path / "fit.txt").write_text(prose(0, 120) + "\n\n" + prose(1001, 1).replace(" ", "\n"))
    files = [str(tmp_path / name) for name in ("more.txt", "fit.txt")]
    with pytest.raises(UsageError, match=r"share text: 1\.70% of text\.calibration"):
        prepared(calibration=files, calibration_windows=2)
    (tmp_path / "fit.txt").write_text(prose(0, 220) + "\n\n" + prose(1001, 1).replace(" ", "\n"))
    whole = prepared(calibration=files, calibration_windows=2)
    assert [document.text[-40:] for document in setup_texts.calibration_documents(whole.texts)][-1] == prose(0, 220)[
        -40:
    ]
    assert list(whole.texts.moments.domains) == ["0-more", "1-fit"]
    assert whole.texts.moments.domains["0-more"] == []


def test_more_than_a_hundredth_is_refused_with_the_share_and_three_examples(prepared, tmp_path):
    (tmp_path / "fit.txt").write_text(prose(0, 96) + "\n\n" + prose(1010, 4))
    with pytest.raises(UsageError) as raised:
        prepared()
    message = str(raised.value)
    assert message.startswith(
        "text: text.calibration and text.search share text: 4.16% of text.calibration, where up to 1% is left out: "
        'fit.txt:193 and search.txt:21 both hold "Paragraph 1010 of '
    )
    assert [f"fit.txt:{193 + 2 * i} and search.txt:{21 + 2 * i} both hold" in message for i in range(4)] == [1, 1, 1, 0]
    assert message.endswith("take it out of one")
    assert "\n" not in message


@pytest.mark.parametrize("other", ["fit.txt", "search.txt"])
def test_what_calibration_or_search_saw_is_left_out_of_the_report_text(prepared, tmp_path, other):
    seen = (tmp_path / other).read_text().split("\n\n")[70]
    (tmp_path / "report.txt").write_text(prose(2000, 130))
    whole = prepared(report=[str(tmp_path / "report.txt")], shards=20)
    own = keys_of(whole)
    clean = setup_texts.report_shards(whole.file, whole.texts)
    (tmp_path / "report.txt").write_text(f"{seen}\n\n{prose(2000, 130)}")
    said = []
    assert setup_texts.report_shards(whole.file, whole.texts, said.append) == clean
    named = {
        "fit.txt": "0.74% of text.report is in text.calibration",
        "search.txt": "0.76% of text.report is in text.search",
    }
    assert [line.split(" too and is left out: ")[0] for line in said] == [f"text: {named[other]}"]
    assert keys_of(prepared(report=[str(tmp_path / "report.txt")], shards=20)) == own


def test_a_model_that_the_server_can_not_read_is_refused_before_the_first_trial(prepared, write_pico_model, tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ropes = {"sliding_attention": scaled, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    two_ropes = write_pico_model(tmp_path / "gemma3", "gemma3_text", rope_parameters=ropes)
    with pytest.raises(CheckpointError, match=r"4\.57\.3.*--for-transformers"):
        prepared(model=two_ropes, export={"for_transformers": "4.57.3"})
    assert prepared(model=two_ropes, export={"for_transformers": "5.17.0"}).model.family.model_type == "gemma3_text"


def test_a_plan_that_the_server_can_not_read_is_infeasible(prepared):
    head = {"precision": "W8A8", "lm_head": "8-bit"}
    for version, refused in (("4.57.3", True), ("5.17.0", False)):
        ready = prepared(export={"for_transformers": version})
        assert ready.infeasible(dataclasses.replace(ready.model.identity, precision="W8A8")) is None
        reason = ready.infeasible(dataclasses.replace(ready.model.identity, **head))
        assert (reason is not None and "no 8-bit lm_head before 0.20" in reason) is refused


def test_the_size_of_the_built_model_is_checked_against_the_limit(prepared, tmp_path):
    free = prepared()
    plan = dataclasses.replace(free.model.identity, precision="W8A8", keep_16_bit=4)
    made = compress.compress(compress.foresee(plan, free), free, tmp_path / "free", None)
    real = (made.path / "model.safetensors").stat().st_size
    foreseen = made.outcome.bytes
    assert foreseen < real  # the smallest projections would stay, the most sensitive ones do
    between = prepared(limits={"max_size_mb": (foreseen + real) / 2e6})
    with pytest.raises(InfeasiblePlan, match=r"^size: .* exceeds the limit of .*max_size_mb"):
        compress.compress(compress.foresee(plan, between), between, tmp_path / "between", None)
    assert not (tmp_path / "between").exists()
    exact = prepared(limits={"max_size_mb": real / 1e6})
    compress.compress(compress.foresee(plan, exact), exact, tmp_path / "exact", None)


def test_second_moments_that_do_not_fit_the_disk_are_refused_at_once(prepared, monkeypatch):
    ready = prepared()
    plan = dataclasses.replace(ready.model.identity, precision="W8A8", quantizer="gptq")
    needed = second_moments.file_bytes(ready.model.checkpoint, 1) + machine.SPARE_BYTES
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(CheckpointError, match=r"disk: second moments needs 0.05 GB .* free some"):
        collect.moments_for(ready, plan)
    assert not list((ready.outputs / "calibration").glob("*"))
    monkeypatch.undo()
    written = sum(file.stat().st_size for file in collect.moments_for(ready, plan).path.iterdir())
    assert written == pytest.approx(second_moments.file_bytes(ready.model.checkpoint, 1), rel=0.1)


def test_a_new_version_of_a_method_changes_the_digest_of_its_plans(prepared, monkeypatch):
    its = prepared()
    narrow = dataclasses.replace(its.model.identity, intermediate_size=96)
    plans = [dataclasses.replace(narrow, repair=repair) for repair in ("none", "ridge", "stream")]
    before = [keys.plan_digest(its, plan) for plan in plans]
    monkeypatch.setattr(stream, "VERSIONS", {**stream.VERSIONS, ("repair", "stream"): "stream 99"})
    assert [keys.plan_digest(its, plan) == was for plan, was in zip(plans, before, strict=True)] == [True, True, False]


def test_float32_weights_count_in_the_engines_dtype(prepared, write_pico_model, tmp_path):
    """vLLM casts float32 weights to 16 bits; transformers does not."""
    its = prepared(write_pico_model(tmp_path / "wide", "llama", dtype="float32"))
    halved = dataclasses.replace(its.model.identity, precision="bfloat16")
    shallow = dataclasses.replace(halved, num_hidden_layers=3)

    def ratios(backend):
        served = dataclasses.replace(its, machine=dataclasses.replace(its.machine, backend=backend))
        return [measure.predicted_ratio(served, plan) for plan in (its.model.identity, halved, shallow)]

    own, of_vllm = ratios("transformers"), ratios("vllm")
    assert own[:2] == [1.0, 0.75]  # half of a step is reading weights, and half of the bytes are left
    assert of_vllm[:2] == [1.0, 1.0]
    assert own[2] < of_vllm[2] < 1.0


@pytest.mark.parametrize(
    ("backend", "capability", "refused"),
    [("vllm", (9, 0), False), ("vllm", (12, 0), True), ("transformers", (12, 0), False), ("vllm", None, False)],
)
def test_a_scheme_that_the_gpu_can_not_start_is_infeasible(prepared, backend, capability, refused):
    its = prepared()
    machine = dataclasses.replace(its.machine, backend=backend, capability=capability)
    on_that_gpu = dataclasses.replace(its, machine=machine)
    reason = on_that_gpu.infeasible(dataclasses.replace(its.model.identity, precision="W8A8"))
    assert (reason is not None) is refused
    assert not refused or ("choose FP8_DYNAMIC" in reason and "12.0" in reason)
    assert on_that_gpu.infeasible(its.model.identity) is None


@pytest.mark.parametrize(
    ("target", "precision", "refused"),
    [
        ("L4", "W8A8", None),
        ("rtx5090", "W8A8", "RTX 5090 has compute capability 12.0"),
        ("T4", "bfloat16", "T4 has compute capability 7.5"),
        ("T4", "float16", None),
        (None, "W8A8", None),
    ],
)
def test_a_precision_that_the_target_gpu_cannot_run_is_infeasible(prepared, target, precision, refused):
    setting = prepared(export={"target_gpu": target})
    reason = setting.infeasible(dataclasses.replace(setting.model.identity, precision=precision))
    assert (reason is None) if refused is None else (refused in reason)


def test_an_unknown_target_gpu_is_refused_with_those_that_are_known(prepared):
    with pytest.raises(ConfigError, match=r"target_gpu: 'L5' is not one of V100, T4, .*leave it out"):
        prepared(export={"target_gpu": "L5"})
