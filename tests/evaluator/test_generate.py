"""What the transformers engine generates, against plain `model.generate` on each prompt alone."""

import dataclasses
import itertools
import json
import random
import shutil

import pytest
import torch
import transformers

from evaluator import answering, embedded_texts, static_batches
from evaluator.answering import Asked, Growth
from evaluator.backends import EngineSettings
from evaluator.backends.transformers import Engine
from evaluator.errors import EngineCrashed, NotFinite, RequestRefused
from evaluator.generation import Answer, Limits

SETTINGS = EngineSettings(device="cpu", threads=1, max_model_len=128)


def prompts_of(count, vocabulary, seed=0, longest=40):
    """Prompts of `count` different lengths, in no order."""
    draw = random.Random(seed)
    lengths = draw.sample(range(1, longest), count)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def plain(model, prompt, max_tokens, **options):
    """What transformers itself generates from one prompt alone, without the end-of-sequence id."""
    with torch.inference_mode():
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0, **options
        )[0].tolist()[len(prompt) :]
    ends = model.generation_config.eos_token_id
    return ids[:-1] if ids[-1] in (ends if isinstance(ends, list) else [ends]) else ids


@pytest.fixture(scope="module")
def llama(write_pico_model, tmp_path_factory):
    return write_pico_model(tmp_path_factory.mktemp("float32") / "llama", "llama", dtype="float32")


@pytest.fixture(scope="module")
def model(llama):
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def here(llama):
    """The engine in this process."""
    return Engine(str(llama), SETTINGS)


@pytest.fixture(scope="module")
def decode(llama):
    return answering.decoder_of(llama)


def copied(path, to, **config):
    """A copy of a model with another config and without generation_config.json."""
    shutil.copytree(path, to)
    (to / "generation_config.json").unlink(missing_ok=True)
    values = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**values, **config}))
    return to


# -- the tokens ----------------------------------------------------------------------------------------------


def test_prompts_of_different_lengths_get_the_tokens_that_each_gets_alone(here, model):
    prompts = prompts_of(32, 320)
    answers = here.generate(prompts, Limits(max_tokens=12))
    assert [list(answer.tokens) for answer in answers] == [plain(model, prompt, 12) for prompt in prompts]
    assert len({answer.tokens for answer in answers}) > 20


@pytest.mark.parametrize("family", ["exaone4", "gemma3_text", "qwen2", "qwen3", "smollm3"])
def test_every_familys_attention_is_masked_where_it_is_padded(family, write_pico_model, tmp_path):
    """Sliding windows, layers without rotary positions, norms of queries: 9 prompts, some longer than the window."""
    path = write_pico_model(tmp_path / "model", family, dtype="float32")
    alone = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = prompts_of(9, 320, seed=1)
    answers = Engine(str(path), SETTINGS).generate(prompts, Limits(max_tokens=9))
    assert [list(answer.tokens) for answer in answers] == [plain(alone, prompt, 9) for prompt in prompts]


@pytest.mark.slow
def test_a_real_model_answers_as_it_does_alone(smollm2, tmp_path):
    """SmolLM2-135M in float32: 32 prompts of different lengths from its own text, and a question with its template."""
    torch.set_num_threads(1)  # two wait for each other where other work runs
    exact = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    exact.save_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(tmp_path / "model")
    ids = tokenizer.encode(" ".join(document.text for document in embedded_texts.documents()[:3]))
    prompts = [ids[100 * place : 100 * place + 5 + 3 * place] for place in range(31)]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompts.append(tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False))
    engine = Engine(str(tmp_path / "model"), dataclasses.replace(SETTINGS, max_model_len=512))
    answers = engine.generate(prompts, Limits(max_tokens=12))
    assert [list(answer.tokens) for answer in answers] == [plain(exact, prompt, 12) for prompt in prompts]
    assert "Paris" in answers[-1].text
    assert answers[-1].finish == "stop"


def test_answers_keep_the_order_of_their_prompts_and_each_its_own_limit(here, model):
    prompts = prompts_of(7, 320, seed=2)
    limits = [Limits(max_tokens=1 + 2 * place, ignore_eos=True) for place in range(7)]
    answers = here.generate(prompts, limits)
    assert [len(answer.tokens) for answer in answers] == [1, 3, 5, 7, 9, 11, 13]
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = here.generate([prompt], Limits(max_tokens=len(answer.tokens), ignore_eos=True))
        assert alone[0].tokens == answer.tokens


