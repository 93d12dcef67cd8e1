import itertools
import math
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from compressors.plan import CHOICES
from search.config import compose, validation
from search.config.compose import ConfigError
from search.config.space_section import Range
from search.config.study_file import StudyFile


def refused(*overrides: str, study: str = "demo") -> str:
    with pytest.raises(ConfigError) as caught:
        compose.load(study, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_base_study_file_holds_every_default():
    documented = yaml.safe_load((compose.PACKAGED / "_base.yaml").read_text())
    defaults = StudyFile(study_name="x", model={"source": "y"}).model_dump(mode="json")
    assert StudyFile(**documented | {"study_name": "x", "model": documented["model"] | {"source": "y"}}) == StudyFile(
        **defaults
    )
    del defaults["model"]["source"], defaults["study_name"]
    for section, name in itertools.product(("compression", "space"), CHOICES):  # generated: see tests/test_docs.py
        for values in (documented, defaults):
            values[section].pop(name, None)
    assert keys(documented) == keys(defaults)


def keys(values):
    """Return all keys, nested ones too."""
    return {name: keys(value) for name, value in values.items()} if isinstance(values, dict) else None


@pytest.mark.parametrize("name", compose.studies())
def test_packaged_studies_load(name):
    assert compose.load(name).study_name == name


def test_in_a_checkout_the_packaged_studies_are_no_one_s_own(monkeypatch):
    root = compose.PACKAGED.parent
    listed = subprocess.run(
        ["git", "ls-files", "studies/*.yaml"], cwd=root, capture_output=True, text=True
    ).stdout.split()
    names = {Path(name).stem for name in listed if Path(name).parts[:-1] == ("studies",)} - {"_base"}
    if not names:
        pytest.skip("no checkout")
    assert names == set(compose.SHIPPED)
    if set(compose.studies()) == names:
        monkeypatch.chdir(root)
        assert compose.default_study().name == compose.DEMO


def test_overrides_reach_nested_keys():
    file = compose.load(
        "demo", ["trials=7", "space.hidden_size=512", "space.intermediate_size={low: 1024, high: 1536, step: 256}",
                 "evaluation.workload.turns=5", "text.search=[a.txt, b.jsonl]", "limits.max_size_mb=200"]
    )  # fmt: skip
    assert file.trials == 7
    assert file.space.hidden_size == 512
    assert file.space.intermediate_size == Range(low=1024, high=1536, step=256)
    assert file.evaluation.workload.turns == 5
    assert file.text.search == ["a.txt", "b.jsonl"]
    assert file.limits.max_size_mb == 200


def test_another_file_of_the_model_group_can_be_chosen():
    assert compose.load("demo", ["model=exaone4-1.2b"]).model.source == "LGAI-EXAONE/EXAONE-4.0-1.2B"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trails=3", ["trails", "did you mean 'trials'"]),
        ("space.hiden_size=3", ["space.hiden_size", "did you mean 'hidden_size'"]),
        ("evaluation.workload.turn=5", ["evaluation.workload.turn", "did you mean 'turns'"]),
        ("trials=many", ["trials", "'many'"]),
        ("trials=0", ["trials", "greater than or equal to 1"]),
        ("space.precision=[W8A9]", ["space.precision", "'W8A9'", "did you mean 'W8A8'"]),
        ("space.precision=[]", ["space.precision", "at least one"]),
        ("space.intermediate_size.low=4000", ["space.intermediate_size", "low (4000) must not exceed high (1536)"]),
        ("space.intermediate_size={low: 1, high: 10, step: 4}", ["plus a multiple of step (4)"]),
        ("model=nope", ["model=nope", "smollm2-135m"]),
        ("trials", ["KEY=VALUE"]),
        ("score={weight_perf: 0, weight_speed: 0}", ["weight_perf and weight_speed are both 0"]),
        ("evaluation.call_timeout_s=inf", ["evaluation.call_timeout_s: Input should be a finite number (found inf)"]),
        ("score.weight_perf=inf", ["score.weight_perf: Input should be a finite number (found inf)"]),
        ("evaluation.perf=[{weight: inf}]", ["weight: Input should be a finite number (found inf)"]),
        ("limits.time=inf", ["limits.time: Input should be a finite number (found inf)"]),
    ],
)
def test_wrong_overrides_are_refused_with_the_key_and_a_hint(override, parts):
    text = refused(override)
    for part in parts:
        assert part in text


