"""Values of options are taken as they are; KEY=VALUE words follow Hydra's grammar, and need no quotes in any script."""

import click
import pytest

from search.cli import main as optuna_search
from search.cli.options import values_of
from search.config import compose, words

ODD = [
    "/모델/한국어",
    "étude 😀",
    "two words",
    " around ",
    "it's",
    'a "b"',
    "back\\slash\\",
    "${oc.env:HOME}",
    "\\${x}",
    "$x",
    "a,b",
    "{a: b}",
    "[a]",
    "(a)",
    "a=b",
    "#a",
    "-x",
    "--x",
    "~x",
    "+x",
    "a\nb",
    "null",
    "true",
    "off",
    "007",
    "1e3",
    "1..3",
    "@a",
    "a:b",
    "*",
    "???",
]


@pytest.mark.parametrize("text", ODD)
def test_a_word_made_of_a_text_is_read_as_that_text(text):
    word = words.word_of("description", text)
    assert words.readable(word) == word
    assert compose.references.restored(words.parsed(word).value()) == text


def test_an_option_sets_the_very_text(monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    keys = ("model__source", "storage", "export__for_transformers", "description")
    for text in ODD:
        given = dict.fromkeys(keys, text)
        for name in [*given]:  # one composition serves all texts: options are set after it
            assert values_of(**given)[name.replace("__", ".")] == text
    file = compose.load("demo", options=values_of(model__source="${oc.env:HOME}", storage="$x", description="a,b\n{#="))
    assert (file.model.source, file.storage, file.description) == ("${oc.env:HOME}", "$x", "a,b\n{#=")
    file = compose.load("demo", ["study_name=other"], options=values_of(study_name="étude\\한국어 [x]"))
    assert file.study_name == "étude\\한국어 [x]"


def text_options(command, path=()):
    for name, below in getattr(command, "commands", {}).items():
        yield from text_options(below, (*path, name))
    for one in command.params:
        kinds = (click.Path, click.types.StringParamType)
        if isinstance(one, click.Option) and isinstance(one.type, kinds) and one.name not in ("study", "config_dir"):
            yield command, one


@pytest.mark.parametrize(
    ("command", "option"), [pytest.param(*one, id=one[1].opts[0]) for one in text_options(optuna_search)]
)
def test_every_option_passes_the_text_on_as_it_is(command, option):
    for text in ODD:
        words_given = [f"{option.opts[0]}={text}" if option.opts[0].startswith("--") else f"{option.opts[0]}{text}"]
        if option.name == "experiment" and text.startswith("="):
            continue
        for other in command.params:
            if other.required and other is not option and isinstance(other, click.Option):
                words_given += [other.opts[0], "1"]
        context = command.make_context("x", [*words_given, "--study=demo"] if command.name != "report" else words_given)
        value = context.params[option.name]
        assert str(value[0] if isinstance(value, tuple) else value) == text


@pytest.mark.parametrize(
    ("words_given", "said"),
    [
        (["analyze", "--model", ""], "Invalid value for '--model': it is empty"),
        (["status", "--study-name", ""], "Invalid value for '--study-name': it is empty"),
        (["status", "--storage", ""], "Invalid value for '--storage': it is empty"),
        (["status", "--study", ""], "it is empty"),
        (["report", "-e", ""], "it is empty"),
        (["package", "--out", ""], "it is empty"),
        (["compress", "cast", "--dtype", "${oc.env:HOME}"], "'${oc.env:HOME}' is not one of"),
        (["compress", "quantize", "--scheme", "é"], "'é' is not one of"),
        (["compress", "drop-layers", "--keep-layers", "[1,x]"], "compression.keep_layers"),
    ],
)
def test_an_empty_or_impossible_value_is_refused_in_one_line(refused, tmp_path, words_given, said):
    assert said in refused(*words_given, cwd=tmp_path)


@pytest.mark.parametrize(
    ("words_given", "said"),
    [
        (["report", "-e", "x", "--plot", "p.png"], "leave out -e or --plot"),
        (["report", "-e", "x", "--print-only", "--json"], "leave out one of them"),
        (["report", "--print-only"], "add -e NAME, or leave out --print-only"),
        (["report", "-d", "two layers removed"], "add -e NAME, or leave out --description"),
        (["evaluate", "--baseline", "--model", "elsewhere"], "--baseline --model elsewhere: --baseline measures"),
        (["evaluate", "--baseline", "--run-name", "x"], "--baseline --run-name x: --baseline measures"),
    ],
)
def test_options_that_exclude_each_other_are_refused_in_one_line(refused, tmp_path, words_given, said):
    assert said in refused(*words_given, cwd=tmp_path)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("model.source=/모델/x", "/모델/x"),
        ("model.source=/модель x", "/модель x"),
        ("model.source=~/models", "~/models"),
        ("model.source=/a=b", "/a=b"),
        ("model.source=/a#b", "/a#b"),
        ("model.source=/a(b)", "/a(b)"),
        ("model.source=/it's", "/it's"),
        ("model.source=/a!b&c;d", "/a!b&c;d"),
        ("model.source=C:\\x", "C:\\x"),
        ('model.source="/모델, x"', "/모델, x"),
        ("description=😀", "😀"),
        ("text.search=[/모델/a.txt, b.txt]", ["/모델/a.txt", "b.txt"]),
        ("text={search: [/모델/a.txt]}", {"search": ["/모델/a.txt"]}),
        ("model.source=${oc.env:HOME}/모델", "${oc.env:HOME}/모델"),
        ("trials=3", 3),
    ],
)
def test_a_word_is_read_without_quotes_where_that_has_one_meaning(word, value):
    assert words.parsed(words.readable(word)).value() == value


