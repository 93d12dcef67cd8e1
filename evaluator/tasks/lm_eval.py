"""A task of lm-evaluation-harness, as its YAML file describes it.

The harness (https://github.com/EleutherAI/lm-evaluation-harness) writes the prompts and judges the answers; our engine
computes the likelihoods, or writes the answers. Tasks have one of two output types. Of multiple_choice the accuracy is
acc_norm where the task has it, else acc. Of generate_until it is the first metric of the task's list, after the first
of its filters, and must be a number from 0 to 1 for each item; the prompts are plain text as the harness writes it.
Whether a text is the likeliest one (is_greedy) is not known. A task's YAML file may name Python functions, and the
harness runs them: use folders that you trust. Tasks whose metric runs code that a model wrote are refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from evaluator import backends, lengths, tasks
from evaluator.errors import BackendUnavailable, EvaluationError, TextError, install
from evaluator.generation import Answer
from evaluator.task_result import TaskResult
from evaluator.tasks import AskedEngine, Look, Progress, _continuations, _prompts, digest_of, result_of
from evaluator.tasks._continuations import Continuation

METRICS = ("acc_norm", "acc")  # of choices: the first that a task has
RUN_CODE = ("code_eval", "pass_at_k", "pass@1")  # metrics that run what a model wrote
SEED = 1234  # of the few-shot examples: the harness's own
WINDOW = 1024  # tokens of a rolling window where max_tokens is not given


class Section(tasks.Section):
    """Keys of this kind in a study file.

    Attributes:
        task: The task's name in the harness.
        include_path: The folder with the task's YAML file; None means one of the harness's own tasks, whose data is on
            the Hugging Face hub. Paths in the file's data_files are relative to the working directory.
    """

    task: str | None = None
    include_path: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.task:
            raise ValueError("lm_eval needs task: a task's name")
        return self


@dataclasses.dataclass(frozen=True)
class HarnessTask:
    """A task of the harness, its requests built; see `evaluator.tasks.Task`.

    Attributes:
        name: The name of the task.
        digest: The digest of its items.
        longest: The most tokens of a window, or of a prompt with its answer.
        metric: The metric that says how correct an item is.
        task: The harness's own object.
        tokenizer: A transformers tokenizer.
        max_tokens: The most tokens of a prompt with an answer, or None.
    """

    name: str
    digest: str
    longest: int
    metric: str
    task: Any
    tokenizer: Any
    max_tokens: int | None

    @property
    def writes(self) -> bool:
        """Whether a model writes answers to it."""
        return bool(self.task.OUTPUT_TYPE == "generate_until")

    def run(self, engine: AskedEngine, progress: Progress = None, look: Look = None) -> TaskResult:
        """Ask an engine all items; an item's accuracy is what the harness logs for the sample.

        The harness filters all answers together: `look` is never called.
        """
        model = language_model(engine, self.tokenizer, max_tokens=self.max_tokens, progress=progress, name=self.name)
        instances = list(self.task.instances)
        given = model.generate_until(instances) if self.writes else model.loglikelihood(instances)
        of_item: dict[int, list[Any]] = {}
        for instance, answer in zip(instances, given, strict=True):
            instance.resps = [answer] * instance.repeats
            instance.filtered_resps = {}
            of_item.setdefault(instance.doc_id, []).append(instance)
        self.task.apply_filters()
        correct = []
        for asked in of_item.values():
            asked.sort(key=lambda instance: instance.idx)
            answers = [next(iter(instance.filtered_resps.values())) for instance in asked]
            correct.append(self._score(self.task.process_results(asked[0].doc, answers).get(self.metric)))
        if not self.writes:
            return result_of(correct, self.digest)
        questions = [str(instance.args[0]) for instance in instances]
        expected = [str(self.task.doc_to_target(instance.doc)) for instance in instances]
        return result_of(correct, self.digest, lengths.answers_of(model.written, questions, expected))

    def _score(self, value: Any) -> float:
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not 0.0 <= score <= 1.0:
            raise EvaluationError(
                f"task {self.name}: its metric {self.metric} gives {value!r:.60} for an item, and no number from 0 "
                "to 1; put another metric first in its metric_list"
            )
        return score


def load(section: Section, tokenizer: Any, *, max_tokens: int | None = None) -> HarnessTask:
    """Return the task of a section, its data read and its prompts built.

    Args:
        section: The section of the study file.
        tokenizer: A transformers tokenizer.
        max_tokens: The most tokens of a prompt with an answer; a longer prompt loses its beginning.

    Raises:
        BackendUnavailable: The library is not installed.
        TextError: The task's files cannot be read.
        EvaluationError: The task needs more than likelihoods.
    """
    task = str(section.task)
    if not backends.installed("lm_eval"):
        raise _unavailable(task, "is not installed")
    found = _read(task, None if section.include_path is None else Path(section.include_path))
    kind = found.OUTPUT_TYPE
    if kind not in ("multiple_choice", "generate_until"):
        lacks = {
            "loglikelihood": "asks whether an answer is the likeliest text, and its likelihood alone doesn't say that",
        }.get(kind, "gives no accuracy")
        raise EvaluationError(
            f"task {task}: its output_type {kind} {lacks}; take one of multiple_choice or generate_until"
        )
    writes = kind == "generate_until"
    metric = _metric_of_answers(task, found) if writes else _metric_of_choices(task, found)
    gold = _build(task, found, section.limit)
    try:
        if writes:
            prompts = _prompts.encode(tokenizer, found.instances, max_tokens)
            digest = digest_of([metric, [[each.ids, dataclasses.asdict(each.limits)] for each in prompts], gold])
            longest = max(len(each.ids) + each.limits.max_tokens for each in prompts)
        else:
            asked = _encode(tokenizer, found.instances, max_tokens)
            digest = digest_of([metric, [[each.ids, each.start] for each in asked], gold])
            longest = max(len(each.ids) for each in asked)
    except TextError as error:
        raise TextError(f"task {task}: {error}") from None
    return HarnessTask(
        name=section.name or task,
        digest=digest,
        longest=longest,
        metric=metric,
        task=found,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
    )


def _metric_of_choices(name: str, task: Any) -> str:
    metric = next((metric for metric in METRICS if metric in task.aggregation()), None)
    if metric is None:
        raise EvaluationError(
            f"task {name}: its metrics {', '.join(task.aggregation())} hold neither acc_norm nor acc; add one to its "
            "metric_list"
        )
    return metric


def _metric_of_answers(name: str, task: Any) -> str:
    """Return the first metric of a task that has a model write; one that would run what it writes is refused."""
    metrics = list(task.aggregation())
    if getattr(task, "UNSAFE_CODE", False) or any(metric in RUN_CODE for metric in metrics):
        raise EvaluationError(
            f"task {name}: its metric runs code that a model wrote, which this program never does; take another task"
        )
    if not metrics:
        raise EvaluationError(f"task {name}: has no metric; add one to its metric_list, such as exact_match")
    return str(metrics[0])


def language_model(
    engine: AskedEngine,
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    progress: Progress = None,
    name: str = "lm_eval",
) -> Any:
    """Return an engine as an `lm_eval.api.model.LM`, for whatever the harness does with one; is_greedy is always False.

    Args:
        engine: The engine that computes likelihoods and writes answers.
        tokenizer: A transformers tokenizer.
        max_tokens: The most tokens of a window.
        progress: A function that is told what is being done.
        name: The task's name, for progress and messages.
    """
    api: Any = importlib.import_module("lm_eval.api.model")

    class EngineModel(api.LM):  # type: ignore[misc]  # types are checked without the library
        written: list[Answer]  # what the last generate_until got

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            asked = _encode(tokenizer, requests, max_tokens)
            found = _continuations.log_likelihoods(engine, asked, progress, name)
            return [(math.fsum(values), False) for values in found]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Count each token once, from windows that share none; a window starts without what stood before it."""
            totals = []
            for request in requests:
                asked = _continuations.rolling(tokenizer, request.args[0], max_tokens or WINDOW)
                found = _continuations.log_likelihoods(engine, asked, progress, name)
                totals.append(math.fsum(value for values in found for value in values))
            return totals

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = _prompts.encode(tokenizer, requests, max_tokens)
            self.written = _prompts.answers(engine, asked, progress, name)
            return [answer.text for answer in self.written]

    return EngineModel()


