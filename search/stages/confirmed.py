"""What was confirmed of a model: the pairs that were timed, kept one by one, and the numbers that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressors import cached
from compressors.files import digest_of_json
from compressors.plan import CompressionPlan
from compressors.typed_json import typed
from evaluator import confirmed, lengths, measure, score
from evaluator.confirmed import Estimate, TimeRatio, Verdict
from evaluator.measurement import Measurement, Timing
from search.json_values import measurement_from
from search.setup import keys
from search.setup.goal import Bound
from search.setup.setting import Setting
from search.setup.texts import Shard, report_shards

VERSION = 1  # raised when the same model would give other numbers
MOST_REPLACED = 2  # pairs with a slow process that are replaced, of each model
MARGIN = 2.0  # times evaluation.score_se: a difference of Score that makes none
SCORE_SE = 0.003  # in its place where evaluation.score_se is 0


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to confirm: a plan, and a name for messages, such as `trial 7`."""

    name: str
    plan: CompressionPlan


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked of every model of a confirmation.

    Attributes:
        setting: The study's setting.
        shards: The shards of the text that quality is computed on.
        text: The name of that text.
        directory: The directory that keeps what is known.
    """

    setting: Setting
    shards: tuple[Shard, ...]
    text: str
    directory: Path

    @classmethod
    def of(cls, setting: Setting, directory: Path | None = None) -> Asked:
        """Return what the setting asks; the search text takes the place of a report text that there is not."""
        report = report_shards(setting.file, setting.texts)
        where = setting.outputs / "confirmed" if directory is None else directory
        return cls(setting, report or setting.texts.shards, "report text" if report else "search text", where)

    @property
    def timed(self) -> bool:
        """Whether engines are timed."""
        return self.setting.file.evaluation.is_timed

    @property
    def request(self) -> measure.Request:
        """What is measured of each model beside its time."""
        return measure.Request(self.shards, self.setting.workload, self.setting.tasks, timed=False)

    @property
    def key(self) -> str:
        """Names all that the numbers depend on but the model: 16 hexadecimal digits."""
        circumstances = {name: value for name, value in keys.circumstances(self.setting).items() if name != "text"}
        text = [window for shard in self.shards for window in shard]
        server = self.setting.file.confirm.server or {}
        predicted = [] if self.timed else ["from what was written"]
        return digest_of_json([VERSION, self.setting.model.digest, circumstances, server, text, *predicted], 16)

    def path_of(self, plan: CompressionPlan | None) -> Path:
        """Return the file of a plan's record; of the base model's own as what all are compared with, for None."""
        name = "base" if plan is None else keys.plan_digest(self.setting, plan)
        return self.directory / f"{name}-{self.key}.json"


# -- what is kept --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of a model so far.

    Attributes:
        pairs: The timings of all pairs of fresh processes, in the order in which they were taken.
        measurement: Its quality on the text, with a predicted time or none; None where it is not measured yet.
    """

    pairs: tuple[Timing, ...] = ()
    measurement: Measurement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
            "measurement": None if self.measurement is None else self.measurement.to_dict(),
        }

    @classmethod
    def read(cls, path: Path, shards: int) -> Record:
        """Return the record in a file; what it raises is what is wrong with it."""
        values = cached.read_json(path)
        pairs = tuple(typed(Timing, pair, "pair") for pair in values["pairs"])
        if any(pair.time_ratio <= 0 or pair.time_ratio_se < 0 for pair in pairs):
            raise ValueError("a time ratio is not positive")
        found = values["measurement"]
        measured = None if found is None else measurement_from(found)
        if measured is not None and len(measured.shard_nll) != shards:
            raise ValueError(f"it has {len(measured.shard_nll)} shards of {shards}")
        return cls(pairs, measured)

    def missing(self, wanted: int) -> int:
        """Return how many pairs are still to be timed, so that `wanted` have no slow process.

        At most MOST_REPLACED are replaced.
        """
        good = len(self.pairs) - len(confirmed.slow(self.pairs))
        return max(0, min(wanted - good, wanted + MOST_REPLACED - len(self.pairs)))


def known(asked: Asked, plan: CompressionPlan | None) -> Record:
    """Return what is kept of a plan, or of the base model for None."""
    found = cached.known(asked.path_of(plan), lambda path: Record.read(path, len(asked.shards)))
    return Record() if found is None else found


def keep(asked: Asked, plan: CompressionPlan | None, record: Record) -> None:
    """Keep what is known of a plan. Raises MachineError when the file can't be written."""
    cached.keep_json(asked.path_of(plan), record.to_dict())


