"""Tests of calibration text that the base model writes itself."""

import collections
import dataclasses
import io
import json
import math
import shutil
import threading
import time

import pytest
import rich.console

from compressors import build
from compressors.model.checkpoint import Checkpoint
from evaluator import texts
from evaluator.backends import EngineSettings
from evaluator.errors import BackendUnavailable, TextError
from evaluator.process import EngineProcess
from search.config import validation
from search.config.space_section import Space
from search.errors import ConfigError
from search.say import silent
from search.setup import keys, own_text, setting
from search.setup.texts import calibration_documents, tokenizer_of
from search.show import forecast_view
from search.stages import damage_plans, damage_table, screen
from search.stages.forecast import Forecast
from search.stages.step_times import StepTimes
from search.study import outlook


@pytest.fixture
def written(monkeypatch):
    """Count the documents that engines are asked to write."""
    counts = collections.Counter()
    generate = EngineProcess.generate

    def counted(self, prompts, limits):
        counts.update(documents=len(prompts))
        return generate(self, prompts, limits)

    monkeypatch.setattr(EngineProcess, "generate", counted)
    return counts


@pytest.fixture
def prepare(tmp_path, pico_llama, monkeypatch):
    monkeypatch.setattr(own_text, "LENGTH", 40)  # as many tokens as a test has time for
    monkeypatch.setattr(own_text, "AT_ONCE", 4)
    (tmp_path / "mine.txt").write_text("\n\n".join(f"Paragraph {i} says {i * i % 9973} and more." for i in range(90)))

    def prepared(outputs="outputs", warn=silent, **text):
        values = {
            "study_name": "own",
            "outputs": str(tmp_path / outputs),
            "model": {"source": str(pico_llama)},
            "evaluation": {"backend": "transformers", "device": "cpu"},
            "text": {"window": 32, "calibration_windows": 6, "moments_windows": 4, "shards": 2, "report": None, **text},
        }
        return setting.prepare(validation.validate(values, "this test"), warn=warn)

    return prepared


def test_the_model_writes_its_text_once_and_the_same_in_another_place(prepare, written):
    first = prepare(calibration="self")
    kinds = list(first.texts.moments.domains)
    assert set(kinds) >= {"begin", "starts"}
    assert all(len(windows) == 4 for windows in first.texts.moments.windows.values())
    asked = written["documents"]
    assert asked > 0
    again = prepare(calibration=["self"])
    assert written["documents"] == asked
    assert keys.moments_key(again) == keys.moments_key(first)
    elsewhere = prepare(calibration="self", outputs="elsewhere")
    assert written["documents"] == 2 * asked
    assert elsewhere.texts.moments.windows == first.texts.moments.windows


def test_some_of_each_kind_is_kept_from_every_fit(prepare, tmp_path):
    mine = str(tmp_path / "mine.txt")
    for calibration in ("self", [mine, "self"]):
        study = prepare(calibration=calibration)
        fitted = study.texts.moments.windows
        unseen = study.texts.unseen()
        kinds = [name for name in fitted if name != "0-mine"]
        assert len(unseen) == own_text.UNSEEN * len(kinds)
        assert all(len(window) == 32 for (window,) in unseen)
        tokenizer = study.texts.moments.tokenizer
        text = "".join(tokenizer.decode(window) for windows in fitted.values() for window in windows)
        assert not any(tokenizer.decode(window[4:20]) in text for (window,) in unseen)
    assert prepare(calibration=[mine]).texts.unseen() == ()


@pytest.mark.long
def test_a_distillation_learns_from_as_many_tokens_of_each_text_as_there_are(prepare, tmp_path, monkeypatch, written):
    mine = str(tmp_path / "mine.txt")
    monkeypatch.setattr("compressors.distillation.repair.TOKENS", 90 * 32)
    given = prepare(calibration=[mine])
    (windows,) = given.texts.distillation.windows.values()
    tokenizer = given.texts.moments.tokenizer
    every = texts.all_windows(tokenizer, given.texts.moments.domains["0-mine"], 32)
    assert windows == every if len(every) <= 90 else len(windows) == 90
    assert not written

    mixed = prepare(calibration=[mine, "self"])
    learned = mixed.texts.distillation.windows
    kinds = set(learned) - {"0-mine"}
    assert len(learned["0-mine"]) == min(len(every), math.ceil(90 / (1 + len(kinds))))
    assert 90 <= sum(map(len, learned.values())) <= 90 + len(learned)
    assert max(len(learned[kind]) for kind in kinds) - min(len(learned[kind]) for kind in kinds) <= 1
    flat = [tuple(window) for windows in learned.values() for window in windows]
    assert len(set(flat)) == len(flat)
    told = " ".join(tokenizer.decode(window) for window in flat)
    assert not any(tokenizer.decode(window[4:20]) in told for (window,) in mixed.texts.unseen())

    heavy = prepare(calibration={mine: 8, "self": 1}).texts.distillation.windows
    assert len(heavy["0-mine"]) == min(len(every), math.ceil(90 * 8 / 9))
    assert 90 <= sum(map(len, heavy.values())) <= 90 + len(heavy)
    alone = prepare(calibration="self").texts.distillation.windows
    assert set(alone) == kinds
    assert 90 <= sum(map(len, alone.values())) <= 90 + len(alone)


