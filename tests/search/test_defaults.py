"""The defaults list of a study file: names as they are written, and one line for what can't be composed."""

import pytest

from search.config import compose

BASE = "\nstudy_name: mine\nmodel: {source: x}\n"


@pytest.fixture
def studies(tmp_path, monkeypatch):
    """Write files below ./studies: {name: text}."""
    monkeypatch.chdir(tmp_path)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / "studies" / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


@pytest.mark.parametrize("name", ["off", "on", "no", "007", "1e3", "2026-01-01", "한국어"])
def test_a_name_is_taken_as_it_is_written(studies, name):
    files = {f"tracking__{name}": "experiment: chosen\n"}
    studies(mine=f"defaults:\n  - _base\n  - tracking: {name}\n  - _self_{BASE}", **files)
    assert compose.load("mine").tracking.experiment == "chosen"
    assert compose.load("demo", [f"tracking={name}"]).tracking.experiment == "chosen"


def test_tracking_off_needs_no_quotes(studies):
    studies(mine=f"defaults: [_base, tracking: off, _self_]{BASE}", quoted=f"defaults: [_base, tracking: 'off']{BASE}")
    assert not compose.load("mine").tracking.mlflow
    assert not compose.load("quoted").tracking.mlflow


def test_null_several_names_optional_and_override_work(studies):
    studies(
        first=f"defaults: [_base, {{evaluation: vllm}}, {{tracking: null}}, _self_]{BASE}",
        second="defaults: [first, {optional space: nosuch}, {override evaluation: transformers}, _self_]\ntrials: 3\n",
        third=f"defaults: [_base, {{evaluation: [vllm, vllm-compile]}}, _self_]{BASE}",
        fourth="defaults: [_base, {model@model: smollm2-135m}, _self_]\nstudy_name: mine\n",
    )
    assert compose.load("second").evaluation.backend == "transformers"
    assert compose.load("second").trials == 3
    assert compose.load("third").evaluation.compile
    assert compose.load("fourth").model.source == "smollm2-135m"
    assert compose.load("first", ["tracking=off"]).tracking.mlflow is False


def test_an_experiment_overrides_what_the_study_chooses(studies):
    studies(experiments__mine="# @package _global_\ndefaults: [{override /tracking: off}]\nexperiment_name: e\n")
    file = compose.load("demo", ["experiments=mine"])
    assert (file.experiment_name, file.tracking.mlflow) == ("e", False)


