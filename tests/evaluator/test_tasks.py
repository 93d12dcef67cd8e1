import itertools
import json
import math
import subprocess
import sys
import types

import pytest
import torch
import transformers
from pydantic import ValidationError

from evaluator import quality, tasks
from evaluator.errors import BackendUnavailable, EvaluationError, NotFinite, TextError
from evaluator.generation import Answer, Limits
from evaluator.tasks import TaskResult, _continuations, _prompts, multiple_choice
from evaluator.tasks import lm_eval as ours


class Letters:
    """A tokenizer of characters, except for some pairs that are one token; ids are below 160, for the tiny model."""

    bos_token_id = 1
    eos_token_id = 2

    def __init__(self, pairs=(), leads=False):
        self.pairs, self.leads = pairs, leads

    def encode(self, text, add_special_tokens=True, verbose=True):
        found = [1] if self.leads and add_special_tokens else []
        while text:
            pair = text[:2] if text[:2] in self.pairs else text[0]
            found.append(128 + self.pairs.index(pair) if pair in self.pairs else ord(pair))
            text = text[len(pair) :]
        return found


class InMemory:
    """A model behind the one method that a task needs."""

    def __init__(self, model):
        self.model, self.batches = model, []

    def nll(self, windows):
        self.batches.append(len(windows))
        return [quality.window_nll(self.model, window).tolist() for window in windows]


class Table:
    """The nats of each token, whatever stands before it."""

    def __init__(self, **nats):
        self.nats = {ord(letter): value for letter, value in nats.items()}
        self.windows = []

    def nll(self, windows):
        self.windows += windows
        return [[self.nats.get(token, 1.0) for token in window[1:]] for window in windows]


