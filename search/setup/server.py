"""Checks the arguments of the engine's server, which a study file may name for the confirmation of its best trials."""

from __future__ import annotations

from evaluator import backends
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