WRONG = {
    "a text": ("defaults: _base", "mine.yaml: defaults: is the text '_base'"),
    "a mapping": ("defaults: {model: x}", "mine.yaml: defaults: is a mapping"),
    "null": ("defaults:", "mine.yaml: defaults: is empty"),
    "false": ("defaults: off", "mine.yaml: defaults: is 'off'"),
    "a number": ("defaults: 3", "mine.yaml: defaults: is '3'"),
    "a nested list": ("defaults: [_base, [model]]", "entry 2: is a list"),
    "an empty entry": ("defaults: [_base, null]", "entry 2: is empty"),
    "an empty text": ("defaults: [_base, '']", "entry 2: is empty"),
    "an empty mapping": ("defaults: [_base, {}]", "entry 2: names 0 groups"),
    "two groups in one entry": ("defaults: [_base, {model: a, space: b}]", "entry 2: names 2 groups"),
    "a mapping for a name": ("defaults: [_base, {model: {a: b}}]", "'model': is a mapping"),
    "a nested list of names": ("defaults: [_base, {model: [[a]]}]", "'model': must list the names"),
    "an empty name": ("defaults: [_base, {model: ''}]", "'model: ': names no file"),
    "a missing file": ("defaults: [_base, {model: smollm2}]", "'model: smollm2': no such file in model; there are"),
    "a missing group": ("defaults: [_base, {modle: smollm2-135m}]", "no such group; there are .*did you mean 'model'"),
    "a missing study": ("defaults: [_bsae]", "'_bsae': no such file"),
    "a question": ("defaults: [_base, {model: '???'}]", "no such file in model"),
    "_self_ twice": ("defaults: [_self_, _base, _self_]", "'_self_': _self_ is named twice"),
    "a group twice": (
        "defaults: [_base, {model: smollm2-135m}, {model: exaone4-1.2b}]",
        "'model: exaone4-1.2b': the group model is named twice",
    ),
    "a misspelled keyword": (
        "defaults: [_base, {overide model: a}]",
        "'overide' is not one of .*did you mean 'override'",
    ),
    "an override of nothing": ("defaults: [_base, {override model: smollm2-135m}]", "overrides nothing"),
    "an override too early": (
        "defaults: [{override model: smollm2-135m}, _base]",
        "'override model: smollm2-135m': must come after '_base'",
    ),
    "an unknown package": ("defaults: [_base, {model@modle: smollm2-135m}]", "'modle' is no section.*mean 'model'"),
    "itself": ("defaults: [_base, mine]", "go round in a circle: mine → mine"),
    "a list key": ("defaults: [_base, {[a]: b}]", "can't be read as YAML|its group is a list|unhashable"),
    "unclosed": ("defaults: [_base", "mine.yaml: .*line 2"),
    "an interpolation to nothing": ("defaults: [_base, {model: '${nosuch}'}]", "mine"),
    "a tab": ("defaults:\n\t- _base", "mine.yaml: .*line"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_malformed_list_is_one_line_that_names_the_file_and_the_entry(studies, refused, tmp_path, case):
    text, said = WRONG[case]
    studies(mine=f"{text}{BASE}")
    line = refused("status", "--study", "mine", cwd=tmp_path)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(line)
    assert "studies/mine.yaml" in line or "'mine'" in line
    for raw in ("hydra", "Hydra", "OmegaConf", "ConfigComposition", "Traceback", "full_key", "object_type"):
        assert raw not in line


def bad(text):
    return {"mine": "defaults: [_base, {space: bad}]", "space__bad": text}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"mine": "defaults: [other]", "other": "defaults: [mine]\n"}, "circle: mine → other → mine"),
        (
            {"mine": "defaults: [other, {model: smollm2-135m}]", "other": "defaults: [_base, {model: exaone4-1.2b}]\n"},
            "chooses model too",
        ),
        (bad("[a]\n"), "space/bad.yaml: holds no KEY: VALUE lines"),
        (bad("a: b: c\n"), "space/bad.yaml: .*line 1"),
        (bad(b"\xff\xfe\xfd"), "space/bad.yaml: "),
        (bad("# @package spcae\na: 1\n"), "'spcae' is no section"),
        (bad("1: 2\n"), "space/bad.yaml: has the key 1"),
        (bad("a: 1\na: 2\n"), "space/bad.yaml: .*key 'a' twice"),
        (bad("x: ${nosuch}\n"), "space.x: refers to the key 'nosuch'"),
        (bad("x: ${a:b}\n"), "space.x: refers to something other"),
        (bad("x: ${a\n"), "its reference can't be read"),
        (bad("x: ${space.x}\n"), "can't be resolved"),
        (bad("defaults: [/model/nosuch]\n"), "bad.yaml: defaults: '/model"),
        (bad("hydra: {verbose: true}\n"), "space/bad.yaml: hydra: unknown key"),
    ],
)  # fmt: skip
def test_a_list_over_several_files_is_checked_in_each(studies, refused, tmp_path, files, said):
    studies(**{name: text + BASE if name == "mine" else text for name, text in files.items()})
    line = refused("status", "--study", "mine", cwd=tmp_path)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(line)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("tracking=true", "tracking=true: no such file; there are mlflow, off"),
        ("model=1", "model=1: no such file"),
        ("model=[smollm2-135m,x]", "no such file"),
        ("trials.x=3", "trials: Input should be a valid integer"),
        ("trials=[1", "can't be read"),
        ("space={a", "can't be read"),
        ("é=3", "unknown key"),
        ("a b=3", "unknown key"),
        ("=3", "unknown key"),
        ("~trials=3", "'~trials=3': can't be set"),
        ("+model=exaone4-1.2b", "model"),
        ("trials=range(3)", "trials"),
        ("trials=1,2", "names several values"),
        ("trials=choice(1,2)", "names several values"),
        ("model@x=smollm2-135m", "model@x"),
        ("description=${nosuch}", "description: refers to the key 'nosuch', which does not exist"),
        ("description=${a:b}", "refers to something other"),
        ("hydra.verbose=true", "hydra"),
    ],
)
def test_a_word_that_can_not_be_composed_is_one_line(refused, tmp_path, word, said):
    line = refused("status", word, cwd=tmp_path)
    assert said in line
    for raw in ("Hydra", "OmegaConf", "mismatched", "token", "full_key", "LexerNoViableAlt"):
        assert raw not in line