def write(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def quiz(*files, tokenizer=None, max_tokens=None, **keys):
    section = multiple_choice.Section(files=[str(file) for file in files], **keys)
    return multiple_choice.load(section, tokenizer or Letters(), max_tokens=max_tokens)


def asked_of(task, folder, max_tokens=None, **keys):
    """Load a task of the harness."""
    return ours.load(ours.Section(task=task, include_path=str(folder), **keys), Letters(), max_tokens=max_tokens)


def item(question, choices, answer):
    return {"question": question, "choices": choices, "answer": answer}


def spelled(window):
    return "".join(map(chr, window))


QUESTIONS = [
    item("What is red?", ["a rose", "the sea", "snow"], 0),
    item("What is blue?", ["a rose", "the sea", "snow"], "the sea"),
    item("What is white?\n", ["a rose", "the sea", "snow"], "C"),
    item("Two and two:", ["four", "five"], 1),
    item("He said", [" yes", "\nno", "may be"], "B"),
]


def plain_mean(model, before, after):
    """Log-likelihood per token by growing prefixes, in float64: shares no code with what is tested."""
    total = 0.0
    ids = before + after
    for t in range(len(before), len(ids)):
        logits = model(torch.tensor([ids[:t]])).logits[0, -1].double()
        total += float(logits[ids[t]] - logits.logsumexp(0))
    return total / len(after)


@torch.no_grad()
def test_the_answers_are_those_of_a_plain_loop(tmp_path, tiny_model, engine):
    task = quiz(write(tmp_path / "quiz.jsonl", *QUESTIONS))
    said = []
    found = task.run(engine, said.append)
    follows = [
        ("What is red?", [" a rose", " the sea", " snow"], 0),
        ("What is blue?", [" a rose", " the sea", " snow"], 1),
        ("What is white?", ["\na rose", "\nthe sea", "\nsnow"], 2),
        ("Two and two:", [" four", " five"], 1),
        ("He said", [" yes", "\nno", " may be"], 1),
    ]
    correct = []
    for question, choices, answer in follows:
        means = [plain_mean(tiny_model, list(question.encode()), list(choice.encode())) for choice in choices]
        correct.append(float(max(range(len(means)), key=means.__getitem__) == answer))
    assert 0 < sum(correct) < 5
    assert found.correct == tuple(correct)
    assert found.value == sum(correct) / 5
    assert found.se == pytest.approx(math.sqrt(found.value * (1 - found.value) / 4))
    assert (found.items, found.digest, task.name) == (5, task.digest, "quiz")
    assert said == ["task quiz, window 1 of 14"]
    assert task.longest == len("What is white?\nthe sea")


@torch.no_grad()
def test_likelihoods_are_those_of_a_plain_loop(tiny_model):
    pairs = [("What is red?", " a rose"), ("He", " said"), ("", "x")]
    asked = [_continuations.encode(Letters(), before, after) for before, after in pairs]
    found = _continuations.log_likelihoods(InMemory(tiny_model), asked)
    assert [len(values) for values in found] == [7, 5, 1]
    for values, (before, after) in zip(found, pairs, strict=True):
        plain = plain_mean(tiny_model, list(before.encode()) or [1], list(after.encode()))
        assert math.fsum(values) / len(values) == pytest.approx(plain, rel=1e-4)


def test_the_mean_and_not_the_sum_decides(tmp_path):
    """Six tokens of 1 nat against one of 2, after the space's 1."""
    questions = [item("q", ["aaaaa", "b"], "aaaaa"), item("q", ["aaaaa", "c"], "c")]
    task = quiz(write(tmp_path / "a.jsonl", *questions))
    assert task.run(Table(b=2.0, c=0.9)).correct == (1.0, 1.0)


def test_ties_go_to_the_first(tmp_path):
    path = write(tmp_path / "a.jsonl", item("q", ["a", "b", "c"], 0), item("q", ["a", "b", "c"], 1))
    assert quiz(path).run(Table()).correct == (1.0, 0.0)


@pytest.mark.parametrize(
    ("choices", "answer", "index"),
    [
        (["yes", "no"], 1, 1),
        (["yes", "no"], "no", 1),
        (["yes", "no"], " no ", 1),
        (["yes", "no"], "B", 1),
        (["yes", "no"], "b", 1),
        (["B", "A"], "A", 1),  # the text of a choice comes before its letter
        (["x"] * 25 + ["y"], "Z", 25),
    ],
)
def test_an_answer_is_an_index_a_text_or_a_letter(tmp_path, choices, answer, index):
    task = quiz(write(tmp_path / "a.jsonl", item("q", choices, answer)))
    assert task.items[0].answer == index


GOOD = item("q", ["a", "b"], 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("[1]", "not a JSON object"),
        (json.dumps({"question": "q"}), "choices and answer is missing"),
        (json.dumps({**GOOD, "question": " "}), "question is ' '"),
        (json.dumps({**GOOD, "question": 3}), "question is 3"),
        (json.dumps({**GOOD, "choices": ["a"]}), "2 texts or more"),
        (json.dumps({**GOOD, "choices": "ab"}), "2 texts or more"),
        (json.dumps({**GOOD, "choices": ["a", ""]}), "the choice '' is no text"),
        (json.dumps({**GOOD, "choices": ["a", 4]}), "the choice 4 is no text"),
        (json.dumps({**GOOD, "answer": 2}), "answer is 2; it has to be an index from 0 to 1, a letter from A to B"),
        (json.dumps({**GOOD, "answer": -1}), "answer is -1"),
        (json.dumps({**GOOD, "answer": True}), "answer is True"),
        (json.dumps({**GOOD, "answer": "C"}), "answer is 'C'"),
        (json.dumps({**GOOD, "answer": None}), "answer is None"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = tmp_path / "quiz.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(TextError, match="line 3: ") as raised:
        quiz(path)
    assert str(raised.value).startswith(f"task quiz: {path}, line 3: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_files_without_a_question_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    for files, says in [
        ([tmp_path / "none.jsonl"], "No such file"),
        ([tmp_path / "latin.jsonl"], "not UTF-8"),
        ([tmp_path / "empty.jsonl"], "holds no question"),
    ]:
        with pytest.raises(TextError, match=says):
            quiz(*files)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "multiple_choice needs files: JSONL with question, choices and answer"),
        ({"files": ["a.jsonl"], "limit": 0}, "greater than or equal to 1"),
        ({"files": ["a.jsonl"], "task": "mine"}, "Extra inputs are not permitted"),
    ],
)
def test_keys_that_name_no_questions_are_refused(keys, says):
    with pytest.raises(ValidationError, match=says):
        multiple_choice.Section(**keys)


def test_a_task_of_the_harness_needs_its_name():
    with pytest.raises(ValidationError, match="lm_eval needs task: a task's name"):
        ours.Section(include_path="tasks")


