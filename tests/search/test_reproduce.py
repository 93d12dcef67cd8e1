"""The command that a report prints makes the model that it reports: run for every choice that exists."""

import dataclasses
import json
import re
import shlex

import pytest
from click.testing import CliRunner

from compressors.plan import CHOICES, CompressionPlan, canonical, name_of
from search.by_hand import compress
from search.by_hand.evaluation import Evaluation
from search.config import compose
from search.setup import setting

STUDY = """
defaults: [_base, _self_]
study_name: again
outputs: {home}/outputs
model: {{source: {model}}}
text: {{window: 32, calibration_windows: 2, moments_windows: 2, shards: 2, report: null}}
evaluation: {{backend: transformers, device: cpu, speed: predicted}}
tracking: {{mlflow: false}}
"""
BASE = CompressionPlan(5, 6, 3, 96, 160, "bfloat16")
SIZES = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
}


def plans():
    """A plan for each size, each precision, and each value of each choice that differs from the default."""
    cut = dataclasses.replace(BASE, **SIZES)
    for name in ("num_hidden_layers", "intermediate_size"):
        yield dataclasses.replace(BASE, **{name: SIZES[name]})
    yield dataclasses.replace(BASE, num_attention_heads=4, num_key_value_heads=2)
    yield dataclasses.replace(BASE, hidden_size=72)
    for precision in ("float16", "float32", "W8A8", "FP8_DYNAMIC", "W4A16"):
        yield dataclasses.replace(BASE, precision=precision)
        yield dataclasses.replace(cut, precision=precision)
    for name, record in CHOICES.items():
        for value in (record.values or (0, 1, 2))[1:]:
            if (name, value) == ("group_size", 128):
                continue  # no width of this model is a multiple of it
            precision = (record.schemes or ("bfloat16",))[-1]
            yield dataclasses.replace(cut, precision=precision, **{name: value})
            if record.schemes:
                yield dataclasses.replace(BASE, precision=precision, **{name: 32 if name == "group_size" else value})
    yield dataclasses.replace(BASE, num_hidden_layers=3, drop_from="1,3", repair="stream")
    yield dataclasses.replace(
        cut, precision="W8A8", importance="energy", rotation="pca", repair="stream", smoothing="smoothquant",
        quantizer="gptq", keep_16_bit=1, lm_head="8-bit", kv_cache="fp8",
    )  # fmt: skip


PLANS = {name_of(plan, BASE): plan for plan in (canonical(plan, BASE) for plan in plans())}


@pytest.fixture(scope="module")
def home(tmp_path_factory, write_pico_model):
    place = tmp_path_factory.mktemp("again")
    model = write_pico_model(place / "model", "llama", head_dim=32)
    (place / "studies").mkdir()
    (place / "studies" / "again.yaml").write_text(STUDY.format(home=place, model=model))
    return place


@pytest.fixture(scope="module")
def prepared(home):
    with pytest.MonkeyPatch.context() as patch:  # as every test has it, see conftest.py
        for name in ("TOKENS", "TOKENS_ON_GPU"):
            patch.setattr(f"compressors.distillation.repair.{name}", 16_384)
        return setting.prepare(compose.load("again", config_dir=home / "studies"), search=False)


@pytest.fixture(scope="module")
def evaluation(home, prepared):
    """An evaluation of a model that a plan made; the tests put other plans into it."""
    from search import cli

    outcome = compress.foresee(PLANS["fp16"], prepared)
    compress.compress(outcome, prepared, home / "submit" / "model", None)
    words = ["evaluate", "--study", "again", "--config-dir", home / "studies", "--model", home / "submit" / "model"]
    ended = CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return Evaluation.read(home / "submit" / "model")


def test_there_are_forty_plans_and_more():
    assert len(PLANS) >= 40


@pytest.mark.long
@pytest.mark.parametrize("name", PLANS)
def test_the_reports_command_makes_the_same_weights(cli, home, prepared, evaluation, name, tmp_path):
    plan = PLANS[name]
    outcome = compress.foresee(plan, prepared)
    expected = compress.compress(outcome, prepared, tmp_path / "model", None).weights_sha256
    reported = dataclasses.replace(evaluation, plan=plan, name=name)
    (tmp_path / "model" / "eval_result.json").write_text(json.dumps(reported.to_dict()))
    report = cli("report", "-e", name, "-m", tmp_path / "model", "--print-only", cwd=home).out
    (block,) = re.findall(r"## To reproduce it\n\n```\n(.*?)\n```", report, flags=re.DOTALL)
    command, evaluate = (shlex.split(line) for line in block.splitlines())
    assert command[:2] == ["optuna-search", "compress"]
    assert evaluate[:2] == ["optuna-search", "evaluate"]
    command[command.index("--save-path") + 1] = str(tmp_path / "again")
    done = cli(*command[1:], cwd=home)
    assert done.status == 0, done.err
    described = json.loads((tmp_path / "again" / "compression.json").read_text())
    assert described["weights_sha256"] == expected
    assert described["plan"] == plan.to_dict()
