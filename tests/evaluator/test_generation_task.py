import json

import pytest
import transformers
from pydantic import ValidationError

from evaluator import tasks
from evaluator.errors import TextError
from evaluator.generation import Answer, Limits
from evaluator.task_result import TaskResult
from evaluator.tasks import generation

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if not enable_thinking | default(true) %}<quick>{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Parrot:
    """Writes fixed texts, one a question, and notes what it was asked."""

    def __init__(self, *texts, finish="stop"):
        self.texts, self.finish, self.calls, self.limits = list(texts), finish, [], []

    def generate(self, prompts, limits):
        self.calls.append([list(prompt) for prompt in prompts])
        self.limits.append(limits)
        found, self.texts = self.texts[: len(prompts)], self.texts[len(prompts) :]
        return [Answer(tuple(range(len(text))), text, self.finish, 0.0, 0.1, 0.2) for text in found]


@pytest.fixture(scope="module")
def tokenizer(pico_llama):
    return transformers.AutoTokenizer.from_pretrained(pico_llama)


@pytest.fixture
def chatty(pico_llama):
    found = transformers.AutoTokenizer.from_pretrained(pico_llama)
    found.chat_template = TEMPLATE
    return found


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def load(tokenizer, *files, max_length=None, **keys):
    return generation.load(generation.Section(files=list(map(str, files)), **keys), tokenizer, max_tokens=max_length)


def test_answers_are_scored_by_their_match(tmp_path, tokenizer):
    path = write(
        tmp_path / "quiz.jsonl",
        {"prompt": "3 + 4?", "answer": 7, "match": "numeric", "id": "sum"},
        {"prompt": "The rose is", "answers": ["red", "white"]},
        {"prompt": "A or B?", "answer": "B", "match": "choice"},
        {"prompt": "Who?", "answer": "Ada Holm", "match": "f1"},
        {"prompt": "Where?", "answer": "Paris"},
    )
    task = load(tokenizer, path, max_tokens=9, stop=["\n"])
    engine = Parrot("It is 7.", "white, I think", "(A)", "Holm", "")
    found = task.run(engine)
    assert found.correct == (1.0, 1.0, 0.0, pytest.approx(2 / 3), 0.0)
    assert found.value == pytest.approx(sum(found.correct) / 5)
    assert found.digest == task.digest
    assert engine.limits == [Limits(9, ("\n",))]
    assert found.answers.tokens == (8, 14, 3, 4, 0)
    assert found.answers.empty == 0.2
    assert [shown.text for shown in found.answers.shown] == ["It is 7.", "white, I think", "(A)", "Holm", ""]
    assert (found.answers.shown[1].question, found.answers.shown[1].expected) == ("The rose is", "red | white")
    assert TaskResult.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_plain_prompt_is_continued_where_there_is_no_chat_template(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "The rose is", "answer": "red", "system": "You know."})
    (question,) = load(tokenizer, path).questions
    assert tokenizer.decode(question.ids) == "You know.\n\nThe rose is"


def test_chats_are_rendered_by_the_tokenizers_own_template(tmp_path, chatty):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    path = write(
        tmp_path / "a.jsonl",
        {"prompt": "The rose is", "answer": "red", "system": "You know."},
        {"messages": [*messages, {"role": "user", "content": "Red?"}], "answer": "yes"},
    )
    plain = "<system>You know.<user>The rose is", "<user>Hi<assistant>Yes?<user>Red?"
    task = load(chatty, path)
    assert [chatty.decode(question.ids) for question in task.questions] == [f"{text}<assistant>" for text in plain]
    assert task.questions[1].text == "Red?"
    quick = load(chatty, path, template={"enable_thinking": False})
    assert [chatty.decode(question.ids) for question in quick.questions] == [
        f"{text}<quick><assistant>" for text in plain
    ]
    assert quick.digest != task.digest
    with pytest.raises(TextError, match="line 2: has messages, and template is false"):
        load(chatty, path, template=False)


def test_a_template_that_fails_is_told_in_a_line(tmp_path, chatty):
    chatty.chat_template = "{{ raise_exception('only\\nassistants') }}"
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "answer": "y"})
    with pytest.raises(TextError, match=r"line 1: .*only assistants") as raised:
        load(chatty, path)
    assert "\n" not in str(raised.value)