def test_what_a_distillation_learns_from_is_part_of_a_plans_digest(prepare, tmp_path, monkeypatch):
    study = prepare(calibration=[str(tmp_path / "mine.txt")])
    plan = dataclasses.replace(study.model.identity, intermediate_size=128, repair="distill")
    ridge = dataclasses.replace(plan, repair="ridge")
    before = [keys.plan_digest(study, one) for one in (plan, ridge)]
    monkeypatch.setattr("compressors.distillation.repair.TOKENS", 20 * 32)
    fewer = prepare(calibration=[str(tmp_path / "mine.txt")])
    after = [keys.plan_digest(fewer, one) for one in (plan, ridge)]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_model_that_writes_too_little_is_asked_once():
    asked = []

    def write(tokens, part):
        asked.append(tokens)
        raise TextError("too little")

    own = own_text.OwnText(write, None, 32, 4)
    for _ in range(2):
        with pytest.raises(TextError, match="too little"):
            own.fitted()
        assert own.unseen() == ()
    assert len(asked) == 1


def test_the_damage_table_shows_what_is_lost_on_own_text(prepare, tmp_path, monkeypatch):
    study = prepare(calibration=["self", str(tmp_path / "mine.txt")])
    space = Space(intermediate_size={"low": 96, "high": 160, "step": 32}, repair=["ridge"])
    study = dataclasses.replace(study, file=study.file.model_copy(update={"space": space}))
    screener = screen.Screener(study)
    table = damage_table.damage_table(study, screener, silent)
    assert table.entries
    assert all(entry.loss.own_kl > 0.0 for entry in table.entries)
    narrow, wide = sorted(table.entries, key=lambda entry: entry.plan.intermediate_size)[:: len(table.entries) - 1]
    assert narrow.loss.own_kl > wide.loss.own_kl
    assert damage_table.DamageTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    view = outlook.view(Forecast(study, None, table), 0.5, StepTimes(), with_front=False)
    assert [cost.own_kl for cost in view.costs] == [entry.loss.own_kl for entry in table.entries]
    console = rich.console.Console(width=160, record=True, file=io.StringIO())
    console.print(forecast_view.forecast_table(view))
    shown = console.export_text()
    assert forecast_view.OWN_KL in shown
    assert f"{narrow.loss.own_kl:.4f}" in shown

    plain = study.file.model_copy(update={"space": Space(intermediate_size={"low": 96, "high": 160, "step": 32})})
    built = []
    monkeypatch.setattr(screen.Screener, "unseen", lambda *arguments: built.append(arguments))
    unfitted = damage_table.damage_table(dataclasses.replace(study, file=plain), screener, silent)
    assert not built  # nothing is fitted, and so nothing need be written
    assert {entry.loss.own_kl for entry in unfitted.entries if entry.plan.repair == "none"} == {None}


@pytest.mark.long
def test_plans_that_need_no_text_of_the_model_are_scored_while_it_writes(prepare, tmp_path, monkeypatch):
    space = Space(num_hidden_layers={"low": 2, "high": 3}, intermediate_size=128, precision=["W8A8"], repair=["ridge"])

    def of(outputs):
        study = prepare(calibration=["self", str(tmp_path / "mine.txt")], outputs=outputs)
        return dataclasses.replace(study, file=study.file.model_copy(update={"space": space}))

    expected = damage_table.damage_table(of("one"), screen.Screener(of("one")), silent)
    study, told, scored = of("two"), [], []
    screener = screen.Screener(study)
    write, cheap = own_text.Writer.domains, screen.Screener.cheap
    started = threading.Event()

    def writing(self, *asked):
        assert started.wait(60.0)  # nothing waits for the text before this plan is scored
        return write(self, *asked)

    def scoring(self, plan, say):
        found = cheap(self, plan, say)
        scored.append(plan)
        started.set()
        return found

    monkeypatch.setattr(own_text.Writer, "domains", writing)
    monkeypatch.setattr(screen.Screener, "cheap", scoring)
    plans = damage_plans.wanted(study)
    damage_table.while_writing(study, screener, plans, told.append)
    assert scored
    assert not any(build.needs_moments(plan) for plan in scored)
    assert {plan.precision for plan in scored} >= {"W8A8"}
    assert damage_table.damage_table(study, screener, silent) == expected
    assert any(entry.loss.own_kl for entry in expected.entries)


