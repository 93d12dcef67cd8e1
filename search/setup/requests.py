"""The requests of a workload of kind batch or serve: prompts from a file, checked against what the model can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluator import batch, prompts
from evaluator.workload import Workload
from search.config.study_file import StudyFile
from search.errors import UsageError

Prompts = tuple[tuple[int, ...], ...]  # token ids


def read_prompts(file: StudyFile, tokenizer: Any) -> Prompts:
    """Return the token ids of the prompts of `text.prompts`, as many as are asked for; none where random ids are timed.

    Args:
        file: The study file.
        tokenizer: The tokenizer of the base model.

    Raises:
        TextError: The file can't be read, or holds a chat and there is no chat template.
        UsageError: It holds too few requests.
    """
    wanted, named = file.evaluation.workload.requests, file.text.prompts
    if named is None or file.evaluation.workload.kind == "decode":
        return ()
    found = prompts.read(Path(named), wanted)
    if len(found) < wanted:
        raise UsageError(
            f"text.prompts: {named} holds {len(found)} requests, and evaluation.workload.requests is {wanted}; lower "
            "it, or add requests"
        )
    return tuple(tuple(one.ids(tokenizer, file.text.chat_template_kwargs)) for one in found)


def require_room(workload: Workload, positions: int | None) -> None:
    """Check that the model can read the longest request with its answer.

    Args:
        workload: A workload of kind batch or serve.
        positions: The base model's max_position_embeddings; None where its config names none.

    Raises:
        UsageError: It is too long.
    """
    longest = batch.longest(workload)
    if positions is not None and longest > positions:
        raise UsageError(
            f"evaluation.workload: a request takes {longest} tokens with its answer, and the model reads "
            f"{positions}; lower input_tokens or output_tokens, or take longer prompts out of text.prompts"
        )