def test_several_files_are_read_in_order_up_to_the_limit(tmp_path):
    files = [write(tmp_path / "a.jsonl", *QUESTIONS[:2]), write(tmp_path / "b.jsonl", *QUESTIONS[2:])]
    task = quiz(*files, limit=3, name="mine")
    assert (len(task.items), task.name) == (3, "mine")
    assert [spelled(i.choices[0].ids) for i in task.items][2] == "What is white?\na rose"


def test_a_line_separator_inside_a_string_ends_no_question(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(item("one\u2028two", ["a", "b"], 0), ensure_ascii=False), encoding="utf-8")
    assert len(quiz(path, tokenizer=transformers_like()).items) == 1


def transformers_like():
    class Bytes(Letters):
        def encode(self, text, add_special_tokens=True, verbose=True):
            return list(text.encode())

    return Bytes()


def test_the_digest_is_of_what_the_model_reads(tmp_path):
    path = write(tmp_path / "a.jsonl", *QUESTIONS)
    other = write(tmp_path / "b.jsonl", *QUESTIONS[:-1], {**QUESTIONS[-1], "answer": 0})
    digests = [
        quiz(path, name="renamed").digest,
        quiz(other).digest,
        quiz(path, limit=4).digest,
        quiz(path, max_tokens=12).digest,
        quiz(path, tokenizer=Letters(pairs=["ed"])).digest,
    ]
    assert len(set(digests)) == 5
    assert quiz(path).digest == digests[0]
    assert all(len(digest) == 16 for digest in digests)


# -- a choice after its question -----------------------------------------------------------------------------


def test_a_token_across_the_border_is_the_choices():
    """In "he said:" + " yes" the tokenizer makes one token of ": "."""
    merging = Letters(pairs=[": "])
    found = _continuations.encode(merging, "he said:", " yes")
    assert spelled(found.ids[: found.start]) == "he said"
    assert found.ids[found.start :] == (128, *map(ord, "yes"))
    apart = _continuations.encode(merging, "he said:", "\nyes")
    assert spelled(apart.ids[: apart.start]) == "he said:"


def test_white_space_at_the_end_goes_to_the_choice():
    found = _continuations.encode(Letters(pairs=[" y"]), "said: ", "yes")
    assert spelled(found.ids[: found.start]) == "said:"
    assert found.ids[found.start :] == (128, *map(ord, "es"))


