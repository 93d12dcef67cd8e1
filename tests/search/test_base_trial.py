"""Tests of a trial that is the base model itself: scored by definition, never measured, exported like others."""

import json
import re

import pytest
from optuna.trial import TrialState

from search.study import storage as study_storage
from search.study import trials as study_trials

STUDY = """
defaults: [_base, _self_]
study_name: base
trials: 3
model: {{source: {model}}}
space:
  num_hidden_layers: {{low: {low}, high: {layers}}}
  precision: [{precision}, W8A8]
text: {{window: 32, calibration_windows: 4, shards: 6, report: null}}
evaluation: {{backend: transformers, device: cpu, speed: predicted}}
score: {{weight_perf: 0.6}}
sampler: {{name: random}}
seed: {seed}
pruner: {{n_startup_steps: 4}}
tracking: {{mlflow: false}}
"""
SEED = 3  # trial 2 drops a layer and does not quantize: the pruner ends it


@pytest.fixture
def home(tmp_path, pico_llama):
    config = json.loads((pico_llama / "config.json").read_text())
    (tmp_path / "studies").mkdir()
    layers = config["num_hidden_layers"]
    text = STUDY.format(model=pico_llama, low=layers - 1, layers=layers, precision=config["dtype"], seed=SEED)
    (tmp_path / "studies" / "base.yaml").write_text(text)
    return tmp_path


@pytest.mark.long
def test_the_base_model_is_scored_by_definition_and_a_pruned_trial_has_one_number(home, cli):
    ran = cli("run", "--study", "base", cwd=home)
    assert ran.status == 0, ran.err
    study = study_storage.load(study_storage.open_storage(f"sqlite:///{home}/outputs/studies.db"), "base")
    base, quantized, pruned = study.trials

    assert base.value == 0.6  # exactly: PerfNorm 1, SpeedNorm 0
    assert [base.user_attrs[name] for name in ("perf_norm", "speed_norm", "kl_nats_per_token")] == [1.0, 0.0, 0.0]
    assert [base.user_attrs[f"{name}_se"] for name in ("perf_norm", "speed_norm", "score")] == [0.0] * 3
    assert base.intermediate_values == dict.fromkeys(range(1, 7), 0.6)  # for pruners
    assert study_trials.is_base_model(base)
    assert not study_trials.is_base_model(quantized)
    assert len(list((home / "outputs" / "measurements").iterdir())) == 1  # the quantized model's alone
    assert "(the base model itself: 0.6 by definition)" in ran.err

    assert pruned.state == TrialState.PRUNED
    *shards, last = pruned.intermediate_values.values()
    assert last == pruned.value == pytest.approx(sum(shards) / len(shards))
    assert pruned.user_attrs["reason"].startswith(f"screen: {pruned.value:.3f} against 0.")
    notes = study._storage.get_study_system_attrs(study._study_id)
    assert pruned.user_attrs["reason"] in notes[f"dashboard:{pruned._trial_id}:note_str:0"]
    assert "0.6 by definition" in notes[f"dashboard:{base._trial_id}:note_str:0"]

    header = [line.split("  ")[0] for line in ran.err.splitlines() if re.match(r"(study|model|space|storage)\b", line)]
    assert header == ["study base", "model", "space", "storage"]
    assert re.search(r"^space +4 plans: num_hidden_layers ", ran.err, flags=re.MULTILINE)
    assert re.search(r"^trial +1 ", ran.err, flags=re.MULTILINE)

    exported = cli("export", "--study", "base", "--trial", "0", "--to", "submit/base", cwd=home)
    assert exported.status == 0, exported.err
    assert exported.out.splitlines()[0].startswith("trial 0, Score 0.6000 ± 0.0000, ")
    assert exported.out.splitlines()[-1] == "trial 0 is the base model itself: its Score is 0.6 by definition"
    evaluation = json.loads((home / "submit" / "base" / "eval_result.json").read_text())
    described = json.loads((home / "submit" / "base" / "compression.json").read_text())
    assert evaluation["score"] == 0.6
    assert evaluation["measurement"]["weights_sha256"] == described["weights_sha256"]
