"""Distills the best trials of a study from the base model, quantizes and measures them again, and ranks them.

A finalist's structure is distilled in the base model's own dtype, once for all finalists that share it, and kept under
outputs/distilled; its plan's precision is applied to the result. A killed call is resumed where it was. A model that
is there under the same settings is neither distilled nor measured again.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from compressors import build, cached
from compressors.device import release
from compressors.distillation.settings import Distillation, require_valid
from compressors.model import checkpoint, family
from compressors.model.model_directory import WEIGHTS
from compressors.plan import DESCRIPTION, CompressionPlan, canonical, name_of
from evaluator import checkpoint_files
from search import secrets
from search.by_hand import distill, evaluate, multirun
from search.by_hand.evaluation import Evaluation
from search.config.study_file import StudyFile
from search.errors import UsageError
from search.failures import FAILURES, why
from search.files import read_json
from search.say import Say
from search.setup import collect, keys
from search.setup.machine import require_disk
from search.setup.setting import BaseModel, Setting, prepare
from search.show.study_state import (
    BestOfAll,
    FinalistResult,
    FinalistRow,
    FinalistScore,
    PassedOver,
    finalists_by_score,
)
from search.stages import intact
from search.stages.bench import Bench
from search.study import best, status, workers

SUBMIT = Path("submit")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Wanted holds what is to be done with a study's `top` best trials, checked as far as possible without them."""

    top: int
    setting: Setting
    settings: Distillation
    text: distill.Text

    @property
    def target(self) -> str | None:
        """Return the version of transformers that is to read the models; None for the running one."""
        return self.setting.file.export.for_transformers


