"""Tests of how a run begins: its header, its refusals, its warnings, and the time that it will take."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from compressors.plan import CompressionPlan
from search.config.space_section import Space
from search.config.validation import validate
from search.errors import StudyMismatch
from search.setup import load
from search.setup.definition import of_file
from search.study import early, space, storage, time_left
from tests.waiting import LONG_S

ROOT = Path(__file__).parents[2]
BASE = CompressionPlan(5, 6, 3, 96, 160, "bfloat16")


# -- refusals before anything is imported ----------------------------------------------------------------------


def file_of(tmp_path, **changes):
    values = {
        "study_name": "s",
        "storage": f"sqlite:///{tmp_path}/studies.db",
        "model": {"source": str(tmp_path)},
        "space": {"num_hidden_layers": {"low": 2, "high": 5}, "precision": ["bfloat16", "W8A8"]},
    }
    return validate({**values, **changes}, "test")


@pytest.fixture
def stored(tmp_path):
    """A study in a storage, with entries of its definition that a study file alone does not decide."""
    file = file_of(tmp_path)
    by_file = of_file(file)
    machine = {"text": "t", "backend": "transformers", "device": "cpu", "threads": None}
    definition = {
        **by_file,
        "model": {**by_file["model"], "digest": "d"},
        "score": {**by_file["score"], "perf": {"quiz": 1.0}},
        "evaluation": {**by_file["evaluation"], **machine},
        "calibration": "c",
    }
    study = storage.create_or_resume(storage.open_storage(file.storage), "s", definition)
    study.set_user_attr("file", file.model_dump(mode="json", exclude={"storage"}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pruner": {"name": "median"}}, 'pruner is "wilcoxon" there and "median" here'),
        ({"score": {"weight_perf": 0.7}}, "score.weight_perf is 0.5 there and 0.7 here"),
        ({"limits": {"max_size_mb": 100}}, "max_size_mb is null there and 100.0 here"),
        ({"evaluation": {"speed": "predicted"}}, 'evaluation.speed is "measured" there and "predicted" here'),
        ({"evaluation": {"compile": True}}, "evaluation.compile is false there and true here"),
        ({"evaluation": {"workload": {"turns": 40}}}, "evaluation.workload.turns is 12 there and 40 here"),
        ({"space": {"num_hidden_layers": {"low": 2, "high": 5}}}, "space.precision is"),
        ({"space": {"num_hidden_layers": 4, "precision": ["bfloat16", "W8A8"]}}, "space.num_hidden_layers is"),
        (
            {"space": {"num_hidden_layers": {"low": 2, "high": 5}, "precision": ["bfloat16", "W8A8"],
                       "quantizer": ["nearest", "gptq"]}},
            "space.quantizer is null there",
        ),
        ({"text": {"window": 512}}, "text.window is 256 there and 512 here"),
        ({"text": {"shards": 8}}, "text.shards × windows_per_shard is 16 there and 8 here"),
        ({"evaluation": {"perf": [{"metric": "multiple_choice", "files": ["a.jsonl"]}]}}, 'perf is ["perplexity"]'),
        ({"model": {"source": "organisation/another"}}, "model.source is"),
        ({"model": {"source": "smollm2-135m"}}, "model.source is"),
    ],
)  # fmt: skip
def test_a_changed_definition_is_refused_by_the_study_file_alone(stored, changes, said):
    with pytest.raises(StudyMismatch) as caught:
        early.refuse_another_definition(file_of(stored, **changes))
    assert said in str(caught.value)
    assert "digest" not in str(caught.value)
    assert "quiz" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trials": 99, "seed": 7, "sampler": {"name": "random"}},
        {"space": {"num_hidden_layers": {"low": 3, "high": 4}, "precision": ["bfloat16", "W8A8"]}},
        {"study_name": "another", "pruner": {"name": "none"}},
        {"text": {"shards": 8, "windows_per_shard": 2}},  # the same windows
        {"text": {"search": ["moved/search.txt"]}},
        {"storage": "sqlite:///nosuch/studies.db", "pruner": {"name": "none"}},
        # wrong in itself, which what checks it says better
        {"model": {"source": "/no/such/model"}},
        {"space": {"num_hidden_layers": 99, "precision": ["bfloat16", "W8A8"]}},
        {"evaluation": {"backend": "nosuch"}},
    ],
)
def test_what_may_change_or_is_told_better_later_is_not_refused_early(stored, changes):
    early.refuse_another_definition(file_of(stored, **changes))


@pytest.mark.long
def test_a_refusal_imports_no_torch_and_takes_no_time(stored):
    program = f"""
        import sys, time
        from search.config.validation import validate
        from search.errors import StudyMismatch
        from search.study import early
        import search.cli
        values = {{"study_name": "s", "storage": "sqlite:///{stored}/studies.db",
                   "model": {{"source": "{stored}"}}, "pruner": {{"name": "none"}}}}
        imported = time.process_time()
        try:
            early.refuse_another_definition(validate(values, "test"))
        except StudyMismatch:
            print({{"torch", "transformers", "mlflow"}} & set(sys.modules), time.process_time() / imported)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=LONG_S
    )
    imported, times = ended.stdout.split()
    assert imported == "set()", ended.stderr
    assert float(times) < 6  # about as long as the command line itself takes to import


