"""The best trials of a study, each distilled from the base model, quantised again, measured again, and ranked.

A finalist's structure is distilled in the base model's own dtype, once for all finalists that share it, and kept under
outputs/distilled; its plan's precision is applied to what comes out. All of it goes on where a killed call was, and
what is there under the same settings is neither distilled nor measured again.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from compressors import build
from compressors.device import release
from compressors.distillation.settings import Distillation, require_valid
from compressors.model import checkpoint, family
from compressors.model.transformers_version import in_old_form
from compressors.plan import DESCRIPTION, CompressionPlan, canonical, name_of
from evaluator import measure
from search.by_hand import distill, evaluate, multirun
from search.config.study_file import StudyFile
from search.errors import UsageError
from search.failures import FAILURES, why
from search.files import read_json
from search.setup.machine import require_disk
from search.setup.setting import Say, Setting, prepare
from search.stages.bench import Bench
from search.study import status, workers

SUBMIT = Path("submit")
KEYS = ("score", "score_se", "perf_norm", "perf_norm_se", "speed_norm", "speed_norm_se", "kl_nats_per_token")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be done with a study's `top` best trials, checked as far as that goes without them."""

    top: int
    setting: Setting
    settings: Distillation
    text: distill.Text

    @property
    def target(self) -> str | None:
        return self.setting.file.export.for_transformers


@dataclasses.dataclass(frozen=True)
class Finalist:
    """structure: its plan in the base model's dtype, which is what is distilled."""

    trial: FrozenTrial
    plan: CompressionPlan
    structure: CompressionPlan


@dataclasses.dataclass(frozen=True)
class Outcome:
    """rows: of the finalists, the best first. passed_over: trial and reason of those that had nothing to win."""

    rows: list[dict[str, Any]]
    passed_over: list[dict[str, Any]]


def wanted_of(file: StudyFile, top: int, tokens: int, count: int, say: Say) -> Wanted:
    """What can be known before the study runs. count: of the study's workers, as they decide how it measures.

    Raises UsageError and its kin, CompressionError for settings that can't be trained with.
    """
    setting = workers.shared(prepare(file, say), count)
    settings = distill.settings_of(setting, tokens)
    require_valid(settings)
    if file.export.for_transformers is not None:
        in_old_form(file.export.for_transformers)
    return Wanted(top, setting, settings, distill.text_of(setting, settings))


def choose(study: optuna.Study, top: int, base: CompressionPlan) -> tuple[list[Finalist], list[dict[str, Any]]]:
    """The best measured trials of different plans that cut something, and those before them that cut nothing."""
    chosen: list[Finalist] = []
    passed_over: list[dict[str, Any]] = []
    seen = set()
    for trial in _ranked(study):
        if len(chosen) == top:
            break
        its = CompressionPlan.from_dict(trial.user_attrs["plan"])
        if its in seen:
            continue
        seen.add(its)
        structure = canonical(dataclasses.replace(its, precision=base.precision), base)
        if structure == base:
            reason = f"{name_of(its, base)} cuts nothing: in {base.precision} there is nothing to win back"
            passed_over.append({"trial": trial.number, "reason": reason})
        else:
            chosen.append(Finalist(trial, its, structure))
    return chosen, passed_over


def _ranked(study: optuna.Study) -> list[FrozenTrial]:
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [trial for trial in complete if all(value <= 0 for value in trial.constraints.values())]
    return sorted(feasible, key=lambda trial: (-(trial.value or 0.0), trial.number))