@dataclasses.dataclass(frozen=True)
class Finalist:
    """A finalist is a trial whose model is distilled.

    Attributes:
        structure: Its plan in the base model's dtype, in which it is distilled.
    """

    trial: FrozenTrial
    plan: CompressionPlan
    structure: CompressionPlan


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome holds what came of the finalists.

    Attributes:
        rows: A row for each finalist, the best first.
        passed_over: The trials that were not distilled because distillation has nothing to win there.
    """

    rows: tuple[FinalistRow, ...]
    passed_over: tuple[PassedOver, ...]


def wanted_of(file: StudyFile, top: int, tokens: int, count: int, say: Say) -> Wanted:
    """Return what is to be done, as far as it can be known before the study runs.

    Args:
        file: The study file.
        top: The number of finalists.
        tokens: The number of tokens that each distillation trains on.
        count: The number of the study's workers, which decides how it measures.
        say: Is called with the current step.

    Raises:
        UsageError: The study file can't be used, or its goal is the size, which no distillation changes.
        CompressionError: Its distillation can't train with these settings.
    """
    setting = workers.shared(prepare(file, say), count)
    if setting.goal.objective == "size":
        raise UsageError(
            f"--distill-top {top}: the goal is to {setting.goal}, and a distilled model has the size of its trial, so "
            "that none could be better; search repair: distill, with which smaller plans reach the bounds"
        )
    settings = distill.settings_of(setting, tokens)
    require_valid(settings)
    return Wanted(top, setting, settings, distill.text_of(setting, settings))


def choose(study: optuna.Study, top: int, base: CompressionPlan) -> tuple[list[Finalist], list[PassedOver]]:
    """Return the best measured trials of different plans that cut something, and better ones that cut nothing."""
    chosen: list[Finalist] = []
    passed_over: list[PassedOver] = []
    seen = set()
    for trial in best.ranked(study.get_trials(deepcopy=False)):
        if len(chosen) == top:
            break
        plan = CompressionPlan.from_dict(trial.user_attrs["plan"])
        if plan in seen:
            continue
        seen.add(plan)
        structure = canonical(dataclasses.replace(plan, precision=base.precision), base)
        if structure == base:
            reason = f"{name_of(plan, base)} cuts nothing: in {base.precision} there is nothing to win back"
            passed_over.append(PassedOver(trial.number, reason))
        else:
            chosen.append(Finalist(trial, plan, structure))
    return chosen, passed_over


def distill_finalists(wanted: Wanted, study: optuna.Study, say: Say, warn: Say, words: Sequence[str] = ()) -> Outcome:
    """Distill, quantize and measure the study's finalists in submit/model_kd_NAME; store their rows with the study.

    A finalist that can't be made or measured has its reason in its row, and the next one begins. KeyboardInterrupt
    leaves what is done; a later call does the rest.

    Args:
        wanted: What is to be done.
        study: The study.
        say: Is called with the current step.
        warn: Is called with a warning.
        words: The words of the command line that chose the study file.
    """
    finalists, passed_over = choose(study, wanted.top, wanted.setting.model.identity)
    for one in passed_over:
        warn(f"trial {one.trial} is not distilled: {one.reason}")
    if len(finalists) < wanted.top:
        warn(f"--distill-top {wanted.top}: the study has {len(finalists)} measured plans that cut something")
    paths = list(_paths(finalists, wanted.setting))
    rows: dict[int, FinalistRow] = {}

    def failed(finalist: Finalist, path: Path, error: Exception) -> None:
        number, told = finalist.trial.number, why(error)
        row = dataclasses.replace(_begun(finalist, path), failure=told["failure"], reason=told["reason"])
        rows[number] = row
        earlier = _measured(study, number)
        stays = "" if earlier is None else f"; the result that {earlier.path} has from an earlier call stays"
        warn(f"trial {number}, {path.name}: {row.reason}{stays}")
        if earlier is None:
            _store(study, row)

    with Bench.of(wanted.setting) as bench:
        for place, (finalist, path) in enumerate(zip(finalists, paths, strict=True)):
            # all of them are made before an engine takes its memory

            def said(text: str, where: str = f"finalist {place + 1} of {len(finalists)}") -> None:
                say(f"{where}: {text}")

            try:
                _make(finalist, path, wanted, study, bench, said)
            except FAILURES as error:
                failed(finalist, path, error)
        for finalist, path in zip(finalists, paths, strict=True):
            if finalist.trial.number in rows:
                continue
            try:
                known = evaluate.known_evaluation(path, wanted.setting)
                evaluation = known or multirun.evaluate(bench, path, path.name, say, warn, words)
            except FAILURES as error:
                failed(finalist, path, error)
                continue
            row = _row(finalist, path, evaluation)
            _store(study, row)
            rows[finalist.trial.number] = dataclasses.replace(row, reused=known is not None)
    return Outcome(tuple(finalists_by_score(rows.values())), tuple(passed_over))


# -- where each goes -----------------------------------------------------------------------------------------


def _paths(finalists: Sequence[Finalist], setting: Setting) -> Iterator[Path]:
    """Yield each finalist's directory: submit/model_kd_NAME, with _trialN where that holds another plan's model."""
    for finalist in finalists:
        path = SUBMIT / f"model_kd_{name_of(finalist.plan, setting.model.identity)}"
        if path.exists() and not _is_of(path, finalist.plan, setting):
            path = path.with_name(f"{path.name}_trial{finalist.trial.number}")
        yield path


def _is_of(path: Path, plan: CompressionPlan, setting: Setting) -> bool:
    """Return whether `path` holds a finalist of this plan and base model, however it was distilled."""
    return bool(_distilled(path).get("plan_digest") == keys.plan_digest(setting, plan))


def _distilled(path: Path) -> Mapping[str, Any]:
    """Return how the model in `path` was distilled; nothing where there is no such model."""
    how = (read_json(path / DESCRIPTION) or {}).get("distilled")
    return how if isinstance(how, dict) else {}


# -- how each is made ----------------------------------------------------------------------------------------


def _make(finalist: Finalist, path: Path, wanted: Wanted, study: optuna.Study, bench: Bench, say: Say) -> None:
    """Write the finalist's model to `path`, unless it is there."""
    setting = wanted.setting
    digest = keys.plan_digest(setting, finalist.structure)
    key = distill.key(setting, digest, wanted.settings, wanted.text)
    if _is_there(path, key, finalist, wanted):
        return
    if path.exists() and not _is_of(path, finalist.plan, setting):
        raise UsageError(f"distill to {path}: holds another model; move it away")
    source = setting.outputs / "distilled" / key
    if "distilled" not in (cached.known(source, intact.read, tree=True) or {}):
        student, _ = bench.build(finalist.structure, say, limited=False)  # its precision is still to come
        try:
            distill.distill_model(setting, student, wanted.settings.tokens, source, None, say, text=wanted.text)
        finally:
            release(setting.machine.device)
    _drop_student(digest, study, setting)  # also that of a call that was killed here
    _apply_precision(finalist, source, path, key, wanted, say)


def _is_there(path: Path, key: str, finalist: Finalist, wanted: Wanted) -> bool:
    """Return whether `path` holds this finalist, distilled by the settings with this `key`, for the same target."""
    described = read_json(path / DESCRIPTION) or {}
    return (
        _is_of(path, finalist.plan, wanted.setting)
        and _distilled(path).get("distillation") == key
        and described.get("for_transformers") == wanted.target
        and (path / WEIGHTS).is_file()
        and described.get("weights_sha256") == checkpoint_files.weights_sha256_of(path)
    )


