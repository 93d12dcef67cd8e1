"""Requests from files: prompts, chats and ShareGPT's conversations."""

import json

import pytest

from evaluator import prompts
from evaluator.errors import TextError

SHAREGPT = {
    "id": "x",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Who?"},
        {"from": "gpt", "value": "Me."},
        {"from": "human", "value": "Why?"},
    ],
}


class Words:
    """A tokenizer of words, with the chat template that a test wants."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def encode(self, text, add_special_tokens=True):
        return [*([0] if add_special_tokens else []), *(len(word) for word in text.split())]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt, **arguments):
        assert (tokenize, add_generation_prompt) == (False, True)
        names = "".join(f" {name}" for name, on in arguments.items() if on)
        return " ".join(f"{message['role']} {message['content']}" for message in messages) + names


@pytest.fixture
def write(tmp_path):
    def written(name, *entries):
        path = tmp_path / name
        path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
        return path

    return written


def test_prompts_are_continued_and_chats_rendered(write):
    chat = {"messages": [{"role": "user", "content": "a bb"}], "id": 7}
    path = write("requests.jsonl", {"prompt": "a bb ccc", "answer": "x"}, "", chat, SHAREGPT)
    found = prompts.read(path, 10)
    with_template = [one.ids(Words("{{ a }}"), {"enable_thinking": True, "x": False}) for one in found]
    assert with_template == [[0, 1, 2, 3], [4, 1, 2, 15], [6, 2, 6, 4, 4, 15]]
    assert len(prompts.read(path, 2)) == 2


def test_sharegpt_is_read_without_a_template_too_and_messages_are_not(write):
    chat = {"messages": [{"role": "user", "content": "a"}]}
    path = write("requests.json", json.dumps([SHAREGPT, chat], indent=1))
    found = prompts.read(path, 10)
    assert found[0].ids(Words(), {}) == [0, 2, 6, 4]
    with pytest.raises(TextError, match=r"requests.json, entry 2: has messages, and .* no chat template"):
        found[1].ids(Words(), {})


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "line 2: .*; write"),
        ("[1]", "is no JSON object"),
        ({"text": "x"}, "has neither prompt nor messages"),
        ({"prompt": "x", "messages": []}, "has prompt and messages"),
        ({"prompt": ""}, "prompt is ''"),
        ({"prompt": 7}, "prompt is 7"),
        ({"messages": []}, r"messages is \[\]"),
        ({"messages": ["hello"]}, "the message 'hello' needs role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "needs role"),
        ({"messages": [{"role": "user"}]}, "needs role"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "begin with no question of a human"),
        ({"conversations": [{"from": "human", "value": None}]}, "needs from"),
    ],
)
def test_what_is_no_request_is_named_with_its_line(write, line, told):
    path = write("requests.jsonl", {"prompt": "first"}, line)
    assert len(prompts.read(path, 1)) == 1
    with pytest.raises(TextError, match=told) as caught:
        prompts.read(path, 2)
    assert f"prompts {path}, line 2: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none_is_named(write, tmp_path):
    with pytest.raises(TextError, match=r"nosuch.jsonl: can't be read"):
        prompts.read(tmp_path / "nosuch.jsonl", 1)
    with pytest.raises(TextError, match="holds no list"):
        prompts.read(write("one.json", {"prompt": "x"}), 1)
    with pytest.raises(TextError, match=r"bad.json: "):
        prompts.read(write("bad.json", "[{"), 1)