def test_an_end_of_sequence_id_ends_an_answer_and_is_no_part_of_it(llama, here, tmp_path):
    prompts = prompts_of(8, 320, seed=3)
    free = here.generate(prompts, Limits(max_tokens=10, ignore_eos=True))
    end = free[0].tokens[4]
    for name, ends in (("one", [end]), ("two", [end, 319])):
        other = Engine(str(copied(llama, tmp_path / name, eos_token_id=ends if ends[1:] else end)), SETTINGS)
        ended = other.generate(prompts, Limits(max_tokens=10))
        for long, short in zip(free, ended, strict=True):
            place = next(
                (i for i, token in enumerate(long.tokens) if token in {end, 319 if name == "two" else end}), 10
            )
            assert short.tokens == long.tokens[:place]
            assert short.finish == ("stop" if place < 10 else "length")
        assert ended[0].finish == "stop"
        ignored = other.generate(prompts, Limits(max_tokens=10, ignore_eos=True))
        assert [answer.tokens for answer in ignored] == [answer.tokens for answer in free]
        assert {answer.finish for answer in ignored} == {"length"}


def test_the_ids_that_end_an_answer_are_those_of_both_files(llama, tmp_path):
    path = copied(llama, tmp_path / "model", eos_token_id=[5, 6])
    assert answering.end_ids(path) == {5, 6}
    (path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert answering.end_ids(path) == {5, 6, 9}


def test_a_sampled_answer_is_the_same_for_the_same_seed_whatever_runs_beside_it(here):
    prompts = prompts_of(6, 320, seed=4)
    limits = Limits(max_tokens=10, temperature=1.3, seed=11, ignore_eos=True)
    first = here.generate(prompts, limits)
    assert [a.tokens for a in here.generate(prompts, limits)] == [a.tokens for a in first]
    assert here.generate(prompts[2:3], limits)[0].tokens == first[2].tokens
    other = here.generate(prompts, dataclasses.replace(limits, seed=12))
    assert [a.tokens for a in other] != [a.tokens for a in first]
    greedy = here.generate(prompts, dataclasses.replace(limits, temperature=0.0))
    cold = here.generate(prompts, dataclasses.replace(limits, temperature=1e-4))
    assert [a.tokens for a in cold] == [a.tokens for a in greedy]


def test_answers_without_a_seed_are_drawn_together(llama):
    engine = Engine(str(llama), SETTINGS)
    free = Limits(max_tokens=12, temperature=1.0, seed=None, ignore_eos=True)
    own = dataclasses.replace(free, seed=11)
    prompts = prompts_of(6, 320, seed=7)
    alone = engine.generate(prompts, own)
    mixed = engine.generate([*prompts, *prompts], [own] * 6 + [free] * 6)
    assert [a.tokens for a in mixed[:6]] == [a.tokens for a in alone]  # what is drawn beside them changes nothing
    assert [a.tokens for a in mixed[6:]] != [a.tokens for a in alone]
    same = engine.generate([prompts[0]] * 6, free)
    assert len({a.tokens for a in same}) == 6
    cold = engine.generate(prompts, dataclasses.replace(free, temperature=1e-4))
    greedy = engine.generate(prompts, dataclasses.replace(free, temperature=0.0))
    assert [a.tokens for a in cold] == [a.tokens for a in greedy]
    first = Engine(str(llama), SETTINGS).generate(prompts, free)
    assert [a.tokens for a in Engine(str(llama), SETTINGS).generate(prompts, free)] == [a.tokens for a in first]
    other = Engine(str(llama), dataclasses.replace(SETTINGS, seed=1)).generate(prompts, free)
    assert [a.tokens for a in other] != [a.tokens for a in first]


def test_a_token_is_drawn_as_often_as_the_model_says(llama):
    engine = Engine(str(llama), dataclasses.replace(SETTINGS, max_num_seqs=512))
    prompt, count = [5, 6, 7], 2048
    with torch.inference_mode():
        expected = (engine.model(torch.tensor([prompt])).logits[0, -1].float() / 0.7).softmax(-1)
    drawn = engine.generate([prompt] * count, Limits(max_tokens=1, temperature=0.7, seed=None, ignore_eos=True))
    seen = torch.bincount(torch.tensor([a.tokens[0] for a in drawn]), minlength=len(expected)) / count
    distance = (seen - expected).abs().sum() / 2
    even = (torch.full_like(expected, 1 / len(expected)) - expected).abs().sum() / 2
    assert distance < 0.6 * even


@pytest.mark.parametrize("seed", [3, None])
def test_a_broken_model_is_said_to_be_broken_where_a_token_is_drawn(llama, seed):
    engine = Engine(str(llama), SETTINGS)
    engine.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="this model is broken"):
        engine.generate([[5, 6]], Limits(max_tokens=2, temperature=1.0, seed=seed))
    assert len(engine.generate([[5, 6]], Limits(max_tokens=2, ignore_eos=True))[0].tokens) == 2