def distil(wanted: Wanted, study: optuna.Study, say: Say, warn: Say, words: Sequence[str] = ()) -> Outcome:
    """Distil, quantise and measure the study's finalists: submit/model_kd_NAME, and their rows in the study's storage.

    One that can't be made or measured has its reason in its row, and the others go on. words: of the command line that
    chose the study file. KeyboardInterrupt leaves what is done, and a later call does the rest.
    """
    setting = wanted.setting
    finalists, passed_over = choose(study, wanted.top, setting.identity)
    for one in passed_over:
        warn(f"trial {one['trial']} is not distilled: {one['reason']}")
    if len(finalists) < wanted.top:
        warn(f"--distill-top {wanted.top}: the study has {len(finalists)} measured plans that cut something")
    paths = dict(zip([one.trial.number for one in finalists], _paths(finalists, setting), strict=True))
    rows: dict[int, dict[str, Any]] = {}

    def failed(finalist: Finalist, error: Exception) -> None:
        number, path = finalist.trial.number, paths[finalist.trial.number]
        rows[number] = {**_begun(finalist, path), **why(error)}
        earlier = _measured(study, number)
        stays = "" if earlier is None else f"; the result that {earlier['path']} has from an earlier call stays"
        warn(f"trial {number}, {path.name}: {rows[number]['reason']}{stays}")
        if earlier is None:
            _store(study, rows[number])

    with Bench(setting, say) as bench:
        for place, finalist in enumerate(finalists):  # all of them before an engine takes its memory

            def said(text: str, where: str = f"finalist {place + 1} of {len(finalists)}") -> None:
                say(f"{where}: {text}")

            bench.say = said
            try:
                _make(finalist, paths[finalist.trial.number], wanted, study, bench)
            except FAILURES as error:
                failed(finalist, error)
        bench.say = say
        for finalist in finalists:
            number, path = finalist.trial.number, paths[finalist.trial.number]
            if number in rows:
                continue
            try:
                found = evaluate.known(path, setting)
                fresh = found is None
                found = found or multirun.evaluate(bench, path, path.name, warn, words)
            except FAILURES as error:
                failed(finalist, error)
                continue
            rows[number] = _row(finalist, path, found)
            _store(study, rows[number])
            rows[number] = {**rows[number], "reused": not fresh}
    return Outcome(status.by_score(list(rows.values())), passed_over)


# -- where each goes -----------------------------------------------------------------------------------------


def _paths(finalists: Sequence[Finalist], setting: Setting) -> Iterator[Path]:
    """submit/model_kd_NAME; _trialN behind it where that holds another model than this plan's."""
    for finalist in finalists:
        path = SUBMIT / f"model_kd_{name_of(finalist.plan, setting.identity)}"
        if path.exists() and not _is_of(path, finalist.plan, setting):
            path = path.with_name(f"{path.name}_trial{finalist.trial.number}")
        yield path


def _is_of(path: Path, its: CompressionPlan, setting: Setting) -> bool:
    """Whether a finalist of this plan and base model is there, however it was distilled."""
    return bool(_distilled(path).get("plan_digest") == setting.plan_digest(its))


def _distilled(path: Path) -> Mapping[str, Any]:
    found = (read_json(path / DESCRIPTION) or {}).get("distilled")
    return found if isinstance(found, dict) else {}


# -- how each is made ----------------------------------------------------------------------------------------


def _make(finalist: Finalist, path: Path, wanted: Wanted, study: optuna.Study, bench: Bench) -> None:
    """Write the finalist's model to `path`, unless it is there."""
    setting = wanted.setting
    digest = setting.plan_digest(finalist.structure)
    key = distill.key(setting, digest, wanted.settings, wanted.text)
    if _is_there(path, key, finalist, wanted):
        return
    if path.exists() and not _is_of(path, finalist.plan, setting):
        raise UsageError(f"distill to {path}: holds another model; move it away")
    source = setting.outputs / "distilled" / key
    if not _distilled(source):
        student, _ = bench.build(finalist.structure, limited=False)  # its precision is still to come
        try:
            distill.distil(setting, student, wanted.settings.tokens, source, None, bench.say, text=wanted.text)
        finally:
            release(setting.device)
    _drop_student(digest, study, setting)  # also that of a call that was killed here
    _apply_precision(finalist, source, path, key, wanted, bench.say)


def _is_there(path: Path, key: str, finalist: Finalist, wanted: Wanted) -> bool:
    there = read_json(path / DESCRIPTION) or {}
    return (
        _is_of(path, finalist.plan, wanted.setting)
        and _distilled(path).get("distillation") == key
        and there.get("for_transformers") == wanted.target
        and (path / checkpoint.WEIGHTS).is_file()
        and there.get("weights_sha256") == measure.weights_sha256_of(path)
    )


