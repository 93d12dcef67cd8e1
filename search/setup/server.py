"""Checks the arguments of the engine's server, which a study file may name for its best trials or its workload."""

from __future__ import annotations

from evaluator import backends, batch
from evaluator.workload import Workload
from search.config.study_file import StudyFile
from search.errors import UsageError


def require_server(file: StudyFile, backend: str, least: int) -> None:
    """Check `confirm.server` before anything is measured.

    Args:
        file: The study file.
        backend: The engine's name.
        least: The tokens of the longest sequence that is measured.

    Raises:
        UsageError: The engine takes no such arguments.
    """
    server = file.confirm.server or {}
    refused = backends.refused_arguments(backend, server)
    if refused is not None:
        raise UsageError(f"confirm.server: {refused}")
    workload = file.evaluation.workload
    together = max(workload.batch_sizes) if workload.kind == "decode" else 1  # requests wait for their turn
    for name, lowest in (("max_model_len", least), ("max_num_seqs", together)):
        value = server.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
            raise UsageError(f"confirm.server: {name} is {value!r}; what is measured needs {lowest} or more")


def require_serving(file: StudyFile, backend: str, workload: Workload) -> None:
    """Check a workload of kind serve before anything is measured.

    Args:
        file: The study file.
        backend: The engine's name.
        workload: The workload.

    Raises:
        UsageError: The engine is not vLLM, it takes no such arguments, or the load can't be put on a server.
    """
    if backend != "vllm":
        raise UsageError(
            f"evaluation.workload.kind: serve times `vllm serve`, and the engine is {backend}; choose "
            "evaluation.backend=vllm where vLLM is installed, or evaluation.workload.kind=batch"
        )
    refused = backends.refused_arguments(backend, workload.server)
    if refused is not None:
        raise UsageError(f"evaluation.workload.server: {refused}")
    longest, most = batch.longest(workload), workload.server.get("max_model_len")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < longest):
        raise UsageError(
            f"evaluation.workload.server: max_model_len is {most!r}; a request takes {longest} tokens with its answer"
        )
    if workload.request_rate is None and workload.requests < max(workload.concurrencies):
        raise UsageError(
            f"evaluation.workload: {workload.requests} requests are never {max(workload.concurrencies)} at once; raise "
            "requests, or lower concurrencies"
        )
    if not workload.ignore_eos and file.text.prompts is None:
        raise UsageError(
            "evaluation.workload.ignore_eos: false lets answers end by themselves, which those to random ids don't; "
            "name a file of requests with text.prompts, or leave it true"
        )