@pytest.mark.parametrize("head", ["space.lm_head=[16-bit,8-bit]", "compression.lm_head=8-bit"])
def test_an_8_bit_lm_head_is_refused_for_servers_that_can_not_read_it(head):
    text = refused(head, "export.for_transformers=4.57.3")
    assert "export.for_transformers: 4.57.3: vLLM reads no 8-bit lm_head before 0.20; choose 16-bit, or" in text
    for version in ("5.17.0", "null"):
        compose.load("demo", [head, f"export.for_transformers={version}"])


def test_an_unknown_study_is_refused_with_the_nearest_name():
    assert "did you mean 'demo'" in refused(study="dmo")


def test_the_users_study_files_come_first_and_extend_packaged_ones(tmp_path: Path, monkeypatch):
    own = tmp_path / "studies"
    own.mkdir()
    (own / "mine.yaml").write_text("defaults: [_base, {model: smollm2-135m}, _self_]\nstudy_name: mine\ntrials: 3\n")
    monkeypatch.chdir(tmp_path)
    assert compose.studies()[0] == "mine"
    file = compose.load("mine")
    assert (file.trials, file.model.source, file.pruner.p_threshold) == (3, "smollm2-135m", 0.1)
    (own / "wrong.yaml").write_text("defaults: [_base, _self_]\nstudy_name: wrong\nmodel: {source: x}\nsapce: {}\n")
    assert "sapce: unknown key; did you mean 'space'" in refused(study="wrong")


def test_a_depth_cut_can_only_be_repaired_by_stream(tmp_path):
    words = ["compression.method=drop_layers", "compression.keep_layers=28"]
    assert compose.load("demo", [*words, "compression.repair=stream"], tmp_path).compression.repair == "stream"
    with pytest.raises(ConfigError, match="ridge can't repair where only layers are dropped"):
        compose.load("demo", [*words, "compression.repair=ridge"], tmp_path)


def test_of_what_is_quantized_alone_the_scales_of_w4a16_can_learn(tmp_path):
    words = ["compression.method=quantize", "compression.scheme=W4A16"]
    assert compose.load("demo", [*words, "compression.repair=distill"], tmp_path).compression.repair == "distill"
    for others in (["compression.repair=stream"], ["compression.scheme=W8A8", "compression.repair=distill"]):
        with pytest.raises(ConfigError, match="mends what a cut took, and quantize alone cuts nothing"):
            compose.load("demo", [*words, *others], tmp_path)
    cut = ["compression.method=[quantize,reduce_ffn]", "compression.target_dim=96", "compression.repair=stream"]
    assert compose.load("demo", [*words, *cut], tmp_path).compression.repair == "stream"


@pytest.mark.parametrize(
    ("word", "same"),
    [
        ("space.num_hidden_layers=26..30", "space.num_hidden_layers={low: 26, high: 30}"),
        ("space.keep_16_bit=1..4", "space.keep_16_bit={low: 1, high: 4}"),
        ("space.precision=W8A8", "space.precision=[W8A8]"),
        ("space.group_size=64", "space.group_size=[64]"),
        ("text.calibration=mine.txt", "text.calibration=[mine.txt]"),
        ("evaluation.workload.batch_sizes=4", "evaluation.workload.batch_sizes=[4]"),
        ("evaluation.perf={metric: perplexity}", "evaluation.perf=[{metric: perplexity}]"),
        ("text.report=held_out.jsonl", "text.report=[held_out.jsonl]"),
        ("text.search=embedded", "text.search=embedded"),
    ],
)
def test_words_that_need_no_quotes_in_a_shell_mean_the_same(word, same):
    assert compose.load("demo", [word]) == compose.load("demo", [same])


@pytest.mark.parametrize(
    "word", ["space.num_hidden_layers=30..26", "space.num_hidden_layers=..", "space.hidden_size=a..b"]
)
def test_a_range_that_is_none_is_refused_by_its_key(word):
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        compose.load("demo", [word])