def _drop_student(digest: str, study: optuna.Study, setting: Setting) -> None:
    """What was built to be distilled goes, unless it is a trial's checkpoint: those stay by the study's own rule."""
    if any(trial.user_attrs.get("checkpoint") == digest for trial in study.get_trials(deepcopy=False)):
        workers.keep_best_checkpoints(study, setting)
    else:
        shutil.rmtree(setting.outputs / "checkpoints" / digest, ignore_errors=True)


def _apply_precision(finalist: Finalist, source: Path, path: Path, key: str, wanted: Wanted, say: Say) -> None:
    """The distilled model in `source` in the finalist's precision, with second moments of its own."""
    setting = wanted.setting
    distilled = checkpoint.Checkpoint.read(source)
    own = CompressionPlan.identity(distilled.config)
    to_apply = canonical(finalist.plan, own)  # its dimensions are those of `own`: precision is what is left
    its_family = family.family_of(distilled)
    moments = None
    if build.needs_moments(to_apply):
        its_own = dataclasses.replace(
            setting,
            base_path=source,
            base=distilled,
            base_digest=checkpoint.digest_of(source, setting.outputs / "digests"),
            family=its_family,
            identity=own,
        )
        moments = its_own.moments_for(to_apply, say)
    how = {
        **_distilled(source),
        "distillation": key,
        "plan": finalist.plan.to_dict(),
        "plan_digest": setting.plan_digest(finalist.plan),
        "trial": finalist.trial.number,
    }
    try:
        made = build.apply(to_apply, distilled, its_family, None, moments=moments, device=setting.device, say=say)
        build.require_size(made, setting.max_bytes)
        require_disk(made.file_bytes + 50_000_000, path.parent, "the distilled model")
        say(f"writing {path.name}, {made.file_bytes / 1e6:.0f} MB")
        distill.write(made, path, wanted.target, setting, how)
    finally:
        if moments is not None:
            shutil.rmtree(moments.path, ignore_errors=True)
        release(setting.device)


# -- what is said of each ------------------------------------------------------------------------------------


def _begun(finalist: Finalist, path: Path) -> dict[str, Any]:
    attrs = finalist.trial.user_attrs
    return {
        "trial": finalist.trial.number,
        "name": path.name,
        "path": str(path),
        "before": {key: attrs.get(key) for key in KEYS} | {"score": finalist.trial.value},
    }


def _row(finalist: Finalist, path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    how = _distilled(path)
    return {
        **_begun(finalist, path),
        "weights_sha256": found["measurement"]["weights_sha256"],
        "after": {**{key: found[key] for key in KEYS[:-1]}, KEYS[-1]: found["measurement"][KEYS[-1]]},
        "tokens": how["tokens"],
        "seconds": round(how["seconds"], 1),
        "held_out_kl": [how["kl_before"], how["kl_best"]],
        "stopped": how["stopped"],
    }


def _store(study: optuna.Study, row: Mapping[str, Any]) -> None:
    """In place of what was said of this trial before."""
    others = [one for one in study.user_attrs.get(status.DISTILLED, []) if one["trial"] != row["trial"]]
    study.set_user_attr(status.DISTILLED, [*others, dict(row)])


def _measured(study: optuna.Study, number: int) -> Mapping[str, Any] | None:
    """What was measured of this trial's distilled model before, if that very model is still where it was."""
    for row in study.user_attrs.get(status.DISTILLED, []):
        if row["trial"] == number and "after" in row and status.is_there(row):
            same = row.get("weights_sha256") == measure.weights_sha256_of(Path(row["path"]))
            return row if same else None
    return None


def commands(best: Mapping[str, Any], words: Sequence[str], study_words: Sequence[str]) -> list[str]:
    """The command lines that pack the best model of all (`status.best_of_all`).

    words: that choose the study file; study_words: and its study in the storage.
    """
    if best["path"] is not None:
        return [shlex.join(["optuna-search", "package", *words, "--model", best["path"]])]
    exported = ["optuna-search", "export", *words, *study_words, "--trial", str(best["trial"])]
    return [shlex.join(exported), shlex.join(["optuna-search", "package", *words])]
