"""What a GPU's state says of a timing: states are input here, as NVML would give them."""

import json
import os
import subprocess
import sys
import types

import pytest

from evaluator import nvml, speed
from evaluator.gpu_state import GpuRecord, GpuState, OtherProcess
from evaluator.gpu_watch import AGAIN, GpuWatch
from evaluator.workload import Workload

FAST = GpuState(sm_clock_mhz=1980, sm_clock_max_mhz=1980, throttle_reasons=())
HOT = GpuState(sm_clock_mhz=1200, sm_clock_max_mhz=1980, throttle_reasons=("sw_thermal_slowdown",))
IDLE = GpuState(sm_clock_mhz=345, sm_clock_max_mhz=1980, throttle_reasons=("gpu_idle",))


def test_reasons_have_the_names_of_nvidia_smi_and_unknown_ones_their_bit():
    assert nvml.reasons_of(0) == ()
    assert nvml.reasons_of(0x1 | 0x4 | 0x40) == ("gpu_idle", "sw_power_cap", "hw_thermal_slowdown")
    assert nvml.reasons_of(0x400) == ("0x400",)


@pytest.mark.parametrize(
    "reason", ["hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown"]
)
def test_slowdowns_throttle(reason):
    assert GpuState(throttle_reasons=("sync_boost", reason)).throttled_by == (reason,)


def test_an_idle_gpu_and_chosen_clocks_are_not_throttled():
    assert IDLE.throttled_by == ()
    capped = GpuState(sm_clock_mhz=345, sm_clock_max_mhz=1980, throttle_reasons=("gpu_idle", "sw_power_cap"))
    assert capped.throttled_by == ()
    assert (
        GpuState(
            sm_clock_mhz=990, sm_clock_max_mhz=1980, throttle_reasons=("applications_clocks_setting",)
        ).throttled_by
        == ()
    )
    assert GpuState().throttled_by == ()


def test_a_power_cap_is_recorded_and_is_no_fault():  # a card of 70 W runs so all the time, and the server's too
    capped = GpuState(sm_clock_mhz=1200, sm_clock_max_mhz=1980, throttle_reasons=("sw_power_cap",))
    assert capped.throttle_reasons == ("sw_power_cap",)
    assert capped.throttled_by == ()


class Steps:
    """An engine of 1 ms a step that counts its turns."""

    turns = 0

    def decode_steps(self, batch_size, prompt_tokens, steps, seed):
        self.turns += 1
        return [1e-3] * steps


WORKLOAD = Workload(decode_steps=4, turns=4)
EACH = 1 + WORKLOAD.turns  # a timing's turns of an engine, the warm-up among them


def timed(states):
    """Time an engine while the GPU passes through `states`: the first before, then one after each turn of both."""
    states = iter(states)
    watch = GpuWatch(lambda: next(states), every_s=0.0, pause_s=0.0)
    engine = Steps()
    speed.time_in_turn(engine, Steps(), WORKLOAD, lambda *progress: watch.look(), steady=watch.steady)
    return engine.turns, watch.record


READS = 2 * WORKLOAD.turns + 1  # of a timing: after each turn, and at the end


def test_a_timing_at_full_clock_is_taken_once():
    turns, record = timed([IDLE, *[FAST] * READS])
    assert turns == EACH
    assert (record.before, record.after) == (IDLE, FAST)
    assert (record.reads, record.throttled, record.taken_again) == (READS, 0, 0)
    assert record.warnings == ()


def test_a_throttled_timing_is_taken_again_and_does_not_count():
    turns, record = timed([FAST, *[HOT] * READS, *[FAST] * READS])
    assert turns == 2 * EACH
    assert (record.taken_again, record.throttled, record.lowest_sm_clock_mhz) == (1, 0, 1980)
    assert record.warnings == ()


def test_what_stays_throttled_is_kept_with_a_warning():
    turns, record = timed([FAST, *[HOT] * READS * (1 + AGAIN)])
    assert turns == (1 + AGAIN) * EACH
    assert (record.reads, record.throttled, record.taken_again) == (READS, READS, AGAIN)
    (warning,) = record.warnings
    assert "sw_thermal_slowdown" in warning
    assert "1200 of 1980 MHz" in warning


def test_one_read_of_many_spoils_nothing():
    turns, record = timed([FAST, HOT, *[FAST] * (READS - 1)])
    assert turns == EACH
    assert (record.throttled, record.throttled_by) == (1, ("sw_thermal_slowdown",))
    assert record.warnings == ()


def test_a_hot_start_spoils_nothing():
    turns, record = timed([HOT, *[FAST] * READS])
    assert (turns, record.warnings) == (EACH, ())


