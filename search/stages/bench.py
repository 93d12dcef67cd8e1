"""What one worker needs to build, screen and measure plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compressors.plan import CompressionPlan
from evaluator import quality, speed
from evaluator.closing import Closing
from evaluator.measure import FirstAnswers
from evaluator.measurement import Measurement
from evaluator.process import EngineProcess
from search.say import Say
from search.setup.setting import Setting
from search.stages import baseline, build, damage_table, measure, speed_table
from search.stages.engines import Engines
from search.stages.screen import Screen, Screener
from search.stages.side_by_side import Ahead


@dataclasses.dataclass(frozen=True)
class Bench(Closing):
    """Builds, screens and measures plans for one worker; keeps the baseline's engine open between trials.

    Use it with `with`.
    """

    setting: Setting
    engines: Engines
    screener: Screener

    @classmethod
    def of(cls, setting: Setting) -> Bench:
        """Make a bench; no engine starts before it is wanted."""
        return cls(setting, Engines(setting), Screener(setting))

    def with_setting(self, setting: Setting) -> Bench:
        """Return a bench with the same engines for a setting that differs only in what is made by hand."""
        return dataclasses.replace(self, setting=setting)

    def close(self) -> None:
        """End the baseline's engine."""
        self.engines.close()

    def baseline(self, say: Say, *, again: bool = False) -> Measurement:
        """Return the base model's measurement, see `search.stages.baseline`."""
        return baseline.baseline(self.setting, self.engines, say, again=again)

    def base_nll(self, say: Say) -> tuple[float, ...]:
        """Return the base model's mean NLL on each shard, in nats per token."""
        return self.screener.base_nll(say)

    def shards(self, plan: CompressionPlan, say: Say) -> Iterator[quality.ShardQuality]:
        """Return the plan's quality on each shard in turn."""
        return self.screener.shards(plan, say)

    def screen(self, plan: CompressionPlan, say: Say) -> Screen:
        """Return the plan's quality on all shards, kept under its key."""
        return self.screener.screen(plan, say)

    def screen_of(self, model: Any, say: Say) -> Screen:
        """Return the quality of a model in memory that no plan made."""
        return self.screener.screen_of(model, say)

    def build(self, plan: CompressionPlan, say: Say, *, limited: bool = True) -> tuple[Path, str]:
        """Write the plan's checkpoint; return its directory and its weights' sha256, see `search.stages.build`."""
        return build.write(self.setting, plan, say, limited=limited)

    def measure(
        self,
        path: Path,
        weights_sha256: str,
        baseline: Measurement,
        say: Say,
        then: Callable[[EngineProcess], None] = lambda engine: None,
        enough: speed.Enough = speed.ALL_TURNS,
        suspect_above: float | None = None,
        first_answers: FirstAnswers = None,
    ) -> Measurement:
        """Measure the checkpoint in `path`, see `search.stages.measure`."""
        return measure.measure_checkpoint(
            self.setting,
            self.engines,
            baseline,
            path,
            weights_sha256,
            say,
            then,
            enough=enough,
            suspect_above=suspect_above,
            first_answers=first_answers,
        )

    def begin(self, say: Say, *, forecast: bool) -> Measurement:
        """Return the base model's measurement; make the tables that forecast plans, as far as they are missing.

        The damage table comes first: the base model's engine and, on a GPU, those of the speed table start meanwhile.
        There is no speed table where times decide nothing.

        Args:
            say: Told what is done.
            forecast: Whether the tables are wanted.

        Raises:
            EvaluationError: The base model or its engine is broken.
        """
        if not forecast:
            return self.baseline(say)
        timed = self.setting.wants_time
        early = timed and not speed_table.stand_ins(self.setting)  # those have engines of their own
        probes = [plan for plan, _ in speed_table.missing(self.setting)] if early else []
        with Ahead(self.setting, self.engines, probes) as ahead:
            damage_table.damage_table(self.setting, self.screener, say)
            baseline = self.baseline(say)
            if timed:
                speed_table.speed_table(self.setting, self.engines, say, ahead)
        return baseline
