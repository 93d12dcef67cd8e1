"""The base model's measurement: taken once, kept under what it depends on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from compressors import cached
from compressors.files import write_json
from evaluator import measure, score
from evaluator.measurement import METRICS, Measurement
from search.errors import UsageError
from search.say import Say
from search.setup import keys
from search.setup.setting import Setting
from search.stages import measurements
from search.stages.engines import Engines, once_more

BASELINE_RESULT = "baseline_result.json"  # in outputs/: the baseline that was used last, for people


def baseline(setting: Setting, engines: Engines, say: Say, *, again: bool = False) -> Measurement:
    """Return the base model's measurement.

    Args:
        setting: What the study shares.
        engines: The worker's engines.
        say: Told what is done.
        again: Measure it although its measurement is known.

    Raises:
        UsageError: The base model solves nothing of a task, so that no score can be relative to it.
        EvaluationError: The model or the engine is broken.
    """
    path = keys.baseline_path(setting)

    def take(path: Path) -> None:
        say("baseline: starting the engine")
        timed = setting.file.evaluation.is_timed
        request = measure.Request(setting.texts.shards, setting.workload, setting.tasks, timed=timed)
        measured = once_more(
            lambda: measure.measure_base(
                setting.model.path,
                engines.baseline(),
                request,
                progress=lambda what: say(f"baseline: {what}"),
                enough=setting.enough,
                server=engines.timed_baseline() if timed and setting.workload.kind == "serve" else None,
            ),
            say,
        )
        measurements.keep(path, measured)

    if again:
        take(path)
    measurement = cached.kept(
        path,
        lambda path: measurements.read(path, setting),
        take,
        lambda: say("baseline: waiting for another process that measures it"),
    )
    cached.known(setting.outputs / BASELINE_RESULT, cached.read_json, held=True)  # what can't be replaced is removed
    write_json(
        setting.outputs / BASELINE_RESULT,
        {
            **measurement.to_dict(),
            "model": {"source": setting.file.source_shown, "digest": setting.model.digest},
            "circumstances": keys.circumstances(setting),
        },
    )
    try:
        score.score_of(measurement, measurement, setting.formula)
    except ValueError as error:  # a task of which the base model solves nothing
        raise UsageError(str(error)) from None
    return measurement


def as_trial(baseline: Measurement) -> Measurement:
    """Return the measurement that the base model has as a trial: what it is compared with is itself."""
    known = {
        name: metric.base
        for name, metric in METRICS.items()
        if metric.base is not None and not (metric.optional and getattr(baseline, name) is None)
    }
    return dataclasses.replace(baseline, time_ratio=1.0, time_ratio_se=0.0, **known)  # type: ignore[arg-type]