LAUGHS = "defaults: [demo]\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 20)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "mine.yaml: can't be read: it holds more than 200,000 values"),
        ("a: " + "[" * 5000, "mine.yaml: can't be read: it is nested more than 50 levels deep"),
        (
            "defaults: [demo]\n" + "".join(f"k{n}: 1\n" for n in range(60_000)),
            "holds 60,001 keys in one place (defaults, k0",
        ),
        ("defaults: [demo]\n" + "".join(f"k{n}: 1\n" for n in range(40)), "k0: unknown key; "),
        ("study_name: \udce9", "mine.yaml: can't be read: it is not UTF-8"),
        ("trials: 1\ntrials: 2", "it has the key 'trials' twice"),
        ("trials: !!python/object/apply:os.getcwd []", "it is not YAML of plain values"),
        ("- a", "mine.yaml: holds no KEY: VALUE lines"),
        ("defaults: [demo]\n1: 2", "has the key 1, which is no name"),
        ("defaults: [demo]\nstudy_name: !!set {a}", "holds a set"),
        ("defaults: [mine]", "go round in a circle"),
        ("defaults: [demo, {model: evil}]", "evil.yaml: can't be read: its alias *a is inside of what it repeats"),
    ],
)
def test_a_study_file_of_the_wrong_kind_is_refused_in_one_short_line(text, says, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "evil.yaml").write_text("a: &a [*a]")
    with pytest.raises(ConfigError) as caught:
        compose.load("mine", config_dir=tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_special_files_are_refused_wherever_a_study_names_them(tmp_path):
    (tmp_path / "experiments").mkdir()
    os.mkfifo(tmp_path / "experiments" / "02-05_fifo.yaml")
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for study, words in (("fifo", []), ("zero", []), ("demo", ["experiments=fifo"])):
        with pytest.raises(ConfigError, match=r"can't be read: it is a (FIFO|device)"):
            compose.load(study, words, config_dir=tmp_path)


def test_a_key_that_a_file_leaves_open_has_to_be_given(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [_base, _self_]\nstudy_name: ???\nmodel: {source: '???'}\n")
    with pytest.raises(ConfigError, match=r"^study 'mine': model.source, study_name: left open with \?\?\?; say m"):
        compose.load("mine", config_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"^study 'mine': study_name: left open"):
        compose.load("mine", ["model.source=m"], config_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"^study 'demo': text.search: left open with"):
        compose.load("demo", ["text.search=['???',a.txt]"])
    file = compose.load("mine", ["study_name=s"], config_dir=tmp_path, options={"model.source": "m"})
    assert (file.study_name, file.model.source) == ("s", "m")


def test_a_byte_order_mark_and_aliases_do_no_harm(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [demo, _self_]\ntrials: &n 7\nseed: *n\n", encoding="utf-8-sig")
    file = compose.load("mine", config_dir=tmp_path)
    assert (file.trials, file.seed) == (7, 7)


def test_an_override_with_a_number_of_thousands_of_digits_is_refused():
    with pytest.raises(ConfigError, match=r"exceeded maximum size|Exceeds the limit"):
        compose.load("demo", ["trials=" + "9" * 5000])


def with_text(**text):
    return validation.validate({"study_name": "s", "model": {"source": "m"}, "text": text}, "test").text


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, "this one is empty"),
        ({"a.txt": -2}, "a.txt has -2"),
        ({"a.txt": 1, "b.txt": "much"}, "b.txt has much"),
        ({"a.txt": math.inf}, "a.txt has inf"),
        ({"a.txt": True}, "a.txt has True"),
    ],
)
@pytest.mark.parametrize("key", ["calibration", "search", "report"])
def test_a_weight_of_a_text_is_a_number_above_0(key, value, says):
    with pytest.raises(ConfigError, match=rf"text\.{key}: a mapping gives each text a weight above 0, and {says}"):
        with_text(**{key: value})


def test_weights_are_read():
    assert with_text(search={"a.txt": 2, "b.txt": 0.5}).search == {"a.txt": 2.0, "b.txt": 0.5}
    with pytest.raises(ConfigError, match=r"are of text\.calibration alone"):
        with_text(search={"self": 1, "b.txt": 1})
