"""Shows progress on standard error: the trial, its stage, the best so far, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from compressors.plan import CompressionPlan, short
from search import secrets
from search.show import baseline_text, forecast_view
from search.show.rows import Row

WIDTH = 140  # characters, where tables are printed to no terminal
ESTIMATE_S = 60.0  # the time between two lines about the time left


class Live:
    """Live shows a progress bar on a terminal, and elsewhere a line for each ended trial. Use it with `with`."""

    def __init__(self, trials: int, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        if not self._console.is_terminal:
            self._console.width = max(self._console.width, WIDTH)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[what]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[result]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=trials, what="starting", result="", left="")
        self._said = 0.0
        self._noisy = False
        self._estimated = -math.inf

    def __enter__(self) -> Live:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event of a study's run (`search.study.workers`)."""
        getattr(self, f"_on_{event['event']}", lambda _: None)(event)

    def say(self, text: str) -> None:
        """Show the current step."""
        self._on_say({"text": text})

    def warn(self, text: str) -> None:
        """Print a warning; the progress bar does not overwrite it."""
        self._on_warn({"text": text})

    def print(self, table: Any) -> None:
        """Print a table above the live line."""
        self._console.print(table)

    def bytes(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are packed."""
        self._progress.update(self._task, completed=done / 1e6, total=total / 1e6, what="packing, MB")

    def job_ended(self, number: int, row: Row) -> None:
        """Print a line for job `number` of a multirun, which has ended with `row`."""
        if row.result is None:
            text = f"FAILED: {row.reason}"
        else:
            text = score_text(row.result.score.score, row.result.score.score_se)
            text += "  (measured before)" if row.before else ""
        self._console.print(f"job {number:>3} {row.name:<28} {text}", markup=False)
        self._progress.update(self._task, completed=number + 1)

    def _on_say(self, event: dict[str, Any]) -> None:
        text = f"trial {event['trial']}: {event['text']}" if "trial" in event else event["text"]
        self._progress.update(self._task, what=escape(text))
        if not self._console.is_terminal and time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            self._console.print(f"… {text}", markup=False)

    def _on_header(self, event: dict[str, Any]) -> None:
        for text in event["lines"]:
            self._console.print(text, markup=False)

    def _on_forecast(self, event: dict[str, Any]) -> None:
        self._console.print(forecast_view.brief(event["view"]))

    def _on_warn(self, event: dict[str, Any]) -> None:
        self._console.print(secrets.masked(f"warning: {event['text']}"), markup=False)

    def _on_early(self, event: dict[str, Any]) -> None:
        self._console.print(secrets.masked(f"the study ends here: {event['text']}"), markup=False)

    def _on_stage(self, event: dict[str, Any]) -> None:
        self._progress.update(self._task, what=f"trial {event['trial']}: {event['stage']}")

    def _on_done(self, event: dict[str, Any]) -> None:
        finished, trials = event["finished"], event["trials"]
        result = ""
        if "best" in event:
            text = event.get("best_result") or score_text(event["best"], event["best_se"])
            result = f"best {text} (trial {event['best_trial']})"
        result += f", {event['pruned']} pruned" if event["pruned"] else ""
        result += f", {event['failed']} failed" if event["failed"] else ""
        left = event["left"] if finished < trials else None
        text = "" if left is None else f"about {_left(left['seconds'])}"
        self._progress.update(self._task, completed=finished, total=trials, result=result.strip(", "), left=text)
        if left is not None and time.monotonic() - self._estimated > ESTIMATE_S:
            self._estimated = time.monotonic()
            self._console.print(f"… {finished} of {trials} trials, {text}: {_stages(left['stages'])}", markup=False)

    def _on_end(self, event: dict[str, Any]) -> None:
        self._console.print(line(event), markup=False)
        noisy = baseline_text.noisy(event["speed_norm_se"], f"trial {event['trial']}")
        if noisy is not None and not self._noisy:
            self._noisy = True  # once: the tables show each error
            self.warn(noisy)
        for text in event.get("warnings", ()):
            self.warn(f"trial {event['trial']}: {text}")


def line(event: dict[str, Any]) -> str:
    """Return the line about the trial whose end `event` reports."""
    text = f"trial {event['trial']:>3} "
    if event["plan"]:
        text += f"{short(CompressionPlan.from_dict(event['plan'])):<44} "
    result = event.get("result")  # empty where the Score is all that counts
    if event["score"] is not None and event["by_definition"]:
        return text + (result or f"Score {event['score']:.4f}") + f"  ({event['reason']})"
    if event["score"] is not None:
        text += f"{result or score_text(event['score'], event['score_se'])}  {event['seconds']:.0f} s"
        return text + ("  (measured before)" if "before" in event["reason"] else "")
    if event["stopped"]:
        return text + f"stopped at {event['stage']}  {event['seconds']:.0f} s  (tried again by the next run)"
    if event["failure"]:
        return text + f"FAILED at {event['stage']}: {event['reason']}"
    return text + f"pruned at {event['stage']}  {event['seconds']:.0f} s"


def score_text(score: float, error: float | None) -> str:
    """Return a Score with its standard error, where it is known."""
    return f"Score {score:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _stages(stages: Mapping[str, tuple[float, float]]) -> str:
    """Return the stages of a second or more, each with its mean time and the share of the trials that reach it."""
    long = {stage: (mean, share) for stage, (mean, share) in stages.items() if mean >= 0.5}
    parts = [
        f"{stage} {mean:.0f} s" + ("" if share > 0.995 else f" ({share:.0%})") for stage, (mean, share) in long.items()
    ]
    return "a trial takes " + " + ".join(parts) if parts else "a trial takes no second"


def _left(seconds: float) -> str:
    return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"