@pytest.mark.long
def test_a_run_begins_without_what_only_its_trials_need():
    program = """
        import sys
        import search.confirm, search.finalists, search.stages.forecast, search.study.worker, search.study.workers
        print({"torch"} & set(sys.modules), {"mlflow", "optuna_dashboard", "scipy.stats", "sklearn"} & set(sys.modules))
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, timeout=LONG_S
    )
    assert ended.stdout.strip() == "{'torch'} set()", ended.stderr


# -- the header ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "count", "exact", "dimensions"),
    [
        ({}, 1, True, []),
        ({"num_hidden_layers": {"low": 2, "high": 5}}, 4, True, ["num_hidden_layers 2..5"]),
        ({"intermediate_size": {"low": 128, "high": 160, "step": 8}}, 5, True, ["intermediate_size 128..160 by 8"]),
        ({"precision": ["bfloat16", "W8A8"], "quantizer": ["nearest", "gptq"]}, 3, True,
         ["precision bfloat16|W8A8", "quantizer nearest|gptq"]),  # bfloat16 has no quantizer
        ({"num_attention_heads": {"low": 1, "high": 6}, "num_key_value_heads": {"low": 1, "high": 3}}, 6, True,
         ["num_attention_heads 1..6", "num_key_value_heads 1..3"]),  # only those that can be shared
        ({"hidden_size": {"low": 1, "high": 96}, "intermediate_size": {"low": 1, "high": 160}}, 15360, False,
         ["hidden_size 1..96", "intermediate_size 1..160"]),
        ({"num_hidden_layers": 4, "precision": ["W8A8"]}, 1, True, []),
    ],
)  # fmt: skip
def test_the_plans_of_a_space_are_counted(wanted, count, exact, dimensions):
    wanted = Space(**wanted)
    assert space.count_plans(wanted, BASE) == (count, exact)
    assert space.searched(wanted) == dimensions


# -- the time left ---------------------------------------------------------------------------------------------


def ended(number, stage="screen", queued=False, **seconds):
    system = {"fixed_params": {}} if queued else {}
    state = TrialState.COMPLETE if stage in ("done", "baseline") else TrialState.PRUNED
    attrs = {"seconds": seconds, "stage": stage}
    value = 0.5 if state == TrialState.COMPLETE else None
    trial = create_trial(state=state, value=value, user_attrs=attrs, system_attrs=system)
    trial.number = number
    return trial


def test_the_time_left_counts_each_stage_with_the_share_that_reaches_it():
    queued = [
        ended(0, "baseline", True, plan=0.0, baseline=0.1),
        ended(1, "done", True, plan=0.0, screen=10.0, build=5.0, measure=45.0),
    ]
    suggested = [ended(number, plan=0.0, screen=2.0) for number in range(2, 5)]
    suggested.append(ended(5, "done", plan=0.0, screen=10.0, build=5.0, measure=55.0))
    left = time_left.estimate([*queued, *suggested], 16, 1)
    assert left.stages["screen"] == pytest.approx((26 / 5, 1.0))
    assert left.stages["measure"] == pytest.approx((50.0, 0.25))  # one of four that were suggested
    assert left.seconds == pytest.approx(10 * (26 / 5 + (5 + 50) / 4))
    assert "baseline" not in left.stages
    assert time_left.estimate([*queued, *suggested], 16, 2).seconds == pytest.approx(left.seconds / 2)
    assert time_left.estimate([*queued, *suggested], 6, 1).seconds == 0
    assert time_left.estimate([*queued, *suggested], 16, 1, limit_s=1.5).seconds == 1.5
    assert time_left.estimate(queued[:1], 16, 1) is None
    assert time_left.estimate([], 16, 1) is None
    assert time_left.estimate(queued, 4, 1).seconds == pytest.approx(2 * 60)
    json.dumps(left.to_dict())


# -- other processes -------------------------------------------------------------------------------------------

SPIN = "import time\nend = time.time() + 600\nprint(flush=True)\nwhile time.time() < end: pass"


def test_another_process_that_loads_the_machine_is_named_and_a_child_is_not_another(monkeypatch):
    monkeypatch.setattr(load, "BUSY_SHARE", 0.25 / (os.cpu_count() or 1))  # of one core
    child = subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE)
    start = f"subprocess.Popen([sys.executable, '-c', {SPIN!r}], stdout=subprocess.DEVNULL)"
    program = f"import subprocess, sys\nprint({start}.pid, flush=True)"
    orphan = int(subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True).stdout.split()[0])
    seen, ticks = {os.getpid(), child.pid}, load._ticks
    monkeypatch.setattr(load, "_ticks", lambda: {pid: found for pid, found in ticks().items() if pid in seen})
    try:
        child.stdout.readline()
        assert load._cores_used()[1] is None  # the child alone
        seen.add(orphan)
        for _ in range(5):  # where all cores are taken, a process may get no tenth of one for half a second
            used, most = load._cores_used()
            if most is not None:
                break
        assert most is not None
        assert most.endswith(f", pid {orphan}")
        assert used > 0.1
        assert orphan not in load._descendants(os.getpid(), load._ticks())
        assert child.pid in load._descendants(os.getpid(), load._ticks())
    finally:
        child.kill()
        child.communicate()
        os.kill(orphan, 9)


def test_a_machine_without_nvidia_smi_has_no_busy_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load._smi("--query-gpu=utilization.gpu", "0") == []


@pytest.mark.parametrize(
    ("apps", "percent", "said"),
    [
        ("", "0 %", None),
        ("", "97 %", "the GPU is 97% busy"),
        ("", "[N/A]", None),
        ("1, /sbin/init, 900 MiB", "0 %", "process 1 (/sbin/init) has 900 MiB of the GPU's memory"),
        ("4194303, python, 900 MiB", "0 %", None),  # this process under its number outside a container
    ],
)
def test_other_processes_on_the_gpu_are_told(monkeypatch, tmp_path, apps, percent, said):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\ncase "$1" in *apps*) printf "%s" "{apps}";; *) echo "{percent}";; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(load, "_first_gpu", lambda: "0")
    assert load._gpu_used() == said


def test_optuna_gives_queued_trials_the_mark_that_the_estimate_reads():
    study = optuna.create_study()
    study.enqueue_trial({"x": 1})
    assert "fixed_params" in study.trials[0].system_attrs