# -- the text ------------------------------------------------------------------------------------------------


def test_the_text_is_what_the_tokens_decode_to(here, llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    for answer in here.generate(prompts_of(5, 320, seed=5), Limits(max_tokens=9)):
        assert answer.text == tokenizer.decode(list(answer.tokens), skip_special_tokens=True)


def test_a_stop_text_across_tokens_ends_the_answer_and_is_cut_off(here, decode):
    prompts = prompts_of(32, 320, seed=6)
    free = here.generate(prompts, Limits(max_tokens=24, ignore_eos=True))
    asked, expected = [], []
    for prompt, answer in zip(prompts, free, strict=True):
        pieces = [decode(answer.tokens[:place]) for place in range(25)]
        for place in range(4, 22):
            before, after = pieces[place], pieces[place + 2]
            stop = after[len(before) - 1 :]  # the last character of a token, and the two tokens after it
            if "\ufffd" in stop or len(stop) < 3 or after.find(stop) != len(before) - 1:
                continue
            asked.append((prompt, Limits(max_tokens=24, stop=("never", stop), ignore_eos=True)))
            expected.append((answer.tokens[: place + 2], after[: -len(stop)], "stop"))
            break
    assert len(asked) >= 4
    found = here.generate(*zip(*asked, strict=True))
    assert [(answer.tokens, answer.text, answer.finish) for answer in found] == expected


def grown(decode, tokens, *stop, max_tokens=100):
    growth = Growth(Limits(max_tokens, tuple(stop)), frozenset(), decode, 0.0)
    for now, token in enumerate(tokens):
        if growth.take(token, float(now)):
            break
    return growth.answer()


def test_of_several_stop_texts_the_first_in_the_answer_cuts(llama, decode):
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    ids = tokenizer.encode("one, two; three. four", add_special_tokens=False)
    assert grown(decode, ids, ". ", "; ").text == "one, two"
    assert grown(decode, ids, "; th", "two; three").text == "one, two"
    assert grown(decode, ids, "two; three", "four").text == "one, "
    assert grown(decode, ids, "five").text == "one, two; three. four"
    assert grown(decode, ids, "five").finish == "length"


def test_half_characters_wait_for_the_rest(llama, decode):
    """Every character here takes several byte tokens: each is decoded to � until its last one is there."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    text = "é한국어🙂 한국"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)
    stopped = grown(decode, ids, "국")
    assert stopped.text == "é한"
    assert decode(stopped.tokens) == "é한국"
    assert grown(decode, ids, "🙂 한").text == "é한국어"
    cut = grown(decode, ids, "어", max_tokens=len(tokenizer.encode("é한국", add_special_tokens=False)) - 1)
    assert (cut.finish, cut.text.rstrip("\ufffd")) == ("length", "é한")


def test_a_stop_text_is_found_wherever_tokens_begin_and_end(decode):
    """Random tokens, among them bytes that are no text: as a search in the whole decoded text, token by token."""
    draw = random.Random(7)
    for _ in range(60):
        ids = [draw.randrange(320) for _ in range(30)]
        text = decode(ids)
        place = draw.randrange(len(text) - 2)
        stop = text[place : place + draw.randrange(1, 4)]
        if "\ufffd" in stop:
            continue
        answer = grown(decode, ids, stop)
        assert answer.finish == "stop"
        assert answer.text == text[: text.find(stop)]


def test_without_a_tokenizer_there_is_no_text_and_no_stop_text(engine):
    assert engine.generate([[5, 6, 7]], Limits(max_tokens=3, ignore_eos=True))[0].text == ""
    with pytest.raises(RequestRefused, match="stop texts need a tokenizer"):
        engine.generate([[5, 6, 7]], Limits(max_tokens=3, stop=("x",)))
    assert engine.alive


# -- times, processes, refusals ------------------------------------------------------------------------------


def test_times_are_in_order_and_later_batches_come_later(llama):
    engine = Engine(str(llama), dataclasses.replace(SETTINGS, max_num_seqs=2))
    prompts = [[5] * length for length in (40, 30, 20, 10)]
    answers = engine.generate(prompts, [Limits(max_tokens=n, ignore_eos=True) for n in (1, 6, 6, 3)])
    for answer in answers:
        assert 0 <= answer.submitted_s < answer.first_token_s <= answer.last_token_s
    assert answers[0].first_token_s == answers[0].last_token_s < answers[1].last_token_s
    assert answers[0].first_token_s == answers[1].first_token_s  # one batch
    assert answers[1].last_token_s < answers[2].first_token_s  # the next one
    assert answers[3].last_token_s < answers[2].last_token_s


def test_an_engines_process_returns_what_the_engine_does(start, llama, here):
    engine = start(llama, max_model_len=128)
    prompts, limits = prompts_of(5, 320, seed=8), Limits(max_tokens=6, stop=("zzz",))
    answers = engine.generate(prompts, limits)
    assert all(isinstance(answer, Answer) for answer in answers)
    times = {"submitted_s": 0.0, "first_token_s": 0.0, "last_token_s": 0.0}
    expected = [dataclasses.replace(answer, **times) for answer in here.generate(prompts, limits)]
    assert [dataclasses.replace(answer, **times) for answer in answers] == expected
    assert engine.generate([], limits) == []


@pytest.mark.parametrize(
    ("prompts", "limits", "told"),
    [
        (
            [[5] * 3, [5] * 120],
            Limits(max_tokens=20),
            r"request 2 of 2: its prompt of 120 tokens with max_tokens 20 takes 140 tokens, and max_model_len is 128; "
            "shorten the prompt, lower max_tokens or raise max_model_len",
        ),
        ([[]], Limits(max_tokens=2), "its prompt has no token"),
        ([[5]], Limits(max_tokens=0), "max_tokens is 0; 1 is the least"),
        ([[5]], Limits(max_tokens=1, temperature=-1.0), "temperature is -1"),
        ([[5]], Limits(max_tokens=1, stop=("",)), "a stop text is empty"),
        ([[5]], [Limits(max_tokens=1)] * 2, "1 prompts and 2 limits"),
    ],
)
def test_what_cannot_be_generated_is_refused_and_the_engine_lives(start, llama, here, prompts, limits, told):
    with pytest.raises(RequestRefused, match=told):
        here.generate(prompts, limits)
    engine = start(llama, max_model_len=128)
    with pytest.raises(RequestRefused, match=told) as raised:
        engine.generate(prompts, limits)
    assert "\n" not in str(raised.value)
    assert not isinstance(raised.value, EngineCrashed)
    assert engine.generate([[5, 6]], Limits(max_tokens=1, ignore_eos=True))[0].finish == "length"


# -- static batches ------------------------------------------------------------------------------------------


def test_batches_hold_every_request_once_within_their_limits():
    draw = random.Random(9)
    asked = [Asked((1,) * draw.randrange(1, 300), Limits(max_tokens=draw.randrange(1, 200))) for _ in range(100)]
    found = static_batches.batches(asked, together=8, tokens=1500)
    assert sorted(itertools.chain.from_iterable(found)) == list(range(100))
    for batch in found:
        longest = max(len(asked[i].prompt) for i in batch)
        assert len(batch) <= 8
        assert len(batch) * (longest + max(asked[i].limits.max_tokens for i in batch)) <= 1500
    lengths = [len(asked[i].prompt) for batch in found for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert static_batches.batches([Asked((1,) * 5000, Limits(max_tokens=1))] * 2, tokens=100) == [[0], [1]]


def test_models_whose_positions_depend_on_the_longest_sequence_run_alone(model):
    assert static_batches.at_most_together(model.config, 32) == 32
    for kind in ("dynamic", "longrope"):
        config = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
        config.rope_parameters["rope_type"] = kind
        assert static_batches.at_most_together(config, 32) == 1
