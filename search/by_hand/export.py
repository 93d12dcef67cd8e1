"""The best trial → a checkpoint directory, checked by loading it before it is put in its place."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from compressors.files import write_json
from compressors.model.transformers_version import retarget
from compressors.plan import DESCRIPTION, CompressionPlan
from evaluator.measurement import Measurement
from evaluator.process import EngineProcess
from evaluator.score import score_of
from search import files
from search.by_hand import evaluate
from search.errors import SearchError, UsageError
from search.files import read_json
from search.setup.machine import require_disk
from search.setup.setting import Setting
from search.stages.bench import Bench


@dataclasses.dataclass(frozen=True)
class Exported:
    trial: int
    path: Path
    score: float
    perplexity: float
    compared: str  # how the export was compared with what was measured


def choose(study: optuna.Study, number: int | None) -> FrozenTrial:
    """Trial `number`, or the best feasible one. Raises UsageError for one that was not measured."""
    if number is None:
        try:
            return study.best_trial
        except ValueError:
            raise UsageError(
                f"study {study.study_name!r} has no measured trial yet; run it until one is complete"
            ) from None
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    trial = trials.get(number)
    if trial is None:
        raise UsageError(f"trial {number}: study {study.study_name!r} has trials 0 to {len(trials) - 1}")
    if trial.state != TrialState.COMPLETE:
        why = trial.user_attrs.get("reason", "it has not ended")
        raise UsageError(
            f"trial {number} is {trial.state.name}, so it was never measured ({why}); export a "
            "complete one, see `optuna-search status`"
        )
    return trial


def export(
    setting: Setting,
    trial: FrozenTrial,
    to: Path,
    say: Callable[[str], None] = lambda _: None,
    target: str | None = None,
) -> Exported:
    """Write `trial`'s checkpoint to `to`, beside its place and then renamed; what was there before is replaced.

    Before that it is loaded in a fresh engine and must give the logits of the measurement, bit for bit.
    target: the version of transformers that is to read it; None: the running one.
    Raises UsageError when `to` holds something that is not a model, SearchError when the comparison fails.
    """
    files.refuse_foreign(to, "export")
    plan = CompressionPlan.from_dict(trial.user_attrs["plan"])
    name = trial.user_attrs.get("measurement", setting.key(plan))
    values = read_json(setting.outputs / "measurements" / f"{name}.json")
    if values is None:
        raise UsageError(
            f"trial {trial.number}: its measurement {setting.outputs}/measurements/{name}.json is "
            "gone; name the directory "
            "that the study ran with (outputs=DIRECTORY)"
        )
    measurement = Measurement.from_dict(values)
    with Bench(setting, say) as bench:
        say("building")
        built, weights_sha256 = bench.build(plan)
        if weights_sha256 != measurement.weights_sha256:
            raise SearchError(
                f"export: trial {trial.number}'s weights are {weights_sha256[:12]}… and "
                f"{measurement.weights_sha256[:12]}… were measured; "
                f"delete {built} and run the study again"
            )
        baseline = bench.baseline()
    require_disk(int(measurement.model_size_mb * 1e6) + 50_000_000, to.parent, "the export")
    with files.beside(to, "export") as scratch:
        say("copying")
        shutil.copytree(built, scratch)
        described = read_json(scratch / DESCRIPTION) or {}
        result = {
            "name": f"{setting.file.study_name}-{trial.number}",
            "study": setting.file.study_name,
            "trial": trial.number,
            **evaluate.result(setting, measurement, baseline, plan),
        }
        write_json(scratch / evaluate.RESULT, result)
        write_json(scratch / DESCRIPTION, {**described, "for_transformers": target})
        if target is not None:
            for change in retarget(scratch, target):
                say(change)
        compared = compare(setting, scratch, measurement, say)
        score = score_of(measurement, baseline, setting.formula)
    return Exported(trial.number, to, score.score, measurement.perplexity, compared)


def compare(setting: Setting, path: Path, measurement: Measurement, say: Callable[[str], None]) -> str:
    """Load `path` in a fresh engine and compare the logits of one window with the measured model's."""
    say("loading the export in a fresh engine")
    with EngineProcess(
        setting.backend, path, setting.engine_settings, log=setting.outputs / "logs" / "engine-export.log"
    ) as engine:
        found = engine.logits_sha256(setting.shards[0][0])
    if found != measurement.logits_sha256:
        raise SearchError(
            f"export: the reloaded model's logits ({found[:12]}…) are not those that were measured "
            f"({measurement.logits_sha256[:12]}…), "
            f"on {setting.backend}; nothing was written. Measure the plan again on this machine"
        )
    return f"logits of {len(setting.shards[0][0])} tokens equal the measured ones, bit for bit ({setting.backend})"


def to_json(exported: Exported) -> dict[str, Any]:
    return {**dataclasses.asdict(exported), "path": str(exported.path)}