def test_a_model_is_asked_once_by_two_threads():
    asked = []

    def write(tokens, part):
        asked.append(tokens)
        time.sleep(0.2)
        raise TextError("too little")

    own = own_text.OwnText(write, None, 32, 4)
    threads = [threading.Thread(target=own.unseen) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1


def test_another_engine_writes_where_the_first_one_fails(pico_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "LENGTH", 40)
    monkeypatch.setattr(own_text, "AT_ONCE", 4)

    def text_by(*engines):
        told = []
        digest, directory = Checkpoint.read(pico_llama).digest(), tmp_path / "-".join(engines)
        directory.mkdir()
        settings = EngineSettings("cpu")
        writer = own_text.Writer(
            pico_llama, digest, tokenizer_of(pico_llama), directory, engines, settings, told.append
        )
        return writer.domains(96), told

    expected, _ = text_by("transformers")
    found, told = text_by("nosuch", "transformers")
    assert found == expected
    assert any("'nosuch' is not one of" in line and "another engine writes it" in line for line in told)
    with pytest.raises(BackendUnavailable):
        text_by("nosuch")


def test_a_mix_holds_each_of_its_parts(prepare, tmp_path):
    mine = str(tmp_path / "mine.txt")
    mixed, alone = prepare(calibration=["self", mine, "embedded"]), prepare(calibration=[mine])
    assert list(alone.texts.moments.windows) == ["0-mine"]
    assert set(mixed.texts.moments.windows) >= {"1-mine", "topics", "docstrings", "code", "begin", "starts"}
    assert set(calibration_documents(alone.texts)) < set(calibration_documents(mixed.texts))


def test_a_mix_is_written_when_a_plan_rests_on_second_moments(prepare, tmp_path, written):
    mine = str(tmp_path / "mine.txt")
    mixed, alone = prepare(calibration=[mine, "self"]), prepare(calibration=[mine])
    plain = dataclasses.replace(mixed.model.identity, intermediate_size=128)
    repaired = dataclasses.replace(plain, repair="ridge")
    assert keys.plan_digest(mixed, plain) == keys.plan_digest(alone, plain)
    assert keys.definition(mixed) == keys.definition(alone)
    assert not written
    assert keys.plan_digest(mixed, repaired) != keys.plan_digest(alone, repaired)
    assert keys.moments_key(mixed) != keys.moments_key(alone)
    assert written
    mixed, alone = (
        dataclasses.replace(each, file=each.file.model_copy(update={"space": Space(repair=["none", "ridge"])}))
        for each in (mixed, alone)
    )
    assert keys.definition(mixed) != keys.definition(alone)


@pytest.mark.parametrize(
    ("template", "chats"),
    [
        ("{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %} <answer>", True),
        ("{{ raise_exception('a system message has to come first') }}", False),
        (None, False),
    ],
)
def test_a_model_is_asked_where_its_chat_template_takes_a_request(pico_llama, tmp_path, template, chats):
    model = shutil.copytree(pico_llama, tmp_path / "model")
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    tokenizer = tokenizer_of(model)
    found = own_text.kinds(tokenizer)
    assert list(found) == ["begin", "starts", *(["chat"] if chats else [])]
    for make in found.values():
        prompts, again = make(), make()
        some = [next(prompts) for _ in range(50)]
        assert all(some)
        assert some == [next(again) for _ in range(50)]
    if chats:
        assert tokenizer.decode(next(found["chat"]())).startswith("<user>")


def test_a_damaged_file_of_own_text_is_written_again(prepare, tmp_path, written):
    first = prepare(calibration="self")
    (file,) = (tmp_path / "outputs" / "calibration").glob("own-*.json")
    whole, asked = file.read_bytes(), written["documents"]
    file.write_bytes(whole[:-40])
    assert keys.calibration_key(prepare(calibration="self")) == keys.calibration_key(first)
    assert written["documents"] == 2 * asked
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("tokens", "worth"),
    [
        ([], False),
        (range(31), False),  # too short
        (range(32), True),
        ([7] * 200, False),
        (list(range(8)) * 20, False),  # a loop
        ([*range(60), *[7] * 40], True),
    ],
)
def test_what_is_empty_or_repeats_itself_is_dropped(tokens, worth):
    assert own_text.is_text(list(tokens)) is worth


def test_a_model_that_repeats_itself_is_given_up_in_one_line(prepare, monkeypatch):
    monkeypatch.setattr(own_text, "is_text", lambda tokens: False)
    with pytest.raises(TextError, match=r"text\.calibration: self: of \d+ tokens .* name texts of its languages"):
        prepare(calibration="self")


def test_a_mix_does_without_a_model_that_repeats_itself_and_says_so(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "is_text", lambda tokens: False)
    mine, said = str(tmp_path / "mine.txt"), []
    mixed = prepare(calibration=[mine, "self"], warn=said.append)
    assert not said
    assert list(mixed.texts.moments.windows) == ["0-mine"]
    (line,) = said
    assert line.startswith("text.calibration: self: of ")
    assert line.endswith("the other texts are used alone")


@pytest.mark.parametrize("key", ["search", "report"])
@pytest.mark.parametrize("value", ["self", ["self"], ["embedded", "mine.txt"]])
def test_a_model_is_not_judged_on_text_that_it_wrote(prepare, key, value):
    with pytest.raises(ConfigError, match=r"text\.calibration alone"):
        prepare(**{key: value})