def _read(name: str, include_path: Path | None) -> Any:
    """Return the harness's task object. Raises TextError and EvaluationError."""
    if include_path is not None and not Path(include_path).is_dir():
        raise TextError(f"task {name}: {include_path} is no folder; name the one that holds the task's YAML file")
    try:
        tasks: Any = importlib.import_module("lm_eval.tasks")
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise _unavailable(name, f"can't be imported ({_first(error)})") from None
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task's file leaves to it
    try:
        manager = tasks.TaskManager(
            include_path=None if include_path is None else str(include_path), include_defaults=include_path is None
        )
    except Exception as error:  # its readers raise many kinds: these are files from outside
        raise TextError(f"task {name}: {include_path}: can't be read ({_first(error)}); check its YAML files") from None
    if name not in manager.all_tasks:
        where = include_path or "lm-evaluation-harness"
        there = ", ".join(manager.all_tasks[:8]) if include_path else "some thousand others"
        raise TextError(
            f"task {name}: {where} holds {there or 'no task'} and not that one; its name is what follows `task:` in a "
            "YAML file"
        )
    try:
        found = list(manager.load([name])["tasks"].values())
    except Exception as error:
        raise TextError(
            f"task {name}: can't be read ({_first(error)}); check its YAML file and its data_files, which are relative "
            "to the working directory; tasks whose data is on the hub need it"
        ) from None
    if len(found) != 1:
        raise EvaluationError(
            f"task {name}: is a group of {len(found)} tasks; name each by itself: "
            f"{', '.join(each.config.task for each in found[:8])}"
        )
    return found[0]


def _build(name: str, task: Any, limit: int | None) -> list[str]:
    """Build the requests once, few-shot examples included, so that every model is asked the same.

    Returns:
        Each request's target.
    """
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            task.build_all_requests(limit=limit)
        return [str(task.doc_to_target(instance.doc)) for instance in task.instances]
    except Exception as error:
        raise TextError(
            f"task {name}: its prompts can't be built ({_first(error)}); check doc_to_text, doc_to_choice and "
            "doc_to_target in its YAML file"
        ) from None


def _encode(tokenizer: Any, requests: Sequence[Any], max_tokens: int | None) -> list[Continuation]:
    """Encode requests whose arguments are (context, continuation, …)."""
    return [
        _continuations.encode(tokenizer, request.args[0], request.args[1], max_tokens=max_tokens)
        for request in requests
    ]


def _unavailable(name: str, why: str) -> BackendUnavailable:
    return BackendUnavailable(f"task {name}: lm-evaluation-harness {why}; {install('lm-eval')}")


def _first(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
