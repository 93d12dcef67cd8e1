"""Whole requests that are given at once, and the time of a token in them.

The prompts are random ids of drawn lengths, or the first ones of a file. The lengths of answers are drawn too: a model
that writes more or less than another is then timed on the same work. Or answers end by themselves, as a benchmark's do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from evaluator.answering import Asked
from evaluator.generation import Answer, Limits
from evaluator.workload import Workload


def with_requests(workload: Workload, vocabulary: int, prompts: Sequence[Sequence[int]] = ()) -> Workload:
    """Return a workload of kind batch, or serve, with its requests.

    Lengths of answers are drawn after those of prompts, so that prompts from a file get the same ones. Each is uniform
    between its two ends.

    Args:
        workload: The workload.
        vocabulary: The number of tokens of the vocabulary, for random ids.
        prompts: The token ids of the prompts; none: random ids are drawn.
    """
    random = np.random.default_rng(workload.seed)
    low, high = workload.input_tokens
    lengths = random.integers(low, high, workload.requests, endpoint=True).tolist()
    low, high = workload.output_tokens
    most = random.integers(low, high, workload.requests, endpoint=True).tolist()
    if not prompts:
        prompts = [random.integers(vocabulary, size=length).tolist() for length in lengths]
    asked = tuple(
        Asked(tuple(prompt), Limits(tokens if workload.ignore_eos else high, ignore_eos=workload.ignore_eos))
        for prompt, tokens in zip(prompts[: workload.requests], most, strict=True)
    )
    return dataclasses.replace(workload, asked=asked)


def of_fixed_lengths(workload: Workload) -> Workload:
    """Return the workload with answers of drawn lengths: what a model with random weights can be timed on."""
    prompts = [one.prompt for one in workload.asked]
    return with_requests(dataclasses.replace(workload, ignore_eos=True), 0, prompts)


def longest(workload: Workload) -> int:
    """Return the most tokens of a prompt with its answer, by the lengths that are drawn where no request is known."""
    if not workload.asked:
        return workload.input_tokens[1] + workload.output_tokens[1]
    return max(one.most_tokens for one in workload.asked)


def kv_tokens(workload: Workload) -> int:
    """Return the most tokens whose keys and values are needed at once: those of the longest that run together."""
    together = workload.sizes[0]
    return sum(sorted((one.most_tokens for one in workload.asked), reverse=True)[:together])


def seconds_per_token(answers: Sequence[Answer]) -> float:
    """Return the seconds from the first prompt to the last token over the generated tokens.

    An end-of-sequence id counts as a token: it takes a step as any other.
    """
    seconds = max(answer.last_token_s for answer in answers) - min(answer.submitted_s for answer in answers)
    return seconds / sum(len(answer.tokens) + (answer.finish == "stop") for answer in answers)
