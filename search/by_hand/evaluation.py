"""Defines the evaluation of a checkpoint: eval_result.json, the file next to its weights that reports read."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressors import cached
from compressors.plan import CompressionPlan
from compressors.typed_json import typed
from evaluator import lengths
from evaluator.lengths import TOLERANCE
from evaluator.measurement import METRICS, OF_ANSWERS, Measurement
from evaluator.score import Formula, Score, score_of
from evaluator.served import Served
from evaluator.task_result import TaskResult
from evaluator.workload import Workload
from search import secrets
from search.json_values import measurement_from
from search.setup import keys
from search.setup.goal import Goal, Known
from search.setup.setting import Setting
from search.show import goal_text
from search.show.confirmed_row import ConfirmedRow
from search.show.rows import COMPARED, Result, Row

RESULT = "eval_result.json"


@dataclasses.dataclass(frozen=True)
class Confirmed:
    """Confirmed holds quality on the report text, which neither calibration nor search saw.

    Attributes:
        perplexity: The model's.
        base_perplexity: The base model's.
        perf_norm_se: The standard error of PerfNorm, paired over the shards of the text.
        text_digest: The digest of the text.
    """

    perplexity: float
    base_perplexity: float
    perf_norm: float
    perf_norm_se: float
    text_digest: str


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """BaseModel names the base model of an evaluation: where it came from, and the digest of its files."""

    source: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed holds the times of a model and of its base model under one workload; see `evaluator.workload`.

    Attributes:
        workload: What was timed.
        date: When it was measured, in ISO 8601.
        device: The device's name.
        engine_version: The engine and its version.
        served: What the model's server did under each load, of a workload of kind serve.
        base_served: The same of the base model's.
    """

    workload: Workload
    date: str
    device: str
    engine_version: str
    time_per_token_ms: float
    time_per_token_ms_se: float
    base_time_per_token_ms: float
    base_time_per_token_ms_se: float
    time_ratio: float
    time_ratio_se: float
    served: tuple[Served, ...] = ()
    base_served: tuple[Served, ...] = ()

    @classmethod
    def of(cls, measured: Measurement, baseline: Measurement, date: str) -> Speed:
        """Return the times of a measurement."""
        names = {field.name for field in dataclasses.fields(cls)} - {"date", "base_served"}
        return cls(date=date, base_served=baseline.served, **{name: getattr(measured, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**dataclasses.asdict(self), "workload": self.workload.to_dict()}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation holds the measurements of a model and its base model, with everything that a report needs.

    Attributes:
        name: The name of the run.
        score: PerfNorm, SpeedNorm and Score with their standard errors.
        date: When it was measured, in ISO 8601.
        model: The base model.
        description: What was done, in the words of the study file.
        plan: The plan that made the model; None for a model of another origin.
        base_plan: The plan that changes nothing of the base model.
        circumstances: What the measurement depends on except the models; JSON values.
        report_text: Quality on the report text, where the study file has one.
        settings: The study file without its storage; JSON values.
        words: The words of the command line that chose the study file; None for an export.
        study: The study of an exported trial.
        trial: The number of an exported trial.
        confirmed: The numbers of an exported trial in fresh engine processes, where it was confirmed.
        other_speeds: The times of the same weights under workloads of other kinds, which were measured before.
    """

    name: str
    score: Score
    date: str
    model: BaseModel
    description: str | None
    plan: CompressionPlan | None
    base_plan: CompressionPlan
    formula: Formula
    circumstances: Mapping[str, Any]
    measurement: Measurement
    baseline: Measurement
    report_text: Confirmed | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    words: tuple[str, ...] | None = None
    study: str | None = None
    trial: int | None = None
    confirmed: Mapping[str, Any] | None = None
    other_speeds: tuple[Speed, ...] = ()

    @property
    def speeds(self) -> tuple[Speed, ...]:
        """The times of the model: those that its Score is made of, then those under workloads of other kinds."""
        own = (Speed.of(self.measurement, self.baseline, self.date),) if self.measurement.timed else ()
        return (*own, *self.other_speeds)

    def with_speeds_of(self, before: Evaluation | None) -> Evaluation:
        """Return the evaluation with the times of an older one that were taken under workloads of other kinds.

        They are left out where the weights, the base model, the device or the engine were others. The confirmed numbers
        of an exported trial stay with the same weights, whatever measured them.
        """
        if before is None or before.model.digest != self.model.digest:
            return self
        if before.measurement.weights_sha256 != self.measurement.weights_sha256:
            return self
        own = self.measurement
        kept = [
            speed
            for speed in before.speeds
            if speed.workload.kind != own.workload.kind
            and (speed.device, speed.engine_version) == (own.device, own.engine_version)
        ]
        confirmed = before.confirmed if self.confirmed is None else self.confirmed
        return dataclasses.replace(self, other_speeds=tuple(kept), confirmed=confirmed)

    @property
    def length_warning(self) -> str | None:
        """What is wrong with the lengths of the model's answers, in a line, by the settings; None where nothing is."""
        if self.settings.get("score", {}).get("length") == "ignore":
            return None
        tolerance = self.settings.get("evaluation", {}).get("length_tolerance", TOLERANCE)
        return lengths.warning(self.measurement, self.baseline, tolerance)

    @property
    def of_goal(self) -> str:
        """The goal of the study file and what the model has of it, in a line; empty where the Score alone counts."""
        goal = Goal.stored(self.settings)
        if goal.is_default:
            return ""
        known = Known(self.score, self.measurement.model_size_mb / self.baseline.model_size_mb)
        verdict = "" if goal.reaches(known) else " It misses a bound."
        return f"The goal is to {goal}. The model has {goal_text.of_known(goal, known)}.{verdict}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the contents of eval_result.json."""
        exported = {} if self.trial is None else {"study": self.study, "trial": self.trial}
        confirmed = {} if self.confirmed is None else {"confirmed": dict(self.confirmed)}
        others = [speed.to_dict() for speed in self.other_speeds]
        return {
            "name": self.name,
            **exported,
            **confirmed,
            **({} if self.words is None else {"words": list(self.words)}),
            **dataclasses.asdict(self.score),
            "date": self.date,
            "model": dataclasses.asdict(self.model),
            "description": self.description,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "base_plan": self.base_plan.to_dict(),
            "formula": plain(self.formula.to_dict()),
            "circumstances": dict(self.circumstances),
            "measurement": self.measurement.to_dict(),
            "baseline": self.baseline.to_dict(),
            "report_text": None if self.report_text is None else dataclasses.asdict(self.report_text),
            "settings": dict(self.settings),
            **({"other_speeds": others} if others else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation in `values`, which another version may have written.

        Raises:
            ValueError: Something that every evaluation has is missing, or what a report reads can't be read.
        """
        try:
            for name in ("measurement", "baseline"):
                measurement_from(values[name])
            whole = {**values, "score": values, "description": values.get("description")}
            evaluation = typed(cls, whole, "evaluation")
            _require_readable(evaluation)
            return evaluation
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a whole evaluation: {cached.reason_of(error)}") from None

    @classmethod
    def read_whole(cls, path: Path) -> Evaluation:
        """Return the evaluation in a file. Raises OSError or ValueError, which says what is wrong with the file."""
        return cls.from_dict(cached.read_json(path))

    @classmethod
    def read(cls, model: Path) -> Evaluation | None:
        """Return the evaluation in the directory `model`, or None where there is no whole one."""
        try:
            return cls.read_whole(model / RESULT)
        except (OSError, ValueError, RecursionError):
            return None

    def row(self, path: Path, *, before: bool | None = None, remark: str | None = None) -> Row:
        """Return the row of the model, which is in `path`, for a comparison."""
        metrics = {name: getattr(self.measurement, name) for name in COMPARED}
        return Row(
            self.name,
            str(path),
            Result(self.plan, metrics, self.score, self.measurement.timed),
            before=before,
            remark=remark or self.length_warning,
        )

    def baseline_row(self) -> Row:
        """Return the row of the base model, which the others are compared with."""
        score = Score(1.0, 0.0, 0.0, 0.0, self.formula.weight_perf, 0.0)
        absent = [name for name in OF_ANSWERS if getattr(self.baseline, name) is None]
        known = {name: None if name in absent else METRICS[name].base for name in COMPARED}
        metrics = {name: getattr(self.baseline, name) if base is None else base for name, base in known.items()}
        return Row("baseline", self.model.source, Result(self.base_plan, metrics, score, self.baseline.timed))


def _require_readable(evaluation: Evaluation) -> None:
    """Require what a report reads of the parts that are plain JSON. Raises ValueError."""
    own, base = evaluation.measurement.shard_nll, evaluation.baseline.shard_nll
    if len(own) != len(base):
        raise ValueError(f"measurement.shard_nll has {len(own)} shards, and baseline.shard_nll has {len(base)}")
    tasks, of_base = evaluation.measurement.tasks, evaluation.baseline.tasks
    for name in tasks.keys() & of_base.keys():
        if len(_items(tasks[name]) | _items(of_base[name])) > 1:
            raise ValueError(f"the task {name} has another number of items for the model than for the baseline")
    if evaluation.confirmed is not None:
        row = typed(ConfirmedRow, evaluation.confirmed, "confirmed")
        if row.score is None or row.score_se is None:
            raise ValueError("confirmed has no score, or no score_se")
    sections = {
        name: typed(dict[str, Any], evaluation.settings.get(name, {}), f"settings.{name}")
        for name in ("text", "score", "evaluation")
    }
    typed(float, sections["evaluation"].get("length_tolerance", TOLERANCE), "settings.evaluation.length_tolerance")
    try:
        Goal.stored(evaluation.settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["settings.goal", *map(str, first["loc"])])
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _items(result: TaskResult) -> set[int]:
    """Return the number of items of a task, by its results and by its answers: one number where nothing is damaged."""
    return {len(result.correct), *([] if result.answers is None else [len(result.answers.tokens)])}


def evaluation_of(
    setting: Setting,
    measurement: Measurement,
    baseline: Measurement,
    plan: CompressionPlan | None,
    *,
    name: str,
    words: Sequence[str] | None = None,
    report_text: Confirmed | None = None,
    study: str | None = None,
    trial: int | None = None,
    confirmed: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Return the evaluation of a model that was measured just now; the arguments are its attributes."""
    return Evaluation(
        name=name,
        score=score_of(measurement, baseline, setting.formula),
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        model=BaseModel(setting.file.source_shown, setting.model.digest),
        description=setting.file.description_shown,
        plan=plan,
        base_plan=setting.model.identity,
        formula=setting.formula,
        circumstances=plain(keys.circumstances(setting)),
        measurement=measurement,
        baseline=baseline,
        report_text=report_text,
        settings=setting.file.stored(),
        words=None if words is None else tuple(secrets.masked_words(words)),
        study=study,
        trial=trial,
        confirmed=confirmed,
    )


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` as a JSON file would give them back, with lists in place of tuples."""
    plain_values: dict[str, Any] = json.loads(json.dumps(values))
    return plain_values
