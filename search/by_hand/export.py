"""Exports a trial's checkpoint, checked by loading it before it is put in its place."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from compressors.files import write_json
from compressors.model import model_directory
from compressors.model.transformers_version import in_old_form, retarget
from compressors.plan import DESCRIPTION, CompressionPlan
from evaluator.measurement import Measurement
from search import files
from search.by_hand.evaluation import RESULT, evaluation_of
from search.errors import SearchError, UsageError
from search.files import read_json
from search.setup.goal import Known
from search.setup.machine import require_disk
from search.setup.setting import Setting
from search.show import goal_text, verdict
from search.show.confirmed_row import ConfirmedRow
from search.stages import measurements
from search.stages.baseline import as_trial
from search.stages.bench import Bench
from search.stages.engines import start_engine
from search.stages.screen import with_screen
from search.study import best, status
from search.study.trials import is_base_model


@dataclasses.dataclass(frozen=True)
class Exported:
    """Exported describes a checkpoint that was exported.

    Attributes:
        trial: The number of the trial.
        path: The directory of the checkpoint.
        result: What it has of what the study's goal asks for; empty where that is the Score.
        length_flag: What is wrong with the lengths of its answers; None where nothing is.
        compared: How the export was compared with the measured model, in words.
    """

    trial: int
    path: Path
    score: float
    score_se: float
    perplexity: float
    compared: str
    result: str = ""
    length_flag: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {**dataclasses.asdict(self), "path": str(self.path)}
        absent = [name for name in ("result", "length_flag") if not values[name]]
        for name in ("score_se", *absent):  # eval_result.json has the error
            del values[name]
        return values


def choose(study: optuna.Study, number: int | None) -> tuple[FrozenTrial, ConfirmedRow | None]:
    """Return trial `number`, or the best feasible one for None, with its confirmation where there is one.

    The best is the best confirmed one, where the best measured trial is among the confirmed. The base model itself,
    whose Score needs no confirmation, stays the best where no confirmed Score is higher.

    Raises:
        UsageError: It was not measured, or no confirmed trial reaches the goal.
    """
    if number is None:
        leading = _best(study)
        row = status.confirmed_best(study)
        if row is None:
            miss = status.confirmed_miss(study)
            if miss is not None:
                raise UsageError(
                    f"{verdict.no_confirmed(best.goal_of(study), miss)}. Run the study for longer, or export that one "
                    f"with --trial {miss.trial}"
                )
            return leading, None
        goal, measured = best.goal_of(study), best.ranked(study.get_trials(deepcopy=False))
        base = next((one for one in measured if is_base_model(one)), None)
        number = row.trial if base is None or goal.value(row.known) > (base.value or 0.0) else base.number
    return _complete(study, number), next((row for row in status.confirmed_of(study) if row.trial == number), None)


def _complete(study: optuna.Study, number: int) -> FrozenTrial:
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


def _best(study: optuna.Study) -> FrozenTrial:
    measured = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    leader, closest = best.best_of(measured), best.closest_of(measured)
    if leader is not None:
        return leader
    if closest is None:
        raise UsageError(f"study {study.study_name!r} has no measured trial yet; run it until one is complete")
    raise UsageError(
        f"{best.none_reaches(study, closest)}. Run it for longer, or export that one with --trial {closest.number}"
    )


def export(
    setting: Setting,
    trial: FrozenTrial,
    to: Path,
    say: Callable[[str], None] = lambda _: None,
    target: str | None = None,
    confirmed: ConfirmedRow | None = None,
) -> Exported:
    """Write the checkpoint of `trial` to the directory `to`, which appears whole or not at all.

    Before that the checkpoint is loaded in a fresh engine and must give the logits of the measurement, bit for bit.
    A model that was in `to` is replaced.

    Args:
        setting: The setting of the study.
        trial: A complete trial.
        to: The directory to write.
        say: Is called with the current step.
        target: The version of transformers that is to read the checkpoint; None for the running one.
        confirmed: The trial's confirmed numbers, which go with the model.

    Raises:
        UsageError: `to` holds something that is not a model, or the trial's measurement is gone.
        SearchError: The rebuilt checkpoint is not the one that was measured.
    """
    files.refuse_foreign(to, "export", *setting.sources, option="--to")
    if target is not None:
        in_old_form(target)  # before anything is built
    plan = CompressionPlan.from_dict(trial.user_attrs["plan"])
    is_base = plan == setting.model.identity
    if not is_base:
        _require_measured(trial, plan, setting)
    with Bench.of(setting) as bench:
        baseline = bench.baseline(say)
        if is_base:  # its own weights may lie in other files: its logits are compared all the same
            say("building")
            built, weights_sha256 = bench.build(plan, say)
            measurement = dataclasses.replace(as_trial(baseline), weights_sha256=weights_sha256)
        else:
            built, measurement = _measured(trial, plan, bench, baseline, say)
    require_disk(int(measurement.model_size_mb * 1e6), to.parent, "the export")
    with files.atomic_directory(to, "export") as scratch:
        say("copying")
        model_directory.files_of(built, hub_cache=False)
        shutil.copytree(built, scratch, symlinks=True)
        described = read_json(scratch / DESCRIPTION) or {}
        evaluation = evaluation_of(
            setting,
            measurement,
            baseline,
            plan,
            name=f"{setting.file.study_name}-{trial.number}",
            study=setting.file.study_name,
            trial=trial.number,
            confirmed=None if confirmed is None else confirmed.to_dict(),
        )
        write_json(scratch / RESULT, evaluation.to_dict())
        numbers = {} if confirmed is None else {"confirmed": confirmed.to_dict()}
        write_json(scratch / DESCRIPTION, {**described, "for_transformers": target, **numbers})
        if target is not None:
            for change in retarget(scratch, target):
                say(change)
        compared = compare(setting, scratch, measurement, say)
    score, goal = evaluation.score, setting.goal
    known = Known(score, measurement.model_size_mb / baseline.model_size_mb)
    result = "" if goal.is_default else goal_text.of_known(goal, known)
    return Exported(
        trial=trial.number,
        path=to,
        score=score.score,
        score_se=score.score_se,
        perplexity=measurement.perplexity,
        compared=compared,
        result=result,
        length_flag=evaluation.length_warning,
    )


def _path_of(trial: FrozenTrial, plan: CompressionPlan, setting: Setting) -> Path:
    name = trial.user_attrs.get("measurement")
    return measurements.path_of(setting, plan) if name is None else measurements.measured_as(setting, name)


def _require_measured(trial: FrozenTrial, plan: CompressionPlan, setting: Setting) -> None:
    path = _path_of(trial, plan, setting)
    if not path.exists():
        raise UsageError(
            f"trial {trial.number}: its measurement {path} is gone; name the directory that the study ran with "
            "(outputs=DIRECTORY)"
        )


def _measured(
    trial: FrozenTrial, plan: CompressionPlan, bench: Bench, baseline: Measurement, say: Callable[[str], None]
) -> tuple[Path, Measurement]:
    """Return the trial's checkpoint and its measurement; damaged ones are built and measured again.

    Raises:
        SearchError: The checkpoint is not the one that was measured.
    """
    say("building")
    built, weights_sha256 = bench.build(plan, say)
    path = _path_of(trial, plan, bench.setting)
    measurement = measurements.known(path, bench.setting)
    if measurement is None:
        measurement = with_screen(bench.measure(built, weights_sha256, baseline, say), bench.screen(plan, say))
        measurements.keep(path, measurement)
    if weights_sha256 != measurement.weights_sha256:  # what is there may come from another version of a library
        shutil.rmtree(built, ignore_errors=True)
        built, weights_sha256 = bench.build(plan, say)
    if weights_sha256 != measurement.weights_sha256:
        raise SearchError(
            f"export: trial {trial.number}'s weights are {weights_sha256[:12]}… and "
            f"{measurement.weights_sha256[:12]}… were measured, with another version of this program or of its "
            "libraries; nothing was written. Run the study under another --study-name and outputs= to measure today's"
        )
    return built, measurement


def compare(setting: Setting, path: Path, measurement: Measurement, say: Callable[[str], None]) -> str:
    """Load `path` in a fresh engine, compare the logits of one window with the measured ones, and return how.

    Raises:
        SearchError: The logits differ.
    """
    say("loading the export in a fresh engine")
    log = setting.outputs / "logs" / "engine-export.log"
    with start_engine(setting.machine.backend, path, setting.engine_settings, log) as engine:
        logits_sha256 = engine.logits_sha256(setting.texts.shards[0][0])
    if logits_sha256 != measurement.logits_sha256:
        raise SearchError(
            f"export: the reloaded model's logits ({logits_sha256[:12]}…) are not those that were measured "
            f"({measurement.logits_sha256[:12]}…), "
            f"on {setting.machine.backend}; nothing was written. Measure the plan again on this machine"
        )
    tokens = len(setting.texts.shards[0][0])
    return f"logits of {tokens} tokens equal the measured ones, bit for bit ({setting.machine.backend})"
