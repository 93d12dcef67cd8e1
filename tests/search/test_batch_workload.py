"""A workload of whole requests in a study: its keys, its engines, what is refused, and a study from end to end."""

import dataclasses
import json
import shutil

import optuna
import pytest

from evaluator.backends import kv_bytes
from evaluator.errors import TextError
from search.config import compose, validation
from search.errors import UsageError
from search.say import silent
from search.setup import definition, keys, setting
from search.setup.engine_memory import ENGINE_BYTES, GENERATING_BYTES, PAIR_SHARE, tokens_that_fit
from search.show import forecast_view
from search.stages import speed_table
from search.stages.engines import Engines, engine_bytes

BATCH = {"kind": "batch", "requests": 10, "input_tokens": "20..60", "output_tokens": 30, "max_num_seqs": 4}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if enable_thinking is defined %}{{ 'with' if enable_thinking else 'without' }}{% endif %}assistant:"
)


@pytest.fixture
def prepared(tmp_path, pico_llama):
    def prepare(workload=BATCH, model=pico_llama, **text):
        values = {
            "study_name": "requests",
            "outputs": str(tmp_path / "outputs"),
            "model": {"source": str(model)},
            "evaluation": {"backend": "transformers", "device": "cpu", "workload": workload},
            "text": {"window": 32, "calibration_windows": 1, "shards": 2, **text},
        }
        return setting.prepare(validation.validate(values, "this test"))

    return prepare


@pytest.fixture
def chats(tmp_path):
    lines = [{"prompt": "one two three"}] * 4 + [{"messages": [{"role": "user", "content": "Why?"}]}] * 6
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "chats.jsonl"


@pytest.fixture
def chatting(pico_llama, tmp_path):
    """A model with a chat template."""
    model = shutil.copytree(pico_llama, tmp_path / "chatting")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    return model


def test_decode_is_named_in_no_key(prepared):
    """Studies and measurements are older than the second kind."""
    decode = {"batch_sizes": [1], "prompt_tokens": 64, "decode_steps": 16, "turns": 12, "seed": 0}
    ours = prepared({"requests": 9, "ignore_eos": False})
    assert keys.circumstances(ours)["workload"] == decode
    assert definition.of_file(ours.file)["evaluation"]["workload"] == decode
    assert "prompts" not in keys.circumstances(ours)
    assert (ours.engine_settings.max_num_seqs, ours.engine_settings.kv_tokens) == (None, None)
    assert engine_bytes(ours) == ENGINE_BYTES


def test_keys_tell_workloads_apart(prepared, chats, chatting, tmp_path):
    whole = {"requests": 10, "input_tokens": [20, 60], "output_tokens": [30, 30], "max_num_seqs": 4}
    assert keys.circumstances(prepared())["workload"] == {
        "kind": "batch", **whole, "ignore_eos": True, "turns": 12, "seed": 0,
    }  # fmt: skip
    shorter = tmp_path / "shorter.jsonl"
    shorter.write_text(chats.read_text().replace("three", "3"))
    different = [
        prepared({}, model=chatting),
        prepared(model=chatting),
        prepared({**BATCH, "seed": 1}, model=chatting),
        prepared({**BATCH, "ignore_eos": False}, model=chatting),
        prepared(model=chatting, prompts=str(chats)),
        prepared(model=chatting, prompts=str(shorter)),
        prepared(model=chatting, prompts=str(chats), chat_template_kwargs={"enable_thinking": False}),
    ]
    assert len({keys.baseline_path(each) for each in different}) == len(different)
    assert len({speed_table.path_of(each) for each in different}) == len(different)
    copied = shutil.copy(chats, tmp_path / "copied.jsonl")
    again = prepared(model=chatting, prompts=str(copied))
    assert keys.baseline_path(again) == keys.baseline_path(different[4])


def test_chats_are_rendered_with_the_models_template(prepared, chats, chatting):
    ours = prepared(model=chatting, prompts=str(chats), chat_template_kwargs={"enable_thinking": False})
    tokenizer = ours.texts.moments.tokenizer
    texts = [tokenizer.decode(list(one.prompt)) for one in ours.workload.asked]
    assert texts == ["one two three"] * 4 + ["user: Why?\nwithoutassistant:"] * 6


def test_engines_hold_all_requests_that_run_at_once(prepared):
    ours = prepared()
    sizes = sorted(one.most_tokens for one in ours.workload.asked)
    settings = ours.engine_settings
    assert settings.max_model_len >= sizes[-1]
    assert settings.max_num_seqs == 4
    assert settings.kv_tokens == sum(sizes[-4:])
    assert settings.batch_sizes == (1,)
    # 5 layers of 3 heads of 24, keys and values in 2 bytes
    assert kv_bytes(ours.model.checkpoint.config) == 5 * 3 * 24 * 2 * 2
    assert engine_bytes(ours) == ENGINE_BYTES + GENERATING_BYTES + settings.kv_tokens * 5 * 3 * 24 * 2 * 2


def test_two_engines_fit_on_one_gpu():
    """256 requests of EXAONE-4.0-1.2B on an NVIDIA L4: 2.4 GB of weights, 61,440 bytes a token, 24 GB in all."""
    wanted, weights, each, memory = 215_000, 2_400_000_000, 61_440, 23_600_000_000
    tokens = tokens_that_fit(wanted, 1280, weights, each, memory)
    assert 60_000 < tokens < 130_000
    assert 2 * (tokens * each + weights + ENGINE_BYTES + GENERATING_BYTES) <= PAIR_SHARE * memory
    assert tokens_that_fit(wanted, 1280, weights, each, 2 * memory) == wanted
    assert tokens_that_fit(wanted, 1280, weights, each, None) == wanted
    assert tokens_that_fit(wanted, 1280, 4 * weights, each, memory) == 1280


