"""Test that chats are rendered as transformers renders them, and that a hostile template is stopped."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import transformers

from compressors.errors import CheckpointError
from evaluator import chat
from evaluator.errors import TextError
from search.setup import guarded_chat
from search.setup.texts import tokenizer_of
from tests.waiting import AT_ONCE_S

QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 < 8 & 'yes'?\nSay é."}]
TALK = [*QUESTION, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] | trim + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "block lines": """
    {%- set ns = namespace(found=false, last=0) %}
    {% for message in messages %}
        {%- if message.role == 'system' %}{% continue %}{% endif %}
        {%- set ns.last = loop.index0 %}
        {% generation %}{{ message | tojson }}{% endgeneration %}

        {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {% endfor %}
    {{ ns.last }} {{ bos_token }} {{ dict(a=1) | tojson(indent=2) }} {{ tools is none }} {{ messages[-1].content[:3] }}
    """,
    "thinking": CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
    "several": [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": CHATML}],
}


@pytest.fixture
def with_template(pico_llama, tmp_path):
    """Load a tokenizer with a chat template: this program's, and transformers' own."""

    def load(template, place="tokenizer_config.json"):
        model = Path(shutil.copytree(pico_llama, tmp_path / f"model-{len(list(tmp_path.iterdir()))}"))
        if place.endswith(".jinja"):
            (model / place).write_text(template)
        else:
            values = json.loads((model / place).read_text())
            (model / place).write_text(json.dumps({**values, "chat_template": template}))
        return tokenizer_of(model), transformers.AutoTokenizer.from_pretrained(model)

    return load


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_and_encoded_as_transformers_does(name, with_template):
    ours, theirs = with_template(TEMPLATES[name])
    for messages in (QUESTION, TALK):
        for arguments in ({}, {"enable_thinking": False}):
            expected = theirs.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, tokenize=True, **arguments
            )
            assert chat.chat_ids(ours, messages, arguments) == expected
            text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
            assert ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments) == text
    assert "7 < 8 & 'yes'?" in text


def test_a_template_in_a_file_of_its_own_is_read(with_template):
    ours, _ = with_template(CHATML, "chat_template.jinja")
    assert ours.apply_chat_template(QUESTION[:1], tokenize=False) == "<|system|>\nBe brief.[EOS]\n"


def test_the_embedded_models_template_is_rendered_as_transformers_does(smollm2):
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    expected = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert chat.chat_ids(tokenizer_of(smollm2), TALK) == expected


def test_the_day_in_a_prompt_is_always_the_same(with_template):
    ours, _ = with_template("{{ strftime_now('%d %b %Y') }}")
    assert ours.apply_chat_template(QUESTION, tokenize=False) == "01 Jan 2026"


def test_without_a_template_a_prompt_has_to_be_written(pico_llama):
    with pytest.raises(TextError, match="no chat template; write a prompt in place of messages"):
        chat.chat_ids(tokenizer_of(pico_llama), QUESTION)
    assert chat.prompt_ids(tokenizer_of(pico_llama), "a b")


def test_what_a_template_refuses_is_said_and_the_next_chat_is_rendered(with_template):
    ours, _ = with_template("{% if messages|length > 2 %}{{ raise_exception('Roles must alternate') }}{% endif %}ok")
    with pytest.raises(TextError, match="the chat template refuses it: Roles must alternate"):
        chat.chat_ids(ours, TALK)
    assert ours.decode(chat.chat_ids(ours, QUESTION)) == "ok"


HOSTILE = {
    "runs for ever": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "multiplies": "{{ 'a' * 10000000000 }}",
    "doubles": "{% set ns = namespace(t='aaaa') %}{% for _ in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "writes much": "{% for a in range(99999) %}{{ 'abcdefghij' * 1000 }}{% endfor %}",
    "looks at classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "looks at globals": "{{ raise_exception.__globals__['json'].dumps(1) }}",
    "imports": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "changes its input": "{{ messages.append(1) }}",
}


@pytest.mark.long
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_is_stopped(case, with_template, monkeypatch):
    monkeypatch.setattr(guarded_chat, "RENDER_S", 3.0)
    ours, _ = with_template(HOSTILE[case])
    began = time.monotonic()
    with pytest.raises((CheckpointError, TextError)) as caught:
        chat.chat_ids(ours, QUESTION)
    assert time.monotonic() - began < AT_ONCE_S
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    if case == "runs for ever":
        assert "took more than 3 s for a chat" in str(caught.value)


def test_what_is_no_template_is_said_with_the_model(with_template):
    ours, _ = with_template("{% for %}")
    for _ in range(2):
        with pytest.raises((CheckpointError, TextError), match=r"chat template can't be read \("):
            chat.chat_ids(ours, QUESTION)


def test_the_child_starts_with_the_first_chat_and_ends_with_its_tokenizer(with_template):
    ours, _ = with_template(CHATML)
    assert ours._template._child is None
    chat.chat_ids(ours, QUESTION)
    child = ours._template._child.pid
    chat.chat_ids(ours, TALK)
    assert ours._template._child.pid == child
    del ours
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