def test_all_turns_of_a_slow_baseline_count_and_throttled_ones_are_taken_again_twice_in_all():
    class SlowAtFirst(Steps):
        def decode_steps(self, batch_size, prompt_tokens, steps, seed):
            self.turns += 1
            return [2e-3 if self.turns <= 2 * EACH else 1e-3] * steps

    states = iter([FAST, *[HOT] * READS, *[FAST] * READS, *[FAST] * READS])
    watch = GpuWatch(lambda: next(states), every_s=0.0, pause_s=0.0)
    slow = SlowAtFirst()
    timing = speed.time_in_turn(
        Steps(), slow, WORKLOAD, lambda *progress: watch.look(), expected_base_ms=1.0, steady=watch.steady
    )
    assert slow.turns == 3 * EACH
    assert timing.samples == 2 * WORKLOAD.turns * WORKLOAD.decode_steps
    assert (watch.record.reads, watch.record.taken_again) == (2 * READS, 1)


def test_where_nothing_can_be_read_nothing_is_recorded():
    watch = GpuWatch(lambda: None, every_s=0.0)
    watch.look()
    assert watch.steady(lambda: 7) == 7
    assert watch.record is None
    assert GpuWatch.of({"device": "cpu"}).record is None


def test_a_read_that_fails_in_the_middle_is_left_out():
    turns, record = timed([FAST, *[FAST, None] * READS])
    assert turns == EACH
    assert record.reads == READS // 2 + 1


def test_processes_of_others_are_told_from_ours():
    listed = [(10, 500.0), (11, None), (12, 7.0)]
    assert nvml.strangers(listed, {10}, {10, 11}.__contains__) == (OtherProcess(11, nvml._name(11), None),)
    assert nvml.strangers([(10, 500.0)], {10}, lambda pid: True) == ()


def test_pids_of_another_namespace_are_unknown_and_no_strangers():
    assert nvml.strangers([(4_000_010, 500.0), (4_000_011, 9.0)], {10}, lambda pid: True) is None
    assert nvml.strangers([], {10}, lambda pid: True) is None


def test_processes_of_others_are_warned_of():
    crowded = GpuState(others=(OtherProcess(99, "python", 4100.0),))
    alone = GpuState(others=())
    _, record = timed([alone, crowded, *[alone] * (READS - 1)])
    (warning,) = record.warnings
    assert "python, pid 99, 4,100 MB" in warning
    assert timed([GpuState(others=None)] * (READS + 1))[1].others is None


def test_our_own_are_this_process_those_that_it_started_and_those_that_started_it():
    ask = "import os; from evaluator import nvml; print(os.getpid(), *sorted(nvml._own()))"
    child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    pid, *own = map(int, child.stdout.split())
    assert {pid, os.getpid()} <= set(own)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as started:
        assert {started.pid, os.getpid(), os.getppid()} <= nvml._own()
        assert pid not in nvml._own()
        started.communicate(b"\n")


@pytest.mark.parametrize("others", [None, (), (OtherProcess(99, "python", None),)])
def test_a_record_survives_json(others):
    _, record = timed([IDLE, *[GpuState(**{**vars(HOT), "others": others})] * READS * 3])
    assert GpuRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert record.summary


def test_without_nvml_nothing_is_known(monkeypatch):
    monkeypatch.setattr(nvml, "_opened", lambda pid: None)
    assert nvml.read("GPU-1234") is None


class Broken(types.SimpleNamespace):
    """A library whose GPU is found and answers one question alone."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = RuntimeError

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if not uuid.startswith("MIG-"):
            raise self.NVMLError(uuid)
        return uuid

    def nvmlDeviceGetClockInfo(self, handle, kind):
        if kind == self.NVML_CLOCK_SM:
            return 1700
        raise self.NVMLError("not supported")


def test_what_a_gpu_does_not_tell_is_none(monkeypatch):
    monkeypatch.setattr(nvml, "_opened", lambda pid: Broken())
    assert nvml.read("GPU-1234") == GpuState(sm_clock_mhz=1700)
    assert nvml.read("00000000:17:00.0") is None


@pytest.mark.parametrize("answer", [None, "N/A", b"N/A", [], float("nan"), types.SimpleNamespace(used="N/A", gpu=None)])
def test_an_answer_of_another_kind_is_none_too(monkeypatch, answer):
    class Odd:
        NVMLError = RuntimeError

        def __getattr__(self, name):
            return (lambda *asked: answer) if name.startswith("nvmlDevice") else 0

    monkeypatch.setattr(nvml, "_opened", lambda pid: Odd())
    assert nvml.read("GPU-1234") == GpuState()


def test_the_real_library_without_a_driver_is_no_error():
    pytest.importorskip("pynvml")
    assert nvml.read("GPU-00000000-0000-0000-0000-000000000000") is None
