"""Keeps a tokenizer from elsewhere from running for hours or filling the memory.

Its tokenizer.json may hold any pattern and any replacement. They run in Rust code that lets no other thread of the
process act. So each text is first encoded in a child process with limits; only then it is encoded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.errors import CheckpointError
from readers import regular
from readers.errors import ReadError
from search.setup.guarded_chat import ChatTemplate
from search.setup.limited_child import Ended, LimitedChild, TookTooLong

MOST_BYTES = 256_000_000  # of a tokenizer.json
LOAD_S = 60.0
ENCODE_S = 20.0  # for any text
ENCODE_S_PER_MB = 20.0
CHILD = Path(__file__).with_name("tokenizer_child.py")
PROBE = "\n".join(  # runs that patterns with nested repeats try in all ways
    [
        "The quick brown fox, 2026.",
        "a" * 80 + "!",
        "1" * 80 + "a",
        " " * 80 + ".",
        "ab " * 30 + "\t!",
        "한국어 é",
        "_" * 80,
    ]
)

# What is quick and makes a text at most a few times longer, whatever its settings are.
QUICK = frozenset(
    {
        *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Nmt"),
        *("ByteLevel", "Whitespace", "WhitespaceSplit", "Metaspace", "Digits", "Punctuation", "BertPreTokenizer"),
        *("CharDelimiterSplit", "UnicodeScripts", "BertProcessing", "RobertaProcessing", "Sequence"),
    }
)
# Patterns of GPT-2, Llama 3 and Qwen 2: no two of their repeats compete for the same characters.
PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    }
)
MOST_PARTS = 12  # of one pipeline
MOST_ADDED = 100_000


class GuardedTokenizer:
    """GuardedTokenizer is a tokenizer whose `encode` tries each text in a child process first.

    Its chat template runs in a child process too. Everything else is the tokenizer's own.

    Args:
        tokenizer: A transformers tokenizer.
        trial: What tries a text; None where all steps of the tokenizer are known to be quick.
        template: The chat template; None where there is none.
    """

    def __init__(self, tokenizer: Any, trial: Trial | None, template: ChatTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self._trial = trial
        self._template = template

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the token ids of a text.

        Raises:
            CheckpointError: The tokenizer takes too long for it, or too much memory.
        """
        if self._trial is not None:
            self._trial.encode(text)
        return list(self._tokenizer.encode(text, **options))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool = True, **arguments: Any
    ) -> str | list[int]:
        """Return the text of a chat, or its token ids.

        Args:
            messages: The messages of one chat, each with role and content.
            tokenize: Whether to return token ids.
            arguments: The template's other variables, such as add_generation_prompt and enable_thinking.

        Raises:
            CheckpointError: The template or the tokenizer takes too long or too much memory.
            ValueError: There is no template, or it refuses the chat.
        """
        if self._template is None:
            raise ValueError("the tokenizer has no chat template")
        text = self._template.render(messages, arguments)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Trial:
    """Trial is a child process that encodes texts with a tokenizer.json, within limits of time and memory."""

    def __init__(self, model: Path, file: Path, doubt: str) -> None:
        """Start the process, load the tokenizer and encode a short text.

        Args:
            model: The model's directory, for messages.
            file: The tokenizer.json.
            doubt: What may run for long in it, for messages.

        Raises:
            CheckpointError: The tokenizer can't be loaded, or takes too long or too much memory for a short text.
        """
        self._model, self._doubt = model, doubt
        self._child = LimitedChild(CHILD, str(file))
        self._await(LOAD_S, "to be loaded")
        self.encode(PROBE)

    def encode(self, text: str) -> None:
        """Encode a text in the child process.

        Raises:
            CheckpointError: It took too long or too much memory, or failed.
        """
        data = text.encode("utf-8", "replace")
        self._child.send(data)
        self._await(ENCODE_S + ENCODE_S_PER_MB * len(data) / 1e6, f"for {len(text):,} characters")

    def _await(self, limit_s: float, what: str) -> None:
        try:
            line = self._child.line(limit_s)
        except TookTooLong:
            raise self._refused(f"took more than {limit_s:.0f} s {what}") from None
        except Ended as ended:
            raise self._refused(f"needs too much memory or is damaged ({ended} {what})") from None
        if line != b"ok\n":
            raise self._refused(f"can't be read ({line.decode().strip()})" if "load" in what else f"failed {what}")

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"model {self._model}: its tokenizer {why}; in its tokenizer.json {self._doubt}: copy the original model's "
            "there"
        )


def doubt_of(model: Path, file: Path) -> str | None:
    """Return what in a tokenizer.json may run for long or fill the memory; None where all of it is known to be quick.

    Raises:
        CheckpointError: It can't be read.
    """
    try:
        values = json.loads(regular.read_text(file, MOST_BYTES))
    except (OSError, ReadError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:160]
        raise CheckpointError(f"model {model}: its tokenizer can't be read ({reason}); copy its files again") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise CheckpointError(f"model {model}: its tokenizer can't be read (it has no model); copy its files again")
    try:
        parts = [part for key in ("normalizer", "pre_tokenizer", "post_processor") for part in _parts(values.get(key))]
    except RecursionError:
        return "its steps are nested"
    if len(parts) > MOST_PARTS:
        return f"it has {len(parts)} steps"
    for part in parts:
        if not _is_quick(part):
            return f"the step {ascii(part.get('type'))[1:-1][:40]} is not known to be quick"
    if values["model"].get("max_input_chars_per_word", 0) not in range(1001):
        return "max_input_chars_per_word is large"
    if values.get("padding") is not None:
        return "texts are padded"
    if len(values.get("added_tokens") or ()) > MOST_ADDED:
        return "it has very many added tokens"
    return None


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(part, dict):
        yield part
        for key in ("normalizers", "pretokenizers", "processors"):
            inner = part.get(key)
            for one in inner if isinstance(inner, list) else ():
                yield from _parts(one)


def _is_quick(part: Mapping[str, Any]) -> bool:
    kind, pattern = part.get("type"), part.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if kind in ("Replace", "Prepend"):  # a text of three such steps is at most 64 times longer
        content = part.get("content", part.get("prepend"))
        return isinstance(content, str) and len(content) <= 4 and (kind == "Prepend" or bool(text))
    if kind == "Split":
        return bool(text) or (isinstance(pattern, dict) and pattern.get("Regex") in PATTERNS)
    if kind == "TemplateProcessing":
        return all(len(part.get(key) or ()) <= MOST_PARTS for key in ("single", "pair", "special_tokens"))
    return kind in QUICK
