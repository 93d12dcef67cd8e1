"""Writes what a report says of generated answers: accuracy, lengths, and answers side by side.

What models and files wrote is text of others: it is escaped, so that no viewer of the Markdown takes it for HTML, for
Markdown or for a new cell.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from evaluator import lengths, paired
from evaluator.task_result import TaskResult
from search.by_hand.evaluation import Evaluation

SHOWN = 10  # answers of each task
MOST = 600  # characters of a question or an answer in a cell
MARKDOWN = re.compile(r"([\\`*_\[\]|~$!])")  # what may begin a construct of Markdown inside a cell


def parts(evaluation: Evaluation) -> list[str]:
    """Return the sections of the report in Markdown; none where no task let the models generate."""
    both = [
        (name, result, evaluation.baseline.tasks[name])
        for name, result in lengths.answered(evaluation.measurement).items()
        if name in evaluation.baseline.tasks and evaluation.baseline.tasks[name].answers is not None
    ]
    if not both:
        return []
    warning = evaluation.length_warning
    return [
        "## Generated answers",
        _accuracy(both),
        *([] if warning is None else [f"**{escaped(warning)}.**"]),
        _lengths(both),
        *(section for name, own, base in both for section in _side_by_side(name, own, base)),
    ]


def _accuracy(both: Sequence[tuple[str, TaskResult, TaskResult]]) -> str:
    rows = []
    for name, own, base in both:
        compared = paired.compare(own.correct, base.correct)
        rows.append(
            [
                escaped(name),
                str(own.items),
                f"{base.value:.3f} ± {base.se:.3f}",
                f"{own.value:.3f} ± {own.se:.3f}",
                f"{compared.difference:+.3f} ± {compared.se:.3f}",
                f"{compared.better} / {compared.worse}",
                f"{compared.p:.2g}",
            ]
        )
    header = ["task", "questions", "baseline", "model", "difference", "better / worse", "p"]
    return (
        f"{_table(header, rows)}\n\n"
        "The error of the difference is paired: both models answered the same questions. p is that of the exact "
        "McNemar test, or of Wilcoxon's signed-rank test where answers score between 0 and 1."
    )


def _lengths(both: Sequence[tuple[str, TaskResult, TaskResult]]) -> str:
    rows = []
    for name, own, base in both:
        for who, result in (("baseline", base), ("model", own)):
            answers = result.answers
            if answers is None:
                continue
            of, ratio = lengths.of(answers.tokens), ""
            if result is own and base.answers is not None:
                found, se = lengths.ratio(answers.tokens, base.answers.tokens)
                ratio = f"{found:.3f} ± {se:.3f}"
            shares = [f"{share:.1%}" for share in (answers.cut, answers.empty, answers.repeating)]
            numbers = [f"{each:.1f}" for each in (of.mean, of.p50, of.p90, of.p99)]
            rows.append([escaped(name), who, *numbers, ratio, *shares])
    header = ["task", "", "mean", "p50", "p90", "p99", "model / baseline", "cut off", "empty", "repeating"]
    return (
        f"Generated tokens per answer:\n\n{_table(header, rows)}\n\n"
        "An answer is cut off at `max_tokens`. It counts as repeating where it was cut off in a cycle of at most "
        f"{lengths.PERIOD} tokens that follows itself {lengths.REPEATS} times, over {lengths.LEAST} tokens or more."
    )


def _side_by_side(name: str, own: TaskResult, base: TaskResult) -> list[str]:
    if own.answers is None or base.answers is None or not own.answers.shown:
        return []
    shown = list(zip(own.answers.shown, base.answers.shown, base.correct, own.correct, strict=False))[:SHOWN]
    rows = [
        [
            escaped(mine.question),
            escaped(mine.expected),
            f"{escaped(its.text)} ({right_base:.3g})",
            f"{escaped(mine.text)} ({right:.3g})",
        ]
        for mine, its, right_base, right in shown
    ]
    what = f"### {escaped(name)}: the first {len(shown)} answers"
    return [what, _table(["question", "expected", "baseline (score)", "model (score)"], rows)]


def escaped(text: str) -> str:
    """Return a text in one line that Markdown shows as it is: no HTML, no link, no new cell; long ones are cut."""
    cut = text if len(text) <= MOST else f"{text[: MOST // 2]} […] {text[-MOST // 2 :]}"
    printable = "".join(each if each.isprintable() or each.isspace() else "\N{REPLACEMENT CHARACTER}" for each in cut)
    return "<br>".join(MARKDOWN.sub(r"\\\1", html.escape(line, quote=False)) for line in printable.splitlines())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
