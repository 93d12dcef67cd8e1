"""Defines the sections of the study file: every key with its type, its default and the values that are refused.

This module knows no Optuna and builds nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from evaluator import gpus
from search import secrets
from search.config import references
from search.config.compression import Compression
from search.config.evaluation_section import Evaluation
from search.config.goal import GoalSection
from search.config.section import Section
from search.config.space_section import Space
from search.config.text_section import Text


class Model(Section):
    """Model names the base model."""

    source: str  # a local directory, a hub id, or the name of the embedded model
    revision: str | None = None
    num_layers: Annotated[int, Field(ge=1)] | None = None  # expected of the result; `compression` decides


class ScoreSection(Section):
    """ScoreSection holds the weights of the Score, and what longer answers of a model do to it."""

    weight_perf: Annotated[float, Field(ge=0)] = 0.5
    weight_speed: Annotated[float, Field(ge=0)] = 0.5
    length: Literal["ignore", "flag", "penalise"] = "flag"

    @property
    def weights(self) -> dict[str, float]:
        """The weights of PerfNorm and SpeedNorm alone, by their keys."""
        return {"weight_perf": self.weight_perf, "weight_speed": self.weight_speed}


class Sampler(Section):
    """Sampler holds the settings of the study's sampler."""

    name: Literal["tpe", "gp", "forecast", "random"] = "tpe"
    n_startup_trials: Annotated[int, Field(ge=1)] = 10


class Pruner(Section):
    """Pruner holds the settings of the study's pruner."""

    name: Literal["wilcoxon", "median", "hyperband", "none"] = "wilcoxon"
    p_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
    n_startup_steps: Annotated[int, Field(ge=0)] = 4  # shards before a trial may be pruned
    n_startup_trials: Annotated[int, Field(ge=0)] = 4  # median only
    reduction_factor: Annotated[int, Field(ge=2)] = 3  # hyperband only


class DistillationSection(Section):
    """DistillationSection holds how models are distilled; see `compressors.distillation.settings.Distillation`."""

    tokens: Annotated[int, Field(ge=1)] = 2_000_000
    batch_tokens: Annotated[int, Field(ge=1)] = 32_768
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    temperature: Annotated[float, Field(gt=0)] = 1.0
    weight_ce: Annotated[float, Field(ge=0)] = 0.0
    evaluate_every: Annotated[int, Field(ge=1)] = 524_288
    patience: Annotated[int, Field(ge=1)] = 4
    seed: int = 0


