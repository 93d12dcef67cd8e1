"""What engines share when they generate: checks of what is asked, end-of-sequence ids, and answers as they grow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluator.errors import RequestRefused
from evaluator.generation import Answer, Limits
from readers import json_reader

REPLACEMENT = "\ufffd"  # what the bytes of a character that is not complete are decoded to

Decode = Callable[[Sequence[int]], str]  # token ids to text, special tokens left out


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt of token ids with the limits of its answer."""

    prompt: tuple[int, ...]
    limits: Limits

    @property
    def most_tokens(self) -> int:
        """The most tokens that prompt and answer hold together."""
        return len(self.prompt) + self.limits.max_tokens


def asked(
    prompts: Sequence[Sequence[int]], limits: Limits | Sequence[Limits], max_model_len: int | None
) -> list[Asked]:
    """Return each prompt with its limits.

    Args:
        prompts: The token ids of each prompt.
        limits: The limits of all answers, or of each.
        max_model_len: The most tokens of a prompt with its answer; None: any number.

    Raises:
        RequestRefused: A prompt is empty or too long, or limits make no sense.
    """
    each = [limits] * len(prompts) if isinstance(limits, Limits) else list(limits)
    if len(each) != len(prompts):
        raise RequestRefused(f"generate: {len(prompts)} prompts and {len(each)} limits; give one for all, or one each")
    found = [Asked(tuple(prompt), its) for prompt, its in zip(prompts, each, strict=True)]
    for number, one in enumerate(found, start=1):
        wrong = _wrong(one, max_model_len)
        if wrong is not None:
            raise RequestRefused(f"request {number} of {len(found)}: {wrong}")
    return found


def _wrong(one: Asked, max_model_len: int | None) -> str | None:
    limits = one.limits
    if not one.prompt:
        return "its prompt has no token; give it a text"
    if limits.max_tokens < 1:
        return f"max_tokens is {limits.max_tokens}; 1 is the least"
    if not (limits.temperature >= 0.0 and math.isfinite(limits.temperature)):
        return f"temperature is {limits.temperature:g}; it must be 0 (greedy) or more"
    if not all(limits.stop):
        return "a stop text is empty, and would end every answer at once; leave it out"
    if max_model_len is not None and one.most_tokens > max_model_len:
        return (
            f"its prompt of {len(one.prompt)} tokens with max_tokens {limits.max_tokens} takes {one.most_tokens} "
            f"tokens, and max_model_len is {max_model_len}; shorten the prompt, lower max_tokens or raise max_model_len"
        )
    return None


# -- what a checkpoint directory says ------------------------------------------------------------------------


def end_ids(path: Path) -> frozenset[int]:
    """Return the ids that end an answer: eos_token_id of generation_config.json and of config.json.

    Raises:
        ReadError: A file is no JSON.
        OSError: A file can't be read.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        file = path / name
        values = json_reader.read(file, finite=False) if file.is_file() else {}
        ids = values.get("eos_token_id") if isinstance(values, dict) else None
        found.update(each for each in (ids if isinstance(ids, list) else [ids]) if isinstance(each, int))
    return frozenset(found)


def decoder_of(path: Path) -> Decode | None:
    """Return what decodes token ids with a checkpoint's tokenizer; None where the directory holds no tokenizer."""
    if (path / "tokenizer.json").is_file():
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        return lambda ids: str(fast.decode(list(ids), skip_special_tokens=True))
    if not any((*path.glob("tokenizer*"), *path.glob("vocab.*"))):
        return None
    import transformers

    slow = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return lambda ids: str(slow.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


# -- an answer while it grows --------------------------------------------------------------------------------


class Growth:
    """An answer that takes one token at a time, until an end-of-sequence id, a stop text or max_tokens ends it.

    The tokens of a stop text stay among the answer's tokens, since they were generated; its text is cut off.

    Args:
        limits: The answer's limits.
        ends: The end-of-sequence ids.
        decode: What decodes token ids; None: the text stays empty.
        submitted_s: When the engine got the prompt, in seconds since the call began.

    Attributes:
        finish: Why the answer ended: "stop" or "length"; "" while it grows.

    Raises:
        RequestRefused: There are stop texts and nothing to decode with.
    """

    def __init__(self, limits: Limits, ends: frozenset[int], decode: Decode | None, submitted_s: float) -> None:
        if limits.stop and decode is None:
            raise RequestRefused(
                "stop texts need a tokenizer, and the model's directory holds none; copy tokenizer.json there"
            )
        self.limits = limits
        self.finish = ""
        self._ends = frozenset() if limits.ignore_eos else ends
        self._decode = decode
        self._tokens: list[int] = []
        self._seen = ""  # the decoded text so far, without what may be half a character
        self._begin = self._read = 0  # tokens from _begin to _read gave the last piece of it
        self._submitted_s = submitted_s
        self._first_s: float | None = None
        self._last_s = submitted_s

    def take(self, token: int, now_s: float) -> bool:
        """Take the next token, unless the answer has ended; return whether it has ended then.

        Args:
            token: The token's id.
            now_s: When it was there, in seconds since the call began.
        """
        if self.finish:
            return True
        self._first_s = now_s if self._first_s is None else self._first_s
        self._last_s = now_s
        if token in self._ends:
            self.finish = "stop"
            return True
        self._tokens.append(token)
        if self.limits.stop and self._reached_stop():
            self.finish = "stop"
        elif len(self._tokens) >= self.limits.max_tokens:
            self.finish = "length"
        return bool(self.finish)

    def _reached_stop(self) -> bool:
        """Decode what is new, and return whether a stop text is complete.

        Two decodings are compared that begin at the same token, since tokens are not always decoded alike alone and
        after others. A piece that ends with half a character waits for the rest.
        """
        assert self._decode is not None
        before = self._decode(self._tokens[self._begin : self._read])
        text = self._decode(self._tokens[self._begin :])
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return False
        self._begin, self._read = self._read, len(self._tokens)
        since = max(len(self._seen) - max(map(len, self.limits.stop)) + 1, 0)
        self._seen += text[len(before) :]
        return any(self._seen.find(stop, since) >= 0 for stop in self.limits.stop)

    def answer(self) -> Answer:
        """Return the answer as far as it has grown; one that was not ended counts as cut off at its length."""
        text = "" if self._decode is None else self._decode(self._tokens)
        found = [place for stop in self.limits.stop if (place := text.find(stop)) >= 0]
        return Answer(
            tokens=tuple(self._tokens),
            text=text[: min(found)] if found else text,
            finish="stop" if found else self.finish or "length",
            submitted_s=self._submitted_s,
            first_token_s=self._last_s if self._first_s is None else self._first_s,
            last_token_s=self._last_s,
        )


# -- over JSON -----------------------------------------------------------------------------------------------


def limits_of(values: Mapping[str, Any]) -> Limits:
    """Return the limits that `dataclasses.asdict` made, after JSON."""
    return Limits(**{**values, "stop": tuple(values["stop"])})


def answer_of(values: Mapping[str, Any]) -> Answer:
    """Return the answer that `dataclasses.asdict` made, after JSON."""
    return Answer(**{**values, "tokens": tuple(values["tokens"])})