def test_a_gpu_without_room_for_all_requests_generates_fewer_at_once_and_it_is_told(prepared):
    ours = prepared()
    assert ours.room_warning is None
    wanted = ours.engine_settings.kv_tokens
    needed = ours.model.checkpoint.size_bytes + ENGINE_BYTES + GENERATING_BYTES
    memory = int((needed + wanted // 2 * kv_bytes(ours.model.checkpoint.config)) * 2 / PAIR_SHARE)
    small = dataclasses.replace(ours, machine=dataclasses.replace(ours.machine, memory=memory))
    held = small.engine_settings.kv_tokens
    assert wanted // 2 - 2 <= held <= wanted // 2
    assert f"{wanted:,} tokens at once" in small.room_warning
    assert f"has room for {held:,}:" in small.room_warning


def test_what_cannot_be_asked_is_refused_before_anything_starts(prepared, chats):
    with pytest.raises(UsageError, match=r"holds 10 requests, and evaluation.workload.requests is 11; lower it"):
        prepared({**BATCH, "requests": 11}, prompts=str(chats))
    with pytest.raises(TextError, match=r"chats.jsonl, line 5: has messages, and .* write a prompt in place"):
        prepared(prompts=str(chats))
    with pytest.raises(UsageError, match=r"a request takes 5\d\d tokens with its answer, and the model reads 512"):
        prepared({**BATCH, "input_tokens": "490..500"})
    assert prepared({**BATCH, "requests": 4}, prompts=str(chats)).workload.asked


@pytest.mark.parametrize(
    ("workload", "told"),
    [
        ({"kind": "stream"}, "kind"),
        ({"input_tokens": [9, 3]}, r"9\.\.3 must not fall"),
        ({"input_tokens": [1, 2, 3]}, "input_tokens"),
        ({"output_tokens": 0}, "output_tokens"),
        ({"requests": 0}, "requests"),
    ],
)
def test_keys_with_wrong_values_are_refused(prepared, workload, told):
    with pytest.raises(UsageError, match=told):
        prepared({**BATCH, **workload})


STUDY = """
defaults: [_base, _self_]
study_name: requests
trials: 2
storage: sqlite:///{home}/studies.db
outputs: {home}/outputs
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: 2, high: 4}}
text: {{window: 32, shards: 3, calibration_windows: 2}}
evaluation:
  backend: transformers
  score_se: 0
  workload: {{kind: batch, requests: 3, input_tokens: 8..16, output_tokens: 2..3, turns: 4, ignore_eos: false}}
confirm: {{top: 1, pairs: 1}}
tracking: {{mlflow: false}}
"""


@pytest.fixture
def home(tmp_path, pico_llama):
    (tmp_path / "requests.yaml").write_text(STUDY.format(home=tmp_path, model=pico_llama))
    return tmp_path


@pytest.mark.long
def test_a_study_of_whole_requests(home, cli):
    """Baseline, trials, confirmation; then it is resumed, and refused under another kind."""
    words = ("--study", "requests", "--config-dir", home, "--json")
    ended = cli("run", *words, cwd=home)
    assert ended.status == 0, ended.err
    study = optuna.load_study(study_name="requests", storage=f"sqlite:///{home}/studies.db")
    assert any("time_per_token_ms" in trial.user_attrs for trial in study.trials)
    baseline = json.loads((home / "outputs/baseline_result.json").read_text())
    assert baseline["workload"]["kind"] == "batch"
    assert baseline["timing_samples"] == 4
    again = cli("run", *words, "trials=3", cwd=home)
    assert again.status == 0, again.err
    other = cli("run", *words, "evaluation.workload.kind=decode", cwd=home)
    assert other.status == 2
    assert 'evaluation.workload.kind is "batch" there and "decode" here' in other.err


TRIES = 6  # other tests of this machine come and go; 4 turns see little of the time


def test_a_speed_table_of_whole_requests(home):
    """Its models have random weights: they answer in drawn lengths, although the study's answers end by themselves."""
    ours = setting.prepare(compose.load("requests", config_dir=home))
    with Engines(ours) as engines:
        for _ in range(TRIES):
            speed_table.path_of(ours).unlink(missing_ok=True)
            table = speed_table.speed_table(ours, engines, silent)
            shallow = next(probe for probe in table.probes if probe.shape.num_hidden_layers == 2)
            if shallow.ratio[3] < 0.9:
                break
    assert 0 < shallow.ratio[3] < 0.9
    assert list(table.base_ms) == [3]
    assert 0 < table.base_ms[3] < 1000
    assert speed_table.known(ours) == table
    view = forecast_view.ForecastView(
        *("requests", "cpu", "transformers", table.base_ms, None, 0.5, (), (), 1.0, ()), whole_requests=True
    )
    text = forecast_view.forecast_table(view).renderables[1].plain
    assert text == f"a token of the base model in whole requests: {table.base_ms[3] / 3:.4f} ms with 3 at once"
    assert view.to_dict()["whole_requests"] is True