def test_a_method_takes_its_options_as_they_are_and_words_still_win(cli, tmp_path, monkeypatch):
    from search.by_hand import multirun

    seen, multiruns = [], []

    def planned(files, *rest, **options):
        seen.append(files)
        multiruns.append(options["multirun"])
        raise compose.ConfigError("seen")

    monkeypatch.setattr(multirun, "plan_jobs", planned)
    cli("compress", "drop-layers", "--drop-from", "20,21", "--model", "/모델/${x}", "--study=demo", cwd=tmp_path)
    cli("compress", "cast", "--dtype", "float16", "compression.dtype=float32", "--study=demo", cwd=tmp_path)
    cli("compress", "drop-layers", "-m", "--keep-layers", "22,24", "--study=demo", cwd=tmp_path)
    ((first, again),), ((cast, _),), both = seen
    assert (first.compression.drop_from, first.model.source) == ([20, 21], "/모델/${x}")
    assert compose.load("demo", again[2:]) == first  # the words of the report make the same model
    assert cast.compression.dtype == "float32"
    assert [file.compression.keep_layers for file, _ in both] == [22, 24]
    assert multiruns == [False, False, True]


@pytest.mark.parametrize(
    ("student", "to"),
    [
        ("submit/model_drop28", "submit/model_kd_drop28"),
        ("submit/model", "submit/model_kd_model"),
        (".", "{above}/model_kd_drop4"),
        ("submit/..", "{above}/model_kd_drop4"),
        ("/", "/model_kd_model"),
    ],
)
def test_a_distilled_model_lies_beside_its_student(cli, tmp_path, monkeypatch, student, to):
    from search.by_hand import distill
    from search.setup import setting

    def made(prepared, student, tokens, to, *rest):
        raise compose.ConfigError(f"to {to}.")

    monkeypatch.setattr(setting, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(distill, "distill_model", made)
    (tmp_path / "model_drop4" / "submit").mkdir(parents=True)
    ended = cli("compress", "distill", "--student", student, "--study=demo", cwd=tmp_path / "model_drop4")
    assert f"to {to.format(above=tmp_path)}." in ended.err
