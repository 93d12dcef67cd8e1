"""Damaged caches are made again without a trial, and failures of the machine use up no plan.

Real studies on a small model; engines are real processes that are really killed.
"""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState

from compressors import cached
from compressors.errors import MachineError
from compressors.model.safetensors_file import shapes
from evaluator.errors import EngineCrashed, EngineOutOfMemory
from evaluator.process import EngineProcess
from search import failures
from search.by_hand import evaluate, export
from search.config import validation
from search.errors import StudyStopped
from search.failures import Fault, fault_of
from search.setup import machine, setting, sources, texts
from search.stages import build
from search.stages.bench import Bench
from search.study import workers

COMPLETE, FAIL = TrialState.COMPLETE, TrialState.FAIL
VALUES = {
    "study_name": "caches",
    "trials": 2,
    "space": {"precision": ["bfloat16", "W8A8"], "intermediate_size": 128, "repair": "ridge"},
    "text": {"window": 32, "calibration_windows": 4, "moments_windows": 4, "shards": 4},
    "evaluation": {"backend": "transformers", "device": "cpu", "speed": "predicted"},
    "pruner": {"name": "none"},
    "tracking": {"mlflow": False},
}


slow = pytest.mark.slow


def file_in(home, model, **changes):
    places = {"outputs": str(home / "outputs"), "storage": f"sqlite:///{home}/studies.db"}
    return validation.validate({**VALUES, **places, "model": {"source": str(model)}, **changes}, "this test")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pico_llama):
    """A study that ran, with all of its caches: (its home, the values of its trials)."""
    home = tmp_path_factory.mktemp("whole")
    study = workers.run_study(file_in(home, pico_llama))
    assert [trial.state for trial in study.trials] == [COMPLETE, COMPLETE]
    return home, [trial.value for trial in study.trials]


@pytest.fixture
def home(whole, tmp_path):
    """A copy of that study's home without its storage, and the values of its trials."""
    shutil.copytree(whole[0] / "outputs", tmp_path / "home" / "outputs", symlinks=True)
    return tmp_path / "home", whole[1]


def remeasure(home):
    """Let the study's plans be built and measured once more."""
    for name in ("measurements", "screens", "checkpoints"):
        shutil.rmtree(home / "outputs" / name)


FILES = {
    "calibration": "calibration/*.safetensors",
    "moments": "calibration/moments-*/layer-2.safetensors",
    "moments' windows": "calibration/moments-*/windows.json",
    "moments' description": "calibration/moments-*/moments.json",
    "baseline": "baseline/*.json",
}


@pytest.mark.parametrize("which", [*list(FILES)[:1], *(pytest.param(name, marks=slow) for name in list(FILES)[1:])])
def test_a_damaged_cache_is_made_again_said_once_and_costs_no_trial(home, pico_llama, damages, which):
    place, values = home
    (file,) = (place / "outputs").glob(FILES[which])
    before = shapes(file).keys() if file.suffix == ".safetensors" else json.loads(file.read_text()).keys()
    remeasure(place)
    (damage,) = [damage for number, damage in enumerate(damages) if number == list(FILES).index(which) + 2]
    damage(file)
    study = workers.run_study(file_in(place, pico_llama))
    assert [(trial.state, trial.value) for trial in study.trials] == [(COMPLETE, value) for value in values]
    assert damages.told() == [file]
    assert (shapes(file).keys() if file.suffix == ".safetensors" else json.loads(file.read_text()).keys()) == before


def wrong_numbers(stored):
    """Yield values of a measurement, a baseline or a screen that can't be right."""
    yield {}
    for name, value in stored.items():
        if name in ("shard_nll", "nll", "kl", "agreement"):
            yield {**stored, name: 3}
            yield {**stored, name: value[:-1]}
            yield {**stored, name: [*value[:-1], "x"]}
        elif name in ("perplexity", "tokens_per_sec"):
            yield from ({**stored, name: wrong} for wrong in (None, "1", True, 0, -1.0, 7.0))
            yield {key: other for key, other in stored.items() if key != name}


@pytest.mark.parametrize("kind", ["measurements", "screens", "baseline"])
def test_numbers_that_can_not_be_right_are_refused(home, pico_llama, damages, kind):
    place, _ = home
    ready = setting.prepare(file_in(place, pico_llama))
    for file in sorted((place / "outputs" / kind).glob("*.json")):
        stored = json.loads(file.read_text())
        for wrong in wrong_numbers(stored):
            file.write_text(json.dumps(wrong))
            assert not usable(kind, file, ready), wrong
            assert damages.told() == [file]
            assert not file.exists()
        for damage in damages:
            if damage is damages.flip:
                continue  # these files have no digest, since people and other programs know their keys
            file.write_text(json.dumps(stored))
            damage(file)
            assert not usable(kind, file, ready)
            assert damages.told() == [file]
        file.write_text(json.dumps(stored))
        assert usable(kind, file, ready)