def _drop_student(digest: str, study: optuna.Study, setting: Setting) -> None:
    """Delete what was built to be distilled, except a trial's checkpoint: those stay by the study's own rule."""
    if any(trial.user_attrs.get("checkpoint") == digest for trial in study.get_trials(deepcopy=False)):
        workers.keep_best_checkpoints(study, setting)
    else:
        shutil.rmtree(setting.outputs / "checkpoints" / digest, ignore_errors=True)


def _apply_precision(finalist: Finalist, source: Path, path: Path, key: str, wanted: Wanted, say: Say) -> None:
    """Write the distilled model in `source` to `path`, in the finalist's precision, with second moments of its own."""
    setting = wanted.setting
    distilled = checkpoint.Checkpoint.read(source)
    own = CompressionPlan.identity(distilled.config)
    # the dimensions are those of `own` already and the repair was the distillation: precision is left
    to_apply = canonical(dataclasses.replace(finalist.plan, repair="none"), own)
    its_family = family.family_of(distilled)
    moments = None
    if build.needs_moments(to_apply):
        digest = checkpoint.digest_of(source, setting.outputs / "digests")
        its_own = dataclasses.replace(setting, model=BaseModel(source, distilled, digest, its_family, own))
        moments = collect.moments_for(its_own, to_apply, say)
    how = {
        **_distilled(source),
        "distillation": key,
        "plan": finalist.plan.to_dict(),
        "plan_digest": keys.plan_digest(setting, finalist.plan),
        "trial": finalist.trial.number,
    }
    try:
        made = build.apply(
            to_apply, distilled, its_family, None, moments=moments, device=setting.machine.device, say=say
        )
        build.require_size(made, setting.max_bytes)
        require_disk(made.file_bytes, path.parent, "the distilled model")
        say(f"writing {path.name}, {made.file_bytes / 1e6:.0f} MB")
        distill.write(made, path, wanted.target, setting, how)
    finally:
        if moments is not None:
            shutil.rmtree(moments.path, ignore_errors=True)
        release(setting.machine.device)


# -- rows ----------------------------------------------------------------------------------------------------


def _begun(finalist: Finalist, path: Path) -> FinalistRow:
    trial = finalist.trial
    before = FinalistScore.from_dict({**trial.user_attrs, "score": best.score_of(trial)})
    return FinalistRow(trial.number, path.name, str(path), before)


def _row(finalist: Finalist, path: Path, evaluation: Evaluation) -> FinalistRow:
    how, measured = _distilled(path), evaluation.measurement
    after = FinalistScore(**dataclasses.asdict(evaluation.score), kl_nats_per_token=measured.kl_nats_per_token)
    result = FinalistResult(
        after=after,
        tokens=how["tokens"],
        seconds=round(how["seconds"], 1),
        held_out_kl=(how["kl_before"], how["kl_best"]),
        stopped=how["stopped"],
        weights_sha256=measured.weights_sha256,
        length_flag=evaluation.length_warning,
    )
    return dataclasses.replace(_begun(finalist, path), result=result)


def _store(study: optuna.Study, row: FinalistRow) -> None:
    """Store the row in place of an earlier one of the same trial."""
    others = [one for one in study.user_attrs.get(status.DISTILLED, []) if one["trial"] != row.trial]
    study.set_user_attr(status.DISTILLED, [*others, row.to_dict()])


def _measured(study: optuna.Study, number: int) -> FinalistRow | None:
    """Return the row of the trial's distilled model, if the very model that was measured is still in its place."""
    for row in status.distilled_of(study):
        if row.trial == number and row.result is not None and status.is_there(row):
            same = row.result.weights_sha256 == checkpoint_files.weights_sha256_of(Path(row.path))
            return row if same else None
    return None


def commands(winner: BestOfAll, words: Sequence[str], study_words: Sequence[str]) -> list[str]:
    """Return the command lines that pack the best model of all.

    Args:
        winner: The best model of all.
        words: The words of the command line that chose the study file.
        study_words: The words that chose the study in the storage.
    """
    package = ["optuna-search", "package", *words]
    if winner.path is not None:
        lines = [[*package, "--model", winner.path]]
    else:
        lines = [["optuna-search", "export", *words, *study_words, "--trial", str(winner.trial)], package]
    return [shlex.join(secrets.masked_words(line)) for line in lines]