def _seconds(value: Any) -> Any:
    """Return the seconds of a length of time such as 90, 45s, 30m, 2h or 1h30m."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", value.replace(" ", ""))
    if found is None or not any(found.groups()):
        raise ValueError(f"{value!r} is no length of time; write it as 90, 45s, 30m, 2h or 1h30m")
    hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return 3600 * hours + 60 * minutes + seconds


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]  # a length of time, which may be written as 2h


class Limits(Section):
    """Limits holds the limits on models, trials and disk space."""

    max_size_mb: Annotated[float, Field(gt=0)] | None = None  # the size of model.safetensors, 1 MB = 1e6 bytes
    max_consecutive_failures: Annotated[int, Field(ge=1)] = 5
    time: Seconds | None = None  # after which `run` begins no trial; what runs is finished
    patience: Annotated[int, Field(ge=1)] | None = None  # finished trials without a better one that end the study
    max_zip_mb: Annotated[float, Field(gt=0)] | None = None  # the size of submit.zip
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2  # the number of best trials whose checkpoints stay on disk


class Confirm(Section):
    """Confirm holds how a study confirms its best trials; see `search.confirm`."""

    top: Annotated[int, Field(ge=0)] = 3  # trials; 0: `run` confirms none
    pairs: Annotated[int, Field(ge=1)] = 3  # pairs of fresh engine processes for each
    server: dict[str, Any] | None = None  # arguments of the engine's server, by their own names


class Export(Section):
    """Export names the reader of exported models."""

    for_transformers: str | None = None  # the version that reads what export and compress write; null: this one
    target_gpu: str | None = None  # the GPU that serves it, by its name in evaluator.gpus; null: the one at hand

    @field_validator("target_gpu")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        names = {name.replace(" ", "").lower(): name for name in gpus.CAPABILITIES}
        if value is None:
            return None
        known = names.get(value.replace(" ", "").lower())
        if known is None:
            raise ValueError(f"{value!r} is not one of {', '.join(gpus.CAPABILITIES)}; leave it out for another GPU")
        return known


class Tracking(Section):
    """Tracking holds how a study is tracked in MLflow."""

    mlflow: bool = True
    experiment: str = "optuna-search"


class StudyFile(Section):
    """StudyFile holds a study file: one field for each key or section."""

    study_name: Annotated[str, Field(pattern=r"^[^'\"`]+$")]
    experiment_name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None  # the name of what is compressed by hand
    description: str | None = None
    trials: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0)] = 0
    storage: str = "sqlite:///outputs/studies.db"
    storage_patience: Annotated[float, Field(ge=1)] = 60.0  # seconds
    outputs: Path = Path("outputs")
    model: Model
    compression: Compression = Compression()
    space: Space = Space()
    text: Text = Text()
    evaluation: Evaluation = Evaluation()
    score: ScoreSection = ScoreSection()
    goal: GoalSection = GoalSection()
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    limits: Limits = Limits()
    confirm: Confirm = Confirm()
    export: Export = Export()
    distillation: DistillationSection = DistillationSection()
    tracking: Tracking = Tracking()

    _references: dict[tuple[str | int, ...], str] = PrivateAttr(default_factory=dict)

    def refer(self, known: dict[tuple[str | int, ...], str]) -> None:
        """Note which values refer to the environment, and how they are written."""
        self._references = known

    def stored(self) -> dict[str, Any]:
        """Return the values as JSON for what is kept: without the storage, with `${oc.env:NAME}` as it is written."""
        return {key: value for key, value in self.shown().items() if key != "storage"}

    def shown(self) -> dict[str, Any]:
        """Return the values as JSON without secrets, with `${oc.env:NAME}` as it is written."""
        values: dict[str, Any] = references.put_back(self.model_dump(mode="json"), self._references)
        if ("storage",) not in self._references:
            values["storage"] = secrets.masked_url(self.storage)
        return values

    @property
    def source_shown(self) -> str:
        """Return `model.source` without secrets, with `${oc.env:NAME}` as it is written."""
        return self._references.get(("model", "source")) or secrets.masked_places(self.model.source)

    @property
    def description_shown(self) -> str | None:
        """Return the description without secrets, with `${oc.env:NAME}` as it is written."""
        if self.description is None:
            return None
        return self._references.get(("description",)) or secrets.masked_places(self.description)

    def to_line(self) -> str:
        """Return the study file as a line of JSON for another process of this program; it holds what is secret."""
        known = [[list(location), text] for location, text in self._references.items()]
        return json.dumps({"file": self.model_dump(mode="json"), "references": known})

    @classmethod
    def from_line(cls, line: str) -> Self:
        """Return the study file that `to_line` wrote."""
        values = json.loads(line)
        file = cls.model_validate(values["file"])
        file.refer({tuple(location): text for location, text in values["references"]})
        secrets.remember_url(file.storage)
        return file

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if self.score.weight_perf + self.score.weight_speed <= 0:
            raise ValueError("score: weight_perf and weight_speed are both 0, so that every trial would score 0")
        return self

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        plain = self.goal.objective == "score" and not self.goal.bounds
        if not plain and self.pruner.name not in ("wilcoxon", "none"):
            raise ValueError(
                f"pruner: {self.pruner.name} compares a trial with all others, also with those that miss the goal's "
                "bounds; choose wilcoxon or none"
            )
        return self

    @model_validator(mode="after")
    def _readable(self) -> Self:
        version = self.export.for_transformers
        if version is not None and "8-bit" in (*self.space.lm_head, self.compression.lm_head):
            from compressors.errors import CheckpointError
            from compressors.model import transformers_version  # imports torch: only where it is needed

            try:
                old = transformers_version.in_old_form(version)
            except CheckpointError:  # export reports it
                old = False
            if old:
                raise ValueError(
                    f"lm_head: 8-bit with export.for_transformers: {version}: {transformers_version.NO_LM_HEAD}; "
                    "choose 16-bit, or export.for_transformers=null where the server has a newer vLLM"
                )
        return self