def test_a_real_tokenizer_gives_back_question_and_choice(pico_llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(pico_llama)
    question, choice = "The statement is executed in the", " current namespace"
    found = _continuations.encode(tokenizer, question, choice)
    assert tokenizer.decode(found.ids) == question + choice
    assert tokenizer.decode(found.ids[found.start :]) == choice


def test_bos_leads_where_the_tokenizer_puts_it_or_nothing_else_can():
    assert _continuations.encode(Letters(leads=True), "q", " a") == _continuations.Continuation(
        (1, ord("q"), ord(" "), ord("a")), 2
    )
    assert _continuations.encode(Letters(), "", "a") == _continuations.Continuation((1, ord("a")), 1)
    merged = _continuations.encode(Letters(pairs=["q "]), "q", " a")
    assert merged == _continuations.Continuation((1, 128, ord("a")), 1)
    nameless = Letters()
    nameless.bos_token_id = nameless.eos_token_id = None
    with pytest.raises(TextError, match="neither BOS nor EOS"):
        _continuations.encode(nameless, "", "a")


def test_a_long_question_loses_its_beginning():
    found = _continuations.encode(Letters(), "abcdefgh", " xy", max_tokens=5)
    assert (spelled(found.ids), found.start) == ("gh xy", 2)
    led = _continuations.encode(Letters(leads=True), "abcdefgh", " xy", max_tokens=5)
    assert (spelled(led.ids), led.start) == ("\x01h xy", 2)
    assert spelled(_continuations.encode(Letters(), "ab", " xy", max_tokens=5).ids) == "ab xy"
    assert spelled(_continuations.encode(Letters(), "ab", " xy", max_tokens=4).ids) == "b xy"
    with pytest.raises(TextError, match="has 3 tokens, which max_tokens 3 leaves no room for"):
        _continuations.encode(Letters(), "ab", " xy", max_tokens=3)


def test_a_long_prompt_of_the_harness_loses_its_beginning_but_for_bos():
    def prompt(tokenizer, room):
        request = types.SimpleNamespace(args=("abcdefgh", {"max_gen_toks": 2}))
        return spelled(_prompts.encode(tokenizer, [request], room + 2)[0].ids)

    assert prompt(Letters(), 4) == "efgh"
    assert prompt(Letters(leads=True), 4) == "\x01fgh"
    assert prompt(Letters(leads=True), 9) == "\x01abcdefgh"
    with pytest.raises(TextError, match="leave no room for a prompt"):
        prompt(Letters(leads=True), 1)


def test_only_the_choices_tokens_count(tmp_path):
    """The question's own token of 1000 nats is the same for all choices, but not in a mean over all tokens."""
    path = write(tmp_path / "a.jsonl", item("zz", ["aaaa", "b"], "b"))
    table = Table(z=1000.0, b=0.5)
    assert quiz(path).run(table).correct == (1.0,)
    assert [spelled(window) for window in table.windows] == ["zz aaaa", "zz b"]


def test_windows_go_a_few_dozen_at_a_time(tmp_path, tiny_model):
    many = [item(f"question {i}?", ["yes", "no", "perhaps"], i % 3) for i in range(30)]
    task = quiz(write(tmp_path / "a.jsonl", *many))
    engine, said = InMemory(tiny_model), []
    found = task.run(engine, said.append)
    assert engine.batches == [32, 32, 26]
    assert said == ["task a, window 1 of 90", "task a, window 33 of 90", "task a, window 65 of 90"]
    assert found == task.run(engine)


def test_a_broken_models_answers_are_refused(tmp_path):
    task = quiz(write(tmp_path / "a.jsonl", GOOD))
    with pytest.raises(NotFinite, match=r"task a: .* broken"):
        task.run(Table(a=math.nan))


# -- what every kind's file has to offer ---------------------------------------------------------------------


def test_a_kind_is_a_file():
    assert tasks.names() == ["generation", "lm_eval", "multiple_choice"]
    with pytest.raises(EvaluationError, match="'trivia' is not one of generation, lm_eval, multiple_choice"):
        tasks.module_of("trivia")


@pytest.mark.parametrize("kind", tasks.names())
def test_every_kind_describes_its_keys_and_loads_them(kind):
    module = tasks.module_of(kind)
    assert callable(module.load)
    assert issubclass(module.Section, tasks.Section)
    for name, field in module.Section.model_fields.items():
        assert not field.is_required(), f"{name} is a key of parts of other kinds too: give it a default"


def test_kinds_that_share_a_key_agree_on_its_type():
    types = {}
    for kind in tasks.names():
        for name, field in tasks.module_of(kind).Section.model_fields.items():
            assert types.setdefault(name, field.annotation) == field.annotation, name


def test_reading_about_kinds_imports_nothing_heavy():
    program = (
        "import sys; from evaluator import tasks\n"
        "for name in tasks.names(): tasks.module_of(name)\n"
        "print([m for m in ('torch', 'lm_eval', 'transformers', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- lm-evaluation-harness -----------------------------------------------------------------------------------

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
num_fewshot: {shots}
metric_list:
{metrics}
"""


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """Write a task of the harness over QUESTIONS."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("lm_eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    numbered = [{**q, "answer": multiple_choice._index(q["answer"], q["choices"])} for q in QUESTIONS]
    data = write(tmp_path / "data.jsonl", *numbered)
    (tmp_path / "mine").mkdir()

    def make(name="mine", kind="multiple_choice", metrics=("acc", "acc_norm"), shots=0, path=data):
        listed = "\n".join(f"  - metric: {metric}" for metric in metrics)
        text = YAML.format(name=name, data=path, kind=kind, shots=shots, metrics=listed)
        (tmp_path / "mine" / f"{name}.yaml").write_text(text)
        return tmp_path / "mine"

    return make


@pytest.mark.parametrize(("metrics", "shots"), [(("acc", "acc_norm"), 0), (("acc",), 0), (("acc", "acc_norm"), 2)])
def test_the_harness_itself_says_the_same(harness, tiny_model, metrics, shots):
    """Its own `evaluate`, with the same model behind its own interface."""
    import lm_eval.evaluator
    import lm_eval.tasks

    folder = harness(metrics=metrics, shots=shots)
    engine = InMemory(tiny_model)
    task = asked_of("mine", folder)
    found = task.run(engine)

    of_the_harness = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).load(["mine"])
    of_the_harness["tasks"]["mine"].set_fewshot_seed(1234)
    logged = lm_eval.evaluator.evaluate(
        ours.language_model(engine, Letters()), of_the_harness, bootstrap_iters=0, log_samples=True
    )
    assert found.value == pytest.approx(logged["results"]["mine"][f"{metrics[-1]},none"])
    assert list(found.correct) == [sample[metrics[-1]] for sample in logged["samples"]["mine"]]
    assert found.items == 5
    assert found == task.run(engine)  # the same few-shot examples, and nothing left over from the first run
    assert found.digest == asked_of("mine", folder).digest


@torch.no_grad()
def test_the_harness_gets_likelihoods_of_a_plain_loop(harness, tiny_model):
    task = asked_of("mine", harness(), limit=2)
    answers = ours.language_model(InMemory(tiny_model), Letters()).loglikelihood(task.task.instances)
    choices = [" a rose", " the sea", " snow"]
    pairs = itertools.product(["What is red?", "What is blue?"], choices)
    plain = [plain_mean(tiny_model, list(q.encode()), list(c.encode())) * len(c) for q, c in pairs]
    assert [value for value, _ in answers] == pytest.approx(plain, rel=1e-4)
    assert task.longest == len("What is blue? the sea")


@torch.no_grad()
def test_rolling_likelihood_predicts_each_token_once(harness, tiny_model):
    class Request:
        args = ("abcdefg",)

    (found,) = ours.language_model(InMemory(tiny_model), Letters(), max_tokens=4).loglikelihood_rolling([Request])
    plain = sum(plain_mean(tiny_model, [1], list(part.encode())) * len(part) for part in ("abc", "def", "g"))
    assert found == pytest.approx(plain, rel=1e-4)


def test_tasks_that_need_more_than_likelihoods_are_refused(harness):
    folder = harness("graded", kind="generate_until", metrics=["code_eval"])
    harness("greedy", kind="loglikelihood", metrics=["acc"])
    harness("other", metrics=["brier_score"])
    for name, says in [
        ("greedy", "is the likeliest text"),
        ("other", "neither acc_norm"),
    ]:
        with pytest.raises(EvaluationError, match=says) as raised:
            asked_of(name, folder)
        assert "\n" not in str(raised.value)


WRITES = """\
task: writes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {kwargs}
num_fewshot: 0
filter_list:
  - name: last
    filter: [{{function: regex, regex_pattern: "=> ([a-z ]+)"}}, {{function: take_first}}]
  - name: other
    filter: [{{function: regex, regex_pattern: "(nothing at all)"}}, {{function: take_first}}]
metric_list:
  - {{metric: {metric}, aggregation: mean, higher_is_better: true{more}}}
"""


class Writer(Table):
    """Writes fixed texts, and notes what it was asked."""

    def __init__(self, *texts):
        super().__init__()
        self.texts, self.asked = texts, []

    def generate(self, prompts, limits):
        self.asked += list(zip(prompts, limits, strict=True))
        return [Answer(tuple(range(len(text))), text, "stop", 0.0, 0.1, 0.2) for text in self.texts]


@pytest.fixture
def writing(harness, tmp_path):
    """Write a task of the harness over QUESTIONS whose answers are generated."""
    folder = harness()

    def make(kwargs='{until: ["\\n", Q], do_sample: false, max_gen_toks: 12}', metric="exact_match", more=""):
        text = WRITES.format(data=tmp_path / "data.jsonl", kwargs=kwargs, metric=metric, more=more)
        (folder / "writes.yaml").write_text(text)
        return folder

    return make


TEXTS = ("so => a rose", "=> snow", "snow", "I say => five", "=> may be")


def test_answers_that_the_harness_judges_are_written_by_the_engine(writing):
    """The accuracy is what its own `evaluate` finds with its own filters, the first of which counts."""
    import lm_eval.evaluator
    import lm_eval.tasks

    folder = writing()
    task, engine = asked_of("writes", folder), Writer(*TEXTS)
    found = task.run(engine)
    assert found.correct == (1.0, 0.0, 0.0, 1.0, 0.0)
    assert [limits for _, limits in engine.asked] == [Limits(12, ("\n", "Q"))] * 5
    assert spelled(engine.asked[0][0]) == "Q: What is red? A:"
    assert found.answers.tokens == tuple(map(len, TEXTS))
    assert (found.answers.shown[1].question, found.answers.shown[1].expected) == ("Q: What is blue? A:", "the sea")
    assert task.longest == len("Q: What is white?\n A:") + 12

    of_the_harness = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).load(["writes"])
    logged = lm_eval.evaluator.evaluate(
        ours.language_model(Writer(*TEXTS), Letters()), of_the_harness, bootstrap_iters=0, log_samples=True
    )
    assert logged["results"]["writes"]["exact_match,last"] == found.value
    assert logged["results"]["writes"]["exact_match,other"] == 0.0