# -- what follows --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """The confirmed numbers of a model.

    Attributes:
        measurement: Its quality on the text, with the mean times of the pairs that count.
        baseline: The base model's quality on the same text.
        ratio: Its time ratio; None where nothing is timed.
        taken: The number of pairs that were timed, with those that a slow process spoilt.
        score: PerfNorm, SpeedNorm and Score, each with its standard error.
        score_half: Half of the width of the Score's 95% interval.
        better: The verdict on its Score against the base model's.
        faster: The verdict on its speed; None where nothing is timed.
        held: The verdict on each bound of the study's goal.
        notes: Remarks, such as which pairs were replaced.
    """

    model: Model
    measurement: Measurement
    baseline: Measurement
    ratio: TimeRatio | None
    taken: int
    score: score.Score
    score_half: float
    better: Verdict
    faster: Verdict | None
    held: tuple[tuple[Bound, Verdict], ...]
    notes: tuple[str, ...]


def results(asked: Asked, wanted: int, records: Sequence[tuple[Model, Record]], baseline: Measurement) -> list[Result]:
    """Return the numbers of models whose records are complete; the error between processes is pooled over them."""
    chosen = [confirmed.kept(record.pairs, wanted) for _, record in records]
    counted = [
        [record.pairs[number] for number in numbers] for (_, record), numbers in zip(records, chosen, strict=True)
    ]
    expected = confirmed.TAU_CPU if asked.setting.machine.device == "cpu" else confirmed.TAU
    ratios = confirmed.time_ratios(counted, expected) if asked.timed and records else [None] * len(records)
    return [
        _result(asked, model, record, pairs, ratio, baseline)
        for (model, record), pairs, ratio in zip(records, counted, ratios, strict=True)
    ]


def _result(
    asked: Asked,
    model: Model,
    record: Record,
    pairs: Sequence[Timing],
    ratio: TimeRatio | None,
    baseline: Measurement,
) -> Result:
    setting, formula = asked.setting, asked.setting.formula
    assert record.measurement is not None
    measured = record.measurement if ratio is None else measure.with_timing(record.measurement, _mean(pairs, ratio))
    measured = lengths.with_ratio(measured, baseline)
    scored = score.score_of(measured, baseline, formula)
    degrees = 1.0 if ratio is None else ratio.estimate.degrees
    speed = Estimate(scored.speed_norm, scored.speed_norm_se, degrees)
    perf = Estimate(scored.perf_norm, scored.perf_norm_se, len(asked.shards) - 1)
    parts = [
        (formula.weight_perf, dataclasses.replace(perf, value=perf.value - 1)),
        (formula.weight_speed, speed),
    ]
    difference = confirmed.joined(parts)
    timed = (formula.weight_speed * speed.se) ** 2 / difference.se**2 if difference.se else 0.0
    margin = MARGIN * (setting.file.evaluation.score_se or SCORE_SE)
    paired = 0 if ratio is None else ratio.pairs
    slower = margin / formula.weight_speed if formula.weight_speed else margin
    faster = None if ratio is None else confirmed.verdict(speed, slower, confirmed.SPEED_WORDS, pairs=paired)
    return Result(
        model=model,
        measurement=measured,
        baseline=baseline,
        ratio=ratio,
        taken=len(record.pairs),
        score=scored,
        score_half=difference.half_width,
        better=confirmed.verdict(difference, margin, pairs=paired, timed=timed),
        faster=faster,
        held=tuple((bound, _held(bound, perf, speed, paired)) for bound in setting.goal.bounds),
        notes=tuple(_notes(record, pairs, setting.length_warning(measured, baseline))),
    )


def _held(bound: Bound, perf: Estimate, speed: Estimate, pairs: int) -> Verdict:
    """Return whether a bound holds: more text decides that of PerfNorm, more pairs that of SpeedNorm."""
    is_speed = bound.quantity == "speed_norm"
    value = speed if is_speed else perf
    above = dataclasses.replace(value, value=value.value - bound.least)
    return confirmed.verdict(above, 0.0, confirmed.BOUND_WORDS, pairs=pairs if is_speed else 0, timed=float(is_speed))


def _mean(pairs: Sequence[Timing], ratio: TimeRatio) -> Timing:
    """Return the means over the pairs as one timing."""

    def mean(name: str) -> float:
        return float(sum(getattr(pair, name) for pair in pairs) / len(pairs))

    names = ("time_per_token_ms", "time_per_token_ms_se", "base_time_per_token_ms", "base_time_per_token_ms_se")
    return Timing(
        **{name: mean(name) for name in names},
        time_ratio=ratio.estimate.value,
        time_ratio_se=ratio.estimate.se,
        samples=sum(pair.samples for pair in pairs),
    )


def _notes(record: Record, counted: Sequence[Timing], of_lengths: str | None) -> list[str]:
    notes = [] if of_lengths is None else [of_lengths]
    slow = confirmed.slow(record.pairs)
    if not slow:
        return notes
    left_out = len(record.pairs) - len(counted)
    stay = len([number for number in slow if record.pairs[number] in counted])
    found = f"{len(slow)} of {len(record.pairs)} pairs had a process that was slow for its whole life"
    told = [f"{left_out} replaced by fresh ones" if left_out else "", f"{stay} left, and counted" if stay else ""]
    return [*notes, f"{found}: {', '.join(part for part in told if part)}"]
