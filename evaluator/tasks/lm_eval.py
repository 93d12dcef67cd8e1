"""A task of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), as its YAML file describes it.

The harness makes the prompts and judges the answers; what is likely is asked of our engine. Its accuracy is acc_norm
where the task has it, else acc. Only likelihoods are there, so only tasks of output_type multiple_choice are: nothing
is generated, and whether a text is the likeliest one (is_greedy) is not known.
A task's YAML file may name Python functions, and the harness runs them: name folders that you trust.
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
from typing import Any

from evaluator import backends
from evaluator.errors import BackendUnavailable, EvaluationError, TextError
from evaluator.measurement import TaskResult
from evaluator.tasks import NllEngine, Progress, _continuations, digest_of, result_of
from evaluator.tasks._continuations import Continuation

METRICS = ("acc_norm", "acc")  # the first that a task has
SEED = 1234  # of the few-shot examples: the harness's own
WINDOW = 1024  # tokens of a rolling window where max_tokens is not given


@dataclasses.dataclass(frozen=True)
class HarnessTask:
    """task: the harness's own object, its requests built."""

    name: str
    digest: str
    longest: int
    metric: str
    task: Any
    tokenizer: Any
    max_tokens: int | None

    def run(self, engine: NllEngine, progress: Progress = None) -> TaskResult:
        """Each item's metric is what the harness logs as a sample's."""
        model = language_model(engine, self.tokenizer, max_tokens=self.max_tokens, progress=progress, name=self.name)
        instances = list(self.task.instances)
        of_item: dict[int, list[Any]] = {}
        for instance, answer in zip(instances, model.loglikelihood(instances), strict=True):
            instance.resps = [answer] * instance.repeats
            instance.filtered_resps = {}
            of_item.setdefault(instance.doc_id, []).append(instance)
        self.task.apply_filters()
        correct = []
        for asked in of_item.values():
            asked.sort(key=lambda instance: instance.idx)
            answers = [next(iter(instance.filtered_resps.values())) for instance in asked]
            correct.append(float(self.task.process_results(asked[0].doc, answers)[self.metric]))
        return result_of(correct, self.digest)


def load(
    task: str,
    include_path: Path | None,
    tokenizer: Any,
    *,
    limit: int | None = None,
    max_tokens: int | None = None,
) -> HarnessTask:
    """The task of that name, its data read and its prompts built.

    include_path: the folder with the task's YAML file; None: one of the harness's own tasks, whose data is on the hub.
    Paths in its data_files are relative to the working directory. limit: only the first so many items. max_tokens: of a
    prompt with an answer; a longer prompt loses its beginning.

    Raises BackendUnavailable without the library, TextError for what can't be read, EvaluationError for a task that
    needs more than likelihoods.
    """
    if not backends.installed("lm_eval"):
        raise _unavailable(task, "is not installed")
    if limit is not None and limit < 1:
        raise TextError(f"task {task}: a limit of {limit} items leaves none; take 1 or more, or none for all")
    found = _read(task, include_path)
    kind = found.OUTPUT_TYPE
    if kind != "multiple_choice":
        lacks = {
            "generate_until": "generates text, and an engine is asked for likelihoods alone",
            "loglikelihood": "asks whether an answer is the likeliest text, and its likelihood alone doesn't say that",
        }.get(kind, "gives no accuracy")
        raise EvaluationError(f"task {task}: its output_type {kind} {lacks}; take one of multiple_choice")
    metric = next((metric for metric in METRICS if metric in found.aggregation()), None)
    if metric is None:
        raise EvaluationError(
            f"task {task}: its metrics {', '.join(found.aggregation())} hold neither acc_norm nor acc; add one to its "
            "metric_list"
        )
    gold = _build(task, found, limit)
    try:
        asked = _encode(tokenizer, found.instances, max_tokens)
    except TextError as error:
        raise TextError(f"task {task}: {error}") from None
    return HarnessTask(
        name=task,
        digest=digest_of([metric, [[each.ids, each.start] for each in asked], gold]),
        longest=max(len(each.ids) for each in asked),
        metric=metric,
        task=found,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
    )


def language_model(
    engine: NllEngine,
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    progress: Progress = None,
    name: str = "lm_eval",
) -> Any:
    """An engine as an `lm_eval.api.model.LM`, for whatever the harness does with one. is_greedy is always False."""
    api: Any = importlib.import_module("lm_eval.api.model")

    class EngineModel(api.LM):  # type: ignore[misc]  # the library is not there when types are checked
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            asked = _encode(tokenizer, requests, max_tokens)
            found = _continuations.log_likelihoods(engine, asked, progress, name)
            return [(math.fsum(values), False) for values in found]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """Each token once, from windows that share none: at a window's first, what stood before is unknown."""
            totals = []
            for request in requests:
                asked = _continuations.rolling(tokenizer, request.args[0], max_tokens or WINDOW)
                found = _continuations.log_likelihoods(engine, asked, progress, name)
                totals.append(math.fsum(value for values in found for value in values))
            return totals

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            raise EvaluationError(f"task {name}: generates text, and an engine is asked for likelihoods alone")

    return EngineModel()


def _read(name: str, include_path: Path | None) -> Any:
    """The harness's task object. Raises TextError, EvaluationError."""
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
    except Exception as error:  # whatever its readers raise: these are files from outside
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
    """Build the requests, once: every model is asked the same, few-shot examples included. Each request's target."""
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
    """Of requests whose arguments are (context, continuation, …)."""
    return [
        _continuations.encode(tokenizer, request.args[0], request.args[1], max_tokens=max_tokens)
        for request in requests
    ]


def _unavailable(name: str, why: str) -> BackendUnavailable:
    return BackendUnavailable(f"task {name}: lm-evaluation-harness {why}; run `pip install 'optuna-search[lm-eval]'`")


def _first(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