def test_what_can_not_be_judged_or_must_not_run_is_refused(writing):
    with pytest.raises(EvaluationError, match="task writes: its metric runs code that a model wrote"):
        asked_of("writes", writing(metric="code_eval"))
    with pytest.raises(TextError, match=r"task writes: its generation_kwargs are .* make no sense"):
        asked_of("writes", writing("{until: ['x'], max_gen_toks: 0}"))
    with pytest.raises(TextError, match="its answers of 12 tokens leave no room for a prompt in 12"):
        asked_of("writes", writing(), max_tokens=12)
    short = asked_of("writes", writing(), max_tokens=15)
    engine = Writer(*TEXTS)
    short.run(engine)
    assert {spelled(prompt) for prompt, _ in engine.asked} == {" A:"}


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        ({}, Limits(256)),
        ({"until": "\n", "max_new_tokens": 7}, Limits(7, ("\n",))),
        ({"until": ["a", ""], "max_tokens": 7, "max_gen_toks": "9"}, Limits(9, ("a",))),
        ({"until": None, "do_sample": False, "temperature": 0.7}, Limits(256)),
        ({"do_sample": True, "temperature": 0.7}, Limits(256, (), 0.7)),
    ],
)
def test_the_harness_names_limits_in_several_ways(arguments, limits):
    assert _prompts.limits_of(arguments) == limits


