"""A checkpoint on disk → its measurement in an engine of its own, timed in turn with the baseline."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from compressors.model import structure
from compressors.plan import CompressionPlan
from evaluator import backends, checkpoint_files, lengths, measure, speed
from evaluator.measure import FirstAnswers
from evaluator.measurement import Measurement, Timing
from evaluator.process import EngineProcess
from search.say import Say
from search.setup.setting import Setting
from search.stages.engines import Engines, once_more


def measure_checkpoint(
    setting: Setting,
    engines: Engines,
    baseline: Measurement,
    path: Path,
    weights_sha256: str,
    say: Say,
    then: Callable[[EngineProcess], None] = lambda engine: None,
    *,
    enough: speed.Enough = speed.ALL_TURNS,
    suspect_above: float | None = None,
    first_answers: FirstAnswers = None,
) -> Measurement:
    """Measure the checkpoint in `path`.

    An engine's process can be slow for its whole life. One that is suspected of it is replaced once by a fresh one, and
    the faster of the two counts. So is the base model's, where it takes longer than when it was measured alone; if the
    fresh one does too, the machine has become slower.

    Args:
        setting: What the study shares.
        engines: The worker's engines.
        baseline: The base model's measurement.
        path: A checkpoint's directory.
        weights_sha256: The sha256 of its weights.
        say: Told what is done.
        then: Called with the candidate's engine before it is closed, and again where an engine was killed.
        enough: When fewer turns of the timing are enough.
        suspect_above: The time ratio above which the process is suspected; None: none is.
        first_answers: Sees what is known when the first answers to a task are there, and may raise.

    Raises:
        EvaluationError: The model is broken, or the engine failed.
    """
    timed = setting.file.evaluation.is_timed
    serving = timed and setting.workload.kind == "serve"
    request = measure.Request(setting.texts.shards, setting.workload, setting.tasks, timed=timed)

    def in_engine(expected_base_ms: float) -> Measurement:
        against = engines.baseline() if timed and not serving else None
        say("starting the engine")
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(engines.start(path, "candidate"))
            servers = None
            if serving:
                say("starting the server")
                base = engines.timed_baseline()
                servers = (engines.timed(stack.enter_context(engines.serve(path, "candidate"))), base)
            measured = measure.measure_candidate(
                path,
                engine,
                request,
                against,
                weights_sha256=weights_sha256,
                expected_base_ms=expected_base_ms,
                progress=say,
                enough=enough,
                first_answers=first_answers,
                servers=servers,
            )
            then(engine)
        return lengths.with_ratio(measured, baseline)

    def in_turn() -> Measurement:
        """Measure; once more beside a fresh process of the base model, where that is surely slower than expected."""
        expected = max(baseline.time_per_token_ms, engines.base_ms)
        measured = once_more(lambda: in_engine(expected), say)
        if not timed:
            return measured
        base_ms, base_se = measured.base_time_per_token_ms, measured.base_time_per_token_ms_se
        slow = speed.surely_slower(base_ms, base_se, expected)
        longer = base_ms / baseline.time_per_token_ms - 1.0
        if engines.replaced_baseline(base_ms, slow=slow):
            say(f"the base model takes {longer:.0%} more time than when it was measured alone: a fresh process of it")
            return in_turn()
        if not speed.surely_slower(base_ms, base_se, baseline.time_per_token_ms):
            return measured
        note = f"the base model took {longer:.0%} more time beside it than when it was measured alone"
        return dataclasses.replace(measured, notes=(*measured.notes, note))

    measurement = in_turn()
    if timed:
        first = measurement.time_ratio
        if suspect_above is None or first <= suspect_above:
            return measurement
        say(f"{first:.3f} of the base model's time is more than was forecast: a fresh process")
        again = in_turn()
        faster = min(measurement, again, key=lambda one: one.time_ratio)
        note = f"timed in two processes: {first:.3f} and {again.time_ratio:.3f} of the base model's time"
        return dataclasses.replace(faster, notes=(*faster.notes, note))
    return with_predicted_time(measurement, predicted_ratio_of(setting, path))  # by what was written, not by the plan


def predicted_ratio(setting: Setting, plan: CompressionPlan) -> float:
    """Predict a plan's time per token over the base model's, from the bytes that a decode step reads."""
    base, own = setting.model.checkpoint, setting.model.identity
    return speed.predicted_time_ratio(
        candidate_bytes=_served(setting, setting.bytes_of(plan)[1], plan.precision),
        base_bytes=_served(setting, base.decode_bytes, own.precision),
        layers=plan.num_hidden_layers,
        base_layers=own.num_hidden_layers,
    )


def predicted_ratio_of(setting: Setting, path: Path) -> float:
    """Predict the same for a checkpoint of any origin."""
    described, base, own = structure.describe_any(path), setting.model.checkpoint, setting.model.identity
    read = described.decode_bytes
    return speed.predicted_time_ratio(
        candidate_bytes=_served(setting, described.bytes if read is None else read, described.dtype),
        base_bytes=_served(setting, base.size_bytes if read is None else base.decode_bytes, own.precision),
        layers=len(described.layers),
        base_layers=own.num_hidden_layers,
    )


def size_ratio_of(setting: Setting, path: Path) -> float:
    """Return the size of a checkpoint's weight files over the base model's."""
    return checkpoint_files.describe(path).bytes / checkpoint_files.describe(setting.model.path).bytes


def _served(setting: Setting, stored: int, dtype: str) -> int:
    return backends.served_bytes(setting.machine.backend, stored, dtype)


def with_predicted_time(measurement: Measurement, ratio: float) -> Measurement:
    """Return the measurement with a time that comes from weight bytes, for `evaluation.speed=predicted`.

    Args:
        measurement: A measurement without times.
        ratio: The time per token over the base model's, whose own is 1.
    """
    timing = Timing(
        time_per_token_ms=ratio,
        time_per_token_ms_se=0.0,
        base_time_per_token_ms=1.0,
        base_time_per_token_ms_se=0.0,
        time_ratio=ratio,
        time_ratio_se=0.0,
        samples=0,
    )
    return measure.with_timing(measurement, timing)
