"""Workload says what is timed, of each engine in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from evaluator.answering import Asked

KEYS = {  # of a workload, by its kind
    "decode": ("batch_sizes", "prompt_tokens", "decode_steps", "turns", "seed"),
    "batch": (
        *("kind", "requests", "input_tokens", "output_tokens", "ignore_eos", "max_num_seqs"),
        *("turns", "seed"),
    ),
    "serve": (
        *("kind", "concurrencies", "request_rate", "requests", "input_tokens", "output_tokens", "ignore_eos"),
        *("goodput", "server", "turns", "seed"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed, of each engine in turn.

    Of kind decode, single decode steps are timed, after a prompt of random ids. Of kind batch, whole requests are
    timed, which are given at once: the time per token is the time until the last answer is complete, prefill included,
    over the number of generated tokens; see `evaluator.batch`. Of kind serve, the same is timed of requests to a
    server, by `vllm bench serve`; see `evaluator.served`.

    Attributes:
        batch_sizes: decode: the numbers of sequences decoded together; the time per token is the mean over them.
        prompt_tokens: decode: the length of each sequence's prompt; its prefill is not timed.
        decode_steps: decode: the number of single decode steps in a turn.
        turns: The number of turns of each engine.
        seed: The random seed of the prompts, and of lengths that are drawn.
        kind: "decode", "batch" or "serve".
        requests: batch, serve: the number of requests.
        input_tokens: batch, serve: the least and the most tokens of a prompt of random ids.
        output_tokens: batch, serve: the least and the most tokens of an answer whose length is drawn.
        ignore_eos: batch, serve: whether answers have the lengths that are drawn; else they end by themselves, after
            the most tokens at the latest.
        max_num_seqs: batch: the most requests that run at once.
        concurrencies: serve: the numbers of requests that run at once; the time per token is the mean over them.
        request_rate: serve: the requests that come in a second, in place of the concurrencies; None: they decide.
        goodput: serve: the most milliseconds of a request that counts as good, by name; see `evaluator.served.LIMITS`.
        server: serve: arguments of `vllm serve`.
        asked: batch, and serve where prompts come from a file: the requests themselves, which are not kept.
        texts: serve: the same prompts as texts, which are not kept either.

    Raises:
        ValueError: A number is too small, or a kind is unknown.
    """

    batch_sizes: tuple[int, ...] = (1,)
    prompt_tokens: int = 64
    decode_steps: int = 16
    turns: int = 12
    seed: int = 0
    kind: str = "decode"
    requests: int = 64
    input_tokens: tuple[int, int] = (64, 256)
    output_tokens: tuple[int, int] = (64, 128)
    ignore_eos: bool = True
    max_num_seqs: int = 256
    concurrencies: tuple[int, ...] = (1, 8, 64)
    request_rate: float | None = None
    goodput: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)
    server: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    asked: tuple[Asked, ...] = dataclasses.field(default=(), compare=False, repr=False)
    texts: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "input_tokens", "output_tokens", "concurrencies"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind not in KEYS:
            raise ValueError(f"workload: kind is {self.kind!r}; there are {', '.join(KEYS)}")
        for name in ("batch_sizes", "concurrencies"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) < 1:
                raise ValueError(f"workload: {name} are positive integers, not {sizes}")
        if self.request_rate is not None and self.request_rate <= 0:
            raise ValueError(f"workload: request_rate is {self.request_rate:g}; it has to be more than 0")
        for name, least in (
            *(("prompt_tokens", 1), ("decode_steps", 1), ("turns", 2)),
            *(("requests", 1), ("max_num_seqs", 1)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"workload: {name} is {getattr(self, name)}; {least} is the least")
        for name in ("input_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"workload: {name} is {low} to {high}; it has to begin at 1 or more and not to fall")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of sequences that run at once, each of which is timed by itself."""
        if self.kind == "serve":
            return self.concurrencies if self.request_rate is None else (1,)
        return self.batch_sizes if self.kind == "decode" else (min(self.requests, self.max_num_seqs),)

    def to_dict(self) -> dict[str, Any]:
        """Return what a time of this kind depends on, as JSON values; decode, the older kind, is not named."""
        values = {name: getattr(self, name) for name in KEYS[self.kind]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Workload:
        """Return the workload that `to_dict` wrote, without its requests.

        Raises:
            TypeError: A name is unknown.
        """
        return cls(**values)
