import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from evaluator import forkserver, process, quality
from evaluator.backends import EngineSettings
from evaluator.errors import (
    BackendUnavailable,
    EngineCrashed,
    EngineOutOfMemory,
    EngineTimeout,
    NotFinite,
)
from tests.waiting import LONG_S, gone, runs, until


def one_line(raised):
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_an_engine_computes_what_the_model_computes(engine, tiny_model, shards):
    found = engine.nll(shards[0])
    expected = [quality.window_nll(tiny_model, window).tolist() for window in shards[0]]
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert [len(window) for window in found] == [23, 23]


def test_quality_is_computed_in_float32_and_timing_is_not(tiny, start, tmp_path, shards):
    """Of a checkpoint in bfloat16, on a CPU."""
    path = tmp_path / "bfloat16"
    transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(path)
    engine = start(path)
    assert engine.facts()["dtype"] == "bfloat16"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = engine.nll(shards[0])
    for window, nll in zip(shards[0], found, strict=True):
        assert nll == pytest.approx(quality.window_nll(model, window).tolist(), rel=1e-5)


def test_decode_steps_are_single_steps(engine):
    seconds = engine.decode_steps(2, 8, 5, 0)
    assert len(seconds) == 5
    assert all(0 < s < 5 for s in seconds)


def test_logits_are_repeatable_and_told_apart(engine, start, shards):
    digest = engine.logits_sha256(shards[0][0])
    assert digest == start().logits_sha256(shards[0][0])
    assert digest != engine.logits_sha256(shards[0][1])


def test_an_engine_tells_its_versions_and_its_device(engine):
    facts = engine.facts()
    assert facts["backend"] == "transformers"
    assert facts["dtype"] == "float32"
    assert facts["torch_version"] == torch.__version__


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_engines_after_the_first_are_forked_from_the_warm_process(engine, start):
    second = start()
    assert second.pid != engine.pid
    assert second.seconds["warm"] == 0.0
    warm = process._servers["transformers"].process.pid
    assert [parent_of(engine.pid), parent_of(second.pid)] == [warm, warm]


def test_close_ends_the_process_and_can_be_repeated(start):
    engine = start()
    assert engine.alive
    engine.close()
    engine.close()
    assert not engine.alive
    assert gone(engine.pid)
    with pytest.raises(EngineCrashed, match="it was closed"):
        engine.logits_sha256([1, 2])


def test_a_hung_engine_is_killed(start):
    engine = start(call_timeout_s=0.5)
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineTimeout, match=r"nll took longer than 0\.5 s") as raised:
        engine.nll([[1, 2, 3]])
    assert "raise call_timeout_s" in one_line(raised)
    assert gone(engine.pid)
    assert not engine.alive


def test_an_engine_is_killed_with_what_it_started(tmp_path):
    said = tmp_path / "pid"
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        child = subprocess.Popen(["sleep", "1000"])
        (tmp_path / "scratch").write_text(str(child.pid))
        (tmp_path / "scratch").rename(said)
        time.sleep(1000)
        os._exit(0)
    assert until(said.exists)
    grandchild = int(said.read_text())
    assert forkserver._end(pid) is None
    assert gone(pid)
    assert gone(grandchild)


def test_an_engine_that_the_kernel_kills_ran_out_of_memory(start):
    engine = start()
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineOutOfMemory, match="lower the batch sizes") as raised:
        engine.nll([[1, 2, 3]])
    one_line(raised)
    assert not engine.alive


def test_a_process_that_ends_otherwise_has_crashed(start):
    engine = start()
    os.kill(engine.pid, signal.SIGSEGV)
    with pytest.raises(EngineCrashed, match="SIGSEGV") as raised:
        engine.nll([[1, 2, 3]])
    assert type(raised.value) is EngineCrashed