def test_tasks_that_do_not_exist_are_refused(harness, tmp_path):
    folder = harness("lost", path=tmp_path / "none.jsonl")
    for name, where, says in [
        ("mine", folder, "holds lost and not that one"),
        ("lost", folder, "can't be read .*none.jsonl"),
        ("mine", tmp_path / "nowhere", "no folder"),
    ]:
        with pytest.raises(TextError, match=says) as raised:
            asked_of(name, where)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["task: [", "task: mine\ndataset_path: json\n", "\xff\xfe\x00"])
def test_a_damaged_task_file_is_refused(harness, text):
    folder = harness()
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(EvaluationError, match="task mine: ") as raised:
        asked_of("mine", folder)
    assert "\n" not in str(raised.value)


def test_a_prompt_that_does_not_fit_is_refused(harness):
    with pytest.raises(TextError, match="task mine: ' a rose' has 7 tokens, which max_tokens 5 leaves no room for"):
        asked_of("mine", harness(), max_tokens=5)
    assert asked_of("mine", harness(), max_tokens=10).longest == 10


def test_a_task_of_the_harness_can_be_renamed(harness):
    folder = harness()
    plain, renamed = asked_of("mine", folder), asked_of("mine", folder, name="short")
    assert (plain.name, renamed.name) == ("mine", "short")
    assert renamed.digest == plain.digest


def test_the_limit_holds_for_the_harness_too(harness, tiny_model):
    found = asked_of("mine", harness(), limit=2).run(InMemory(tiny_model))
    assert isinstance(found, TaskResult)
    assert found.items == 2


def test_a_missing_harness_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BackendUnavailable, match=r"pip install '\.\[lm-eval\]'"):
        asked_of("mine", tmp_path)


def test_the_bundled_choices_have_one_right_answer_each():
    lines = [json.loads(line) for line in multiple_choice.EXAMPLE_FILE.read_text().splitlines()]
    assert len(lines) == 20
    for line in lines:
        assert len(set(line["choices"])) == 4
        assert 0 <= line["answer"] < 4
    assert len({line["answer"] for line in lines}) >= 3  # a model that always takes the first fails