def usable(kind, file, ready):
    from search.stages import measurements
    from search.stages.screen import Screen

    if kind == "screens" and file.name.startswith("base-"):
        asked = []
        bench = Bench.of(ready)
        bench.screener._base = lambda say: asked.append(1) or 1 / 0
        try:
            bench.base_nll(lambda text: None)
        except ZeroDivisionError:
            return False
        return not asked
    if kind == "screens":
        return Screen.read(file, len(ready.texts.shards)) is not None
    return measurements.known(file, ready) is not None


@slow
def test_damaged_measurements_and_screens_are_made_again_in_a_study(home, pico_llama, damages):
    place, values = home
    measured = sorted((place / "outputs" / "measurements").glob("*.json"))
    measured[0].write_text("{}")
    for screen in (place / "outputs" / "screens").glob("*.json"):
        screen.write_text(json.dumps({"nll": 3, "kl": 3, "agreement": 3}))
    study = workers.run_study(file_in(place, pico_llama))
    assert [(trial.state, trial.value) for trial in study.trials] == [(COMPLETE, value) for value in values]
    told = damages.told()
    assert len(told) == len(set(told)) == 4
    assert "perplexity" in json.loads(measured[0].read_text())


# -- export --------------------------------------------------------------------------------------------------


@pytest.fixture
def studied(whole, tmp_path, pico_llama):
    """A whole study with its storage: (its home, its file, its best trial)."""
    place = tmp_path / "home"
    shutil.copytree(whole[0], place)
    file = file_in(place, pico_llama)
    return place, file, workers.run_study(file).trials[1]