GOOD = {"prompt": "q", "answer": "a"}
ASKED = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        (json.dumps({**GOOD, "reply": "a"}), "'reply' is no key of a question; there are messages, prompt"),
        (json.dumps({**GOOD, "messages": [ASKED]}), "has both prompt and messages; keep one of the two"),
        (json.dumps({"answer": "a"}), "has neither prompt nor messages"),
        (json.dumps({"prompt": "q"}), "has neither answer nor answers"),
        (json.dumps({**GOOD, "answers": ["a"]}), "has both answer and answers"),
        (json.dumps({"prompt": "q", "answers": []}), "answers is []"),
        (json.dumps({"prompt": "q", "answers": "a"}), "answers is 'a'"),
        (json.dumps({"prompt": "q", "answers": ["a", " "]}), "the answer ' ' is no text"),
        (json.dumps({"prompt": "q", "answer": None}), "the answer None is no text"),
        (json.dumps({"prompt": "q", "answer": True}), "the answer True is no text"),
        (json.dumps({**GOOD, "match": "numeric"}), "the answer 'a' holds no number"),
        (json.dumps({**GOOD, "match": "regex"}), "match is 'regex'; it has to be one of exact"),
        (json.dumps({**GOOD, "match": ["exact"]}), "match is ['exact']"),
        (json.dumps({**GOOD, "prompt": ""}), "prompt is ''"),
        (json.dumps({**GOOD, "prompt": 3}), "prompt is 3"),
        (json.dumps({**GOOD, "system": 3}), "system is 3"),
        (json.dumps({"messages": [], "answer": "a"}), "messages is []"),
        (json.dumps({"messages": [{"role": "user"}], "answer": "a"}), "needs role (system, user, assistant)"),
        (json.dumps({"messages": [{**ASKED, "role": "tool"}], "answer": "a"}), "needs role"),
        (json.dumps({"messages": [{**ASKED, "role": ["user"]}], "answer": "a"}), "needs role"),
        (json.dumps({"messages": [{**ASKED, "content": 3}], "answer": "a"}), "content is 3"),
        (json.dumps({"messages": [ASKED, {**ASKED, "role": "assistant"}], "answer": "a"}), "the assistant's"),
        (json.dumps({"messages": [ASKED], "answer": "a"}), "the tokenizer has no chat template"),
        (
            json.dumps({"messages": [{**ASKED, "role": "system"}, ASKED], "system": "s", "answer": "a"}),
            "both in messages and in system",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, line, says):
    path = tmp_path / "quiz.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(TextError) as raised:
        load(tokenizer, path)
    assert str(raised.value).startswith(f"task quiz: {path}, line 3: ")
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


def test_bad_files_are_named(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    for name, says in [("none", "No such file"), ("latin", "not UTF-8"), ("empty", "holds no question")]:
        with pytest.raises(TextError, match=says) as raised:
            load(tokenizer, tmp_path / f"{name}.jsonl")
        assert f"{name}.jsonl" in str(raised.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "generation needs files"),
        ({"files": ["a"], "max_tokens": 0}, "greater than or equal to 1"),
        ({"files": ["a"], "match": "regex"}, "'exact', 'contains', 'numeric', 'choice', 'f1' or 'rouge_l'"),
        ({"files": ["a"], "stop": [""]}, "an empty text ends every answer"),
        ({"files": ["a"], "template": True}, "template"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys, says):
    with pytest.raises(ValidationError, match=says):
        generation.Section(**keys)


def test_a_prompt_that_leaves_no_room_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", {"prompt": "word " * 40, "answer": "a"})
    task = load(tokenizer, path, max_tokens=20)
    tokens = len(task.questions[0].ids)
    assert task.longest == tokens + 20
    with pytest.raises(TextError, match=f"line 1: its prompt has {tokens} tokens, which leave no room for 20 more"):
        load(tokenizer, path, max_tokens=20, max_length=tokens + 19)
    assert load(tokenizer, path, max_tokens=20, max_length=tokens + 20).longest == tokens + 20


def test_the_digest_is_of_all_that_decides_the_answers(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "prompt": "r"})
    digests = {
        load(tokenizer, path, **keys).digest
        for keys in [{}, {"limit": 1}, {"match": "exact"}, {"max_tokens": 3}, {"stop": ["x"]}]
    }
    assert len(digests) == 5
    assert load(tokenizer, path, name="other").digest in digests


def test_a_few_questions_are_asked_first_and_may_end_the_task(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", *[{"prompt": f"question {i}", "answer": str(i)} for i in range(100)])
    task, seen, said = load(tokenizer, path), [], []
    engine = Parrot(*map(str, range(100)))
    assert task.run(engine, said.append, look=seen.append).value == 1.0
    assert [len(call) for call in engine.calls] == [16, 64, 20]
    assert list(map(len, seen)) == [16]
    assert said == [f"task a, answer {begin} of 100" for begin in (1, 17, 81)]

    def refuse(correct):
        raise RuntimeError(f"{sum(correct):g} of {len(correct)}")

    engine = Parrot(*["x"] * 100)
    with pytest.raises(RuntimeError, match="0 of 16"):
        task.run(engine, look=refuse)
    assert [len(call) for call in engine.calls] == [16]


def test_the_example_comes_with_the_program(tokenizer, chatty):
    for its in (tokenizer, chatty):
        task = load(its, "example")
        assert task.name == "example"
        assert len(task.questions) == 30
        assert len({question.text for question in task.questions}) == 30
    # the right answers fit themselves, and an answer that says nothing fits none
    right = task.run(Parrot(*[f"I say: {question.right[0]}" for question in task.questions]))
    assert right.value == 1.0
    assert task.run(Parrot(*[""] * 30)).value == 0.0


def test_the_kind_is_one_of_the_folder():
    assert tasks.names() == ["generation", "lm_eval", "multiple_choice"]