def test_out_of_memory_in_a_call_is_survived(start):
    engine = start()
    with pytest.raises(EngineOutOfMemory, match="memory") as raised:
        engine.decode_steps(10**6, 10**7, 1, 0)
    one_line(raised)
    assert engine.alive
    assert len(engine.decode_steps(1, 4, 2, 0)) == 2


def test_an_error_in_a_call_is_survived_and_logged(start):
    engine = start()
    with pytest.raises(EngineCrashed, match="IndexError") as raised:
        engine.nll([[1, 10**6]])
    one_line(raised)
    assert "Traceback" in engine.log.read_text()
    assert engine.alive


def test_a_models_nan_is_raised_as_not_finite(tiny, start, tmp_path, shards):
    broken = shutil.copytree(tiny, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(NotFinite, match="of 46 tokens") as raised:
        start(broken).nll(shards[0])
    one_line(raised)


def test_a_directory_that_is_no_checkpoint_is_refused(start, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineCrashed, match="empty: start:") as raised:
        start(tmp_path / "empty")
    one_line(raised)


def test_pickles_are_not_read(tiny, start, tmp_path):
    pickled = shutil.copytree(tiny, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(EngineCrashed):
        start(pickled)


def test_a_start_that_takes_too_long_harms_no_other_engine(start, shards):
    other = start()
    with pytest.raises(EngineTimeout, match=r"start took longer than 0\.001 s"):
        start(start_timeout_s=0.001)
    assert other.nll(shards[0])


def test_an_unknown_backend_is_refused(start):
    with pytest.raises(BackendUnavailable, match="nope"):
        start(backend="nope")


def test_engines_live_side_by_side(start, shards):
    one, two = start(), start()
    assert one.nll(shards[0]) == two.nll(shards[0])
    one.close()
    assert two.alive
    assert two.nll(shards[1])


PROGRAM = """
    import sys, threading
    print("main runs", flush=True)
    from evaluator import process
    from evaluator.backends import EngineSettings
    engine = process.EngineProcess("transformers", sys.argv[1], EngineSettings(device="cpu", threads=1), sys.argv[2])
    print(process._servers["transformers"].process.pid, engine.pid, flush=True)
"""


def run_program(tiny, tmp_path, more):
    """A program without a `__main__` guard."""
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(PROGRAM) + more)
    return subprocess.Popen(
        [sys.executable, file, tiny, tmp_path / "log"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.long
@pytest.mark.parametrize("busy", [True, False], ids=["in a call", "between calls"])
def test_engines_die_with_a_killed_program(tiny, tmp_path, busy):
    call = "engine.decode_steps(8, 64, 10**9, 0)" if busy else "threading.Event().wait()"
    with run_program(tiny, tmp_path, call) as program:
        try:
            assert program.stdout.readline() == "main runs\n"
            server, engine = map(int, program.stdout.readline().split())
            time.sleep(0.3)
            assert runs(engine)
            program.kill()
            program.wait()
            assert gone(engine)
            assert gone(server)
        finally:
            program.kill()


@pytest.mark.long
def test_engines_die_with_the_warm_process(tiny, tmp_path):
    more = textwrap.dedent("""
        from evaluator.errors import EngineCrashed
        import os, signal
        os.kill(process._servers["transformers"].process.pid, signal.SIGKILL)
        try:
            while True:
                engine.nll([[1, 2]])
        except EngineCrashed as error:
            print("crashed", flush=True)
        engine = process.EngineProcess("transformers", sys.argv[1], EngineSettings(device="cpu"), sys.argv[2])
        print(len(engine.nll([[1, 2]])), flush=True)
    """)
    with run_program(tiny, tmp_path, more) as program:
        out, err = program.communicate(timeout=LONG_S)
    assert program.returncode == 0, err
    lines = out.splitlines()
    assert lines[0] == "main runs"
    assert lines[2:] == ["crashed", "1"]
    assert gone(int(lines[1].split()[1]))


@pytest.mark.long
def test_a_fork_that_a_signal_interrupts_leaves_no_engine_and_no_answer_for_the_next_call(tiny, tmp_path):
    more = textwrap.dedent("""
        import os, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        server = process._servers["transformers"]
        os.kill(server.process.pid, signal.SIGSTOP)  # it does not answer until the signal has come
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        settings = EngineSettings(device="cpu", threads=1)
        try:
            process.EngineProcess("transformers", sys.argv[1], settings, sys.argv[2])
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        os.kill(server.process.pid, signal.SIGCONT)
        engine.close()
        print(server.process.wait(300), flush=True)
        engine = process.EngineProcess("transformers", sys.argv[1], settings, sys.argv[2])
        print(len(engine.nll([[1, 2]])), flush=True)
    """)
    with run_program(tiny, tmp_path, more) as program:
        out, err = program.communicate(timeout=LONG_S)
    assert program.returncode == 0, err
    lines = out.splitlines()
    assert lines[2:] == ["interrupted", "0", "1"]
    assert gone(int(lines[1].split()[1]))


@pytest.mark.long
def test_a_program_ends_by_itself_and_is_not_run_again(tiny, tmp_path):
    """No `main runs` from the warm process or the engine, and nothing is left when it is over."""
    with run_program(tiny, tmp_path, "print(len(engine.nll([[1, 2, 3]])[0]), flush=True)") as program:
        out, err = program.communicate(timeout=LONG_S)
    assert program.returncode == 0, err
    lines = out.splitlines()
    assert [lines[0], *lines[2:]] == ["main runs", "2"]
    for pid in map(int, lines[1].split()):
        assert gone(pid)


def test_a_library_that_cannot_be_imported_is_unavailable(monkeypatch, tmp_path):
    """The reason comes out of the warm process."""
    broken = tmp_path / "broken"
    (broken / "vllm").mkdir(parents=True)
    (broken / "vllm" / "__init__.py").write_text("raise ImportError('libcuda.so.1 is missing')")
    monkeypatch.syspath_prepend(str(broken))
    monkeypatch.setattr(process.backends, "unavailable", lambda name: None)
    with contextlib.suppress(KeyError):
        process._servers.pop("vllm").close()
    with pytest.raises(BackendUnavailable, match=r"libcuda\.so\.1 is missing") as raised:
        process.EngineProcess("vllm", tmp_path, EngineSettings(), tmp_path / "log")
    one_line(raised)


AHEAD = """
import dataclasses, sys, time
from evaluator import process
from evaluator.backends import EngineSettings, transformers
transformers.FACTS = dataclasses.replace(transformers.FACTS, imports_slowly=True)
process.warm_ahead("nosuch")
process.warm_ahead("transformers")
while not process._not_ready:
    time.sleep(0.001)
(server,) = process._not_ready
print(server.process.pid, flush=True)
"""


def ahead(tmp_path, more, *arguments):
    (tmp_path / "ahead.py").write_text(AHEAD + textwrap.dedent(more))
    return subprocess.run(
        [sys.executable, tmp_path / "ahead.py", *arguments], capture_output=True, text=True, check=True, timeout=LONG_S
    ).stdout.split()


@pytest.mark.long
def test_an_engine_is_forked_from_what_was_imported_ahead(tiny, tmp_path):
    more = """
        engine = process.EngineProcess("transformers", sys.argv[1], EngineSettings(device="cpu"), sys.argv[2])
        print(process._servers["transformers"].process.pid, len(process._servers), len(engine.nll([[1, 2]])))
    """
    begun, *found = ahead(tmp_path, more, tiny, tmp_path / "log")
    assert found == [begun, "1", "1"]
    assert gone(int(begun))


def test_what_is_imported_ahead_ends_with_a_program_that_needs_it_no_more(tmp_path):
    """It is stopped, so that it can't end by itself when its import is done."""
    (begun,) = ahead(tmp_path, "import os, signal\nos.kill(server.process.pid, signal.SIGSTOP)")
    if not gone(int(begun)):
        os.kill(int(begun), signal.SIGKILL)
        pytest.fail("it was left behind")