def flip_weights(built):
    data = bytearray((built / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (built / "model.safetensors").write_bytes(data)


BROKEN = {
    "a bit of the weights": flip_weights,
    "cut off weights": lambda built: os.truncate(built / "model.safetensors", 500),
    "no weights": lambda built: (built / "model.safetensors").unlink(),
    "an empty config": lambda built: (built / "config.json").write_text("{}"),
    "another tokenizer": lambda built: (built / "tokenizer.json").write_text("{}"),
    "no description": lambda built: (built / "compression.json").unlink(),
    "a description without a digest": lambda built: (built / "compression.json").write_text('{"plan": {}}'),
    "a file": lambda built: (shutil.rmtree(built), built.write_text("file")),
}


@pytest.mark.parametrize("how", [*list(BROKEN)[:1], *(pytest.param(name, marks=slow) for name in list(BROKEN)[1:])])
def test_export_builds_a_damaged_checkpoint_again_bit_for_bit(studied, damages, how, tmp_path):
    place, file, trial = studied
    built = place / "outputs" / "checkpoints" / trial.user_attrs["checkpoint"]
    weights = (built / "model.safetensors").read_bytes()
    BROKEN[how](built)
    export.export(setting.prepare(file), trial, tmp_path / "exported")
    assert damages.told() == [built]
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == weights
    assert (built / "model.safetensors").read_bytes() == weights


@slow
def test_export_takes_a_damaged_measurement_again_and_wants_a_missing_one(studied, damages, tmp_path):
    place, file, trial = studied
    measured = place / "outputs" / "measurements" / f"{trial.user_attrs['measurement']}.json"
    before = json.loads(measured.read_text())
    measured.write_text("null")
    exported = export.export(setting.prepare(file), trial, tmp_path / "exported")
    assert damages.told() == [measured]
    assert exported.perplexity == before["perplexity"]
    assert exported.score == trial.value
    assert json.loads(measured.read_text())["kl_nats_per_token"] == before["kl_nats_per_token"]


def test_a_damaged_evaluation_is_made_again_and_a_report_says_what_to_do(studied, pico_llama, damages, cli, tmp_path):
    place, _, trial = studied
    ready = setting.prepare(file_in(place, pico_llama, text={**VALUES["text"], "report": None}))
    export.export(ready, trial, tmp_path / "exported")
    result = tmp_path / "exported" / "eval_result.json"
    assert evaluate.known_evaluation(tmp_path / "exported", ready) is not None
    whole_evaluation = result.read_text()
    for damage in damages:
        if damage is damages.flip:
            continue  # a file for people has no digest
        result.write_text(whole_evaluation)
        damage(result)
        said = cli("report", "--model", tmp_path / "exported", cwd=tmp_path)
        assert said.status == 2
        assert "is damaged" in said.err or "eval_result.json is a directory" in said.err
        damages.told()
        assert evaluate.known_evaluation(tmp_path / "exported", ready) is None
        assert damages.told() == [result]


# -- other caches --------------------------------------------------------------------------------------------


def test_a_converted_model_that_is_damaged_is_converted_again(tmp_path, write_pico_exaone3, damages):
    path, cache = write_pico_exaone3(tmp_path / "EXAONE-3.5"), tmp_path / "cache"
    place = sources.resolve(str(path), cache)
    contents = {file.name: file.read_bytes() for file in place.iterdir()}
    for damage in (
        lambda: os.truncate(place / "model.safetensors", 500),
        lambda: damages.flip(place / "model.safetensors"),
        lambda: (place / "tokenizer.json").write_text("{"),
        lambda: (place / "config.json").unlink(),
        lambda: (shutil.rmtree(place), place.mkdir()),
    ):
        damage()
        assert sources.resolve(str(path), cache) == place
        assert damages.told() == [place]
        assert {file.name: file.read_bytes() for file in place.iterdir()} == contents
    (cache / "models" / f".{place.name}.json").unlink()  # as earlier versions left it
    assert sources.resolve(str(path), cache) == place
    assert damages.told() == []


@slow
def test_the_embedded_text_and_digests_are_read_again(tmp_path, monkeypatch, pico_llama, damages):
    from compressors.model import checkpoint

    monkeypatch.setattr(texts, "CACHE", tmp_path)
    expected = texts._embedded_domains.__wrapped__()
    digest = checkpoint.digest_of(pico_llama, tmp_path / "digests")
    (domains,) = (tmp_path / "texts").glob("*.json")
    (known,) = (tmp_path / "digests").glob("[0-9a-f]*.json")
    for damage in damages:
        damage(domains)
        damage(known)
        assert texts._embedded_domains.__wrapped__() == expected
        assert checkpoint.digest_of(pico_llama, tmp_path / "digests") == digest
        assert damages.told() == [domains, known]
    known.unlink()
    known.with_suffix("").write_text("ab" * 16)  # as earlier versions kept it
    assert checkpoint.digest_of(pico_llama, tmp_path / "digests") == "ab" * 16


def test_a_cache_that_can_not_be_replaced_is_an_error_of_one_line(tmp_path, monkeypatch):
    file = tmp_path / "kept.json"
    file.write_text("{")

    def refuse(self, *rest, **others):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(MachineError, match=r"is damaged .* can't be removed .*; remove it, and it is made again"):
        cached.known(file, cached.read_json)


def test_two_processes_that_find_a_damaged_file_make_it_once(tmp_path):
    file, made = tmp_path / "kept.json", tmp_path / "made"
    file.write_text("{")
    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                value = cached.kept(file, cached.read_json, lambda path: make_slowly(path, made))
                code = 0 if value == {"a": 1} else 2
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    assert made.read_text() == "1"


def make_slowly(path, made):
    import time

    with made.open("a") as counted:
        counted.write("1")
    time.sleep(0.3)
    cached.keep_json(path, {"a": 1})


# -- the machine ---------------------------------------------------------------------------------------------


def test_an_engine_that_is_killed_once_costs_no_trial_and_one_that_is_killed_twice_its_own(
    tmp_path, pico_llama, monkeypatch
):
    strikes = iter([signal.SIGKILL, None, signal.SIGSEGV, signal.SIGKILL])  # trial 0, the base model, needs no engine
    struck = []
    nll = EngineProcess.nll

    def strike_first(self, windows):
        if self.path.parent.name == "checkpoints" and self.pid not in struck:  # an engine's first call
            struck.append(self.pid)
            number = next(strikes)
            if number is not None:
                os.kill(self.pid, number)
        return nll(self, windows)

    monkeypatch.setattr(EngineProcess, "nll", strike_first)
    space = {"precision": ["bfloat16", "float16", "W8A8"]}
    study = workers.run_study(file_in(tmp_path, pico_llama, trials=3, space=space))
    assert [trial.state for trial in study.trials] == [COMPLETE, COMPLETE, FAIL]
    assert study.trials[2].user_attrs["failure"] == "EngineOutOfMemory"
    assert "killed from outside" in study.trials[2].user_attrs["reason"]


@slow
def test_the_baselines_engine_may_be_killed_too(tmp_path, pico_llama, monkeypatch):
    nll, struck = EngineProcess.nll, []

    def strike_first(self, windows):
        if not struck:
            struck.append(self.pid)
            os.kill(self.pid, signal.SIGKILL)
        return nll(self, windows)

    monkeypatch.setattr(EngineProcess, "nll", strike_first)
    study = workers.run_study(file_in(tmp_path, pico_llama, trials=1))
    assert struck
    assert [trial.state for trial in study.trials] == [COMPLETE]


def failing(monkeypatch, errors):
    """Let the next builds raise these errors, and those after them succeed."""
    errors, write = iter(errors), build.write

    def write_or_fail(*arguments, **others):
        error = next(errors, None)
        if error is not None:
            raise error
        return write(*arguments, **others)

    monkeypatch.setattr(build, "write", write_or_fail)


@pytest.mark.long
def test_a_failing_disk_uses_up_no_plan(home, pico_llama, monkeypatch):
    place, values = home
    remeasure(place)
    failing(monkeypatch, [OSError(errno.EIO, "Input/output error"), OSError(errno.EROFS, "Read-only file system")])
    study = workers.run_study(file_in(place, pico_llama))
    ended = [trial for trial in study.trials if trial.state == COMPLETE]
    assert sorted(trial.value for trial in ended) == sorted(values)
    failed = [trial for trial in study.trials if trial.state == FAIL]
    assert [trial.user_attrs["failure"] for trial in failed] == ["MachineError"] * 2
    assert all("it is tried again" in trial.user_attrs["reason"] for trial in failed)
    assert not [trial for trial in study.trials if trial.state == TrialState.WAITING]


@slow
def test_a_machine_that_keeps_failing_stops_the_study_and_the_next_run_tries_every_plan(home, pico_llama, monkeypatch):
    place, values = home
    remeasure(place)
    with monkeypatch.context() as patch:
        failing(patch, [MachineError("disk: no space")] * 100)
        with pytest.raises(StudyStopped, match="this machine failed 5 trials in a row, lately with: disk: no space"):
            workers.run_study(file_in(place, pico_llama))
    study = workers.run_study(file_in(place, pico_llama))
    assert sorted(trial.value for trial in study.trials if trial.state == COMPLETE) == sorted(values)


@slow
def test_a_plan_that_always_wants_too_much_memory_fails_after_two_retries(home, pico_llama, monkeypatch):
    place, _ = home
    remeasure(place)
    failing(monkeypatch, [EngineOutOfMemory("CUDA out of memory")] * 3)
    study = workers.run_study(file_in(place, pico_llama, trials=1, space={**VALUES["space"], "precision": "W8A8"}))
    assert [trial.state for trial in study.trials] == [FAIL] * 3
    assert ["again" in trial.user_attrs for trial in study.trials] == [True, True, False]
    assert len({json.dumps(trial.user_attrs["plan"]) for trial in study.trials}) == 1


def killed(error):
    error.killed = True
    return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Fault.MACHINE),
        (OSError(errno.EIO, "Input/output error"), Fault.MACHINE),
        (MachineError("moments: can't be written"), Fault.MACHINE),
        (MachineError("memory: screening this plan needs 9 GB on cpu and 1 GB are free"), Fault.PERHAPS_MACHINE),
        (EngineOutOfMemory("out of memory"), Fault.PERHAPS_MACHINE),
        (torch.OutOfMemoryError("CUDA out of memory"), Fault.PERHAPS_MACHINE),
        (MemoryError(), Fault.PERHAPS_MACHINE),
        (killed(EngineOutOfMemory("killed")), Fault.PLAN),
        (EngineCrashed("raised IndexError"), Fault.PLAN),
        (ValueError("a defect"), Fault.PLAN),
    ],
)
def test_whose_fault_a_failure_is(error, fault):
    assert fault_of(error) is fault
    assert failures.why(error)["failure"]


def test_memory_that_is_short_now_is_the_machines_fault_and_more_than_there_is_the_plans():
    total = machine.total_memory("cpu")
    with pytest.raises(MachineError):
        machine.require_memory(total, "cpu", "this")
    with pytest.raises(Exception, match="memory: this needs") as caught:
        machine.require_memory(total * 2, "cpu", "this")
    assert not isinstance(caught.value, MachineError)
    with pytest.raises(MachineError, match="free some"):
        machine.require_disk(10**18, Path("/"), "this")
