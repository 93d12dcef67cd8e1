"""Text that the base model writes itself: calibration text that covers what it knows, in the languages it knows.

A repair holds on the kinds of text that it was fitted to. What a model writes when nothing is asked of it is drawn from
what it was trained on, as in LLM-QAT (https://arxiv.org/abs/2305.17888) and self-calibration
(https://arxiv.org/abs/2410.17170). It is sampled at TEMPERATURE, in documents of up to LENGTH tokens, of the
kinds that `kinds` names, and kept in a file: a study's text is written once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from compressors import cached
from compressors.files import digest_of_json
from compressors.model.checkpoint import Checkpoint
from compressors.model.loading import require_finite
from compressors.typed_json import typed
from evaluator import chat, texts
from evaluator.backends import EngineSettings
from evaluator.errors import EvaluationError, NotFinite, TextError
from evaluator.generation import Limits
from evaluator.process import EngineProcess
from evaluator.texts import Document
from search.say import Say, silent
from search.setup.texts import Domains

VERSION = 2  # increase it when other text would be written
TEMPERATURE = 1.0
LENGTH = 256  # the most tokens of a document
AT_ONCE, ON_GPU = 64, (16, 64, 128)  # documents that are written together; on a GPU, sizes of CUDA graphs
CALL_TIMEOUT_S = 3600.0  # for those, which take minutes on a CPU
YIELD = 0.8  # share of LENGTH that a document is expected to hold, as long as none of its kind was written
MOST_DROPPED = 4  # as many times the wanted tokens are written before it is given up
UNSEEN = 2  # windows of each kind that nothing is fitted to
LEAST_TOKENS = 32  # a document with fewer tokens is dropped
LEAST_DISTINCT = 0.5  # so is one with a smaller share of distinct runs of RUN tokens
RUN = 4
STARTS = (  # the beginnings of texts
    'The|In|I|It was|We|She said|When|Once upon a time|According to|How to|Yesterday,|"|Q:|1.|- |# |Dear|Abstract|'
    "def |import |#include|function |public class |<|Le |La |Der |Die |El |Los |O |Il |이 |그 |これ|这|В |Het |Det |ال"
)
ASKED = (  # the requests of chats
    "Tell me a story.|Explain something that you know well.|Write a letter to a friend.|Write a news report.|"
    "Write a program and explain it.|What do you think about the weather?|Write an essay about history.|"
    "Write a dialogue between two people.|Describe a place.|How do I learn something new?|Give me a recipe.|"
    "Erzähl mir eine Geschichte.|Erkläre mir etwas, das du gut kennst.|Raconte-moi une histoire.|"
    "Explique-moi quelque chose que tu connais bien.|Cuéntame una historia.|Explícame algo que conozcas bien.|"
    "이야기를 하나 들려줘.|잘 아는 것을 하나 설명해 줘.|讲一个故事。|解释一件你熟悉的事。|お話を聞かせてください。|"
    "Conte-me uma história.|Расскажи мне историю.|Raccontami una storia."
)

Prompts = Iterator[list[int]]


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writer has the base model write text, of each kind as much as is asked for.

    Attributes:
        path: The base model's directory.
        digest: The digest of its weights and config.
        tokenizer: Its tokenizer.
        directory: The directory that keeps the text.
        backends: The engines that may write, the fastest first: the next one writes where one fails.
        settings: How an engine is run.
        say: Told what is done.
    """

    path: Path
    digest: str
    tokenizer: Any
    directory: Path
    backends: Sequence[str]
    settings: EngineSettings
    say: Say = silent

    def domains(self, tokens: int, part: int = 0) -> dict[str, list[Document]]:
        """Return documents with at least `tokens` tokens of each kind, by kind; they are written where none are kept.

        Args:
            tokens: How many tokens.
            part: Another part is another text.

        Raises:
            TextError: The model writes too little that is no repetition.
            EvaluationError: The last engine failed too.
            CheckpointError: A weight is NaN or infinite.
        """
        path = self.directory / f"own-{digest_of_json([VERSION, self.digest, tokens, part], 24)}.json"

        def write(path: Path) -> None:
            cached.keep_json(path, self._written(tokens, part))

        texts = cached.kept(
            path, _read, write, lambda: self.say("waiting for another process that has the model write")
        )
        return {
            kind: [Document(f"{kind}:{part}:{number}", text) for number, text in enumerate(of_kind)]
            for kind, of_kind in texts.items()
        }

    def _written(self, tokens: int, part: int) -> dict[str, list[str]]:
        for backend in self.backends[:-1]:
            try:
                return self._written_by(backend, tokens, part)
            except (NotFinite, TextError):  # so it would be by any engine
                raise
            except EvaluationError as error:
                self.say(f"own text: {error}; another engine writes it")
        return self._written_by(self.backends[-1], tokens, part)

    def _written_by(self, backend: str, tokens: int, part: int) -> dict[str, list[str]]:
        self.say(f"own text: starting the engine ({backend})")
        on_gpu = self.settings.device == "cuda"
        together = {"batch_sizes": ON_GPU} if on_gpu else {"max_num_seqs": AT_ONCE}
        settings = dataclasses.replace(
            self.settings, max_model_len=2 * LENGTH, call_timeout_s=CALL_TIMEOUT_S, seed=part, **together
        )
        try:
            with EngineProcess(backend, self.path, settings, log=self.directory / "own-text.log") as engine:
                return self._of_kinds(engine, tokens, part, max(ON_GPU) if on_gpu else AT_ONCE)
        except (NotFinite, TextError):  # as a model with a broken weight writes
            require_finite(Checkpoint.read(self.path), "the base model's")
            raise

    def _of_kinds(self, engine: EngineProcess, tokens: int, part: int, most: int) -> dict[str, list[str]]:
        """Return texts that are neither empty nor repetition, by kind, each kind with at least `tokens` tokens.

        As many are asked for at a time as are written together: a step of vLLM that reads a prompt too takes five times
        as long, and documents that wait for a place would begin in nearly every step.
        """
        every = {kind: _Kind(make()) for kind, make in kinds(self.tokenizer, part).items()}
        limits = Limits(LENGTH, temperature=TEMPERATURE, seed=None)
        while lacking := {kind: its for kind, its in every.items() if its.kept < tokens}:
            for kind, its in lacking.items():
                if its.written > MOST_DROPPED * tokens + AT_ONCE * LENGTH:
                    raise TextError(
                        f"text.calibration: self: of {its.written} tokens that the model wrote ({kind}), {its.kept} "
                        f"are no repetition, and {tokens} are needed; name texts of its languages instead"
                    )
            have = sum(min(its.kept, tokens) for its in every.values())
            self.say(f"own text: {have} of {len(every) * tokens} tokens")
            begun = [(kind, next(its.prompts)) for kind, its in lacking.items() for _ in range(its.lacks(tokens, most))]
            begun = begun[:most]
            answers = engine.generate([prompt for _, prompt in begun], limits)
            for (kind, prompt), answer in zip(begun, answers, strict=True):
                its = every[kind]
                its.asked += 1
                its.written += max(1, len(answer.tokens))
                if is_text(answer.tokens):
                    its.texts.append(self._text(kind, prompt, answer.text))
                    # counted anew, since the sampled tokens of a text may be more
                    its.kept += len(self.tokenizer.encode(its.texts[-1], add_special_tokens=False))
        return {kind: its.texts for kind, its in every.items()}

    def _text(self, kind: str, prompt: Sequence[int], answer: str) -> str:
        """Return a document: what the model wrote, with what it continued."""
        begun = "" if kind == "chat" else self.tokenizer.decode(list(prompt), skip_special_tokens=True)
        return f"{begun}{answer}"


@dataclasses.dataclass
class _Kind:
    """_Kind is what was written of a kind so far.

    Attributes:
        prompts: The prompts to come.
        texts: The texts that are kept.
        kept: Their tokens.
        asked: The documents that were asked for.
        written: The tokens that were written.
    """

    prompts: Prompts
    texts: list[str] = dataclasses.field(default_factory=list)
    kept: int = 0
    asked: int = 0
    written: int = 0

    def lacks(self, tokens: int, most: int) -> int:
        """Return how many documents to ask for, at most `most`: of those so far, some were short, and some dropped."""
        each = self.kept / self.asked if self.kept else YIELD * LENGTH
        return min(math.ceil((tokens - self.kept) / each), most)


@dataclasses.dataclass(frozen=True, eq=False)
class OwnText:
    """OwnText parts what the base model writes: most of it is fitted to, and some of each kind nothing is fitted to.

    Attributes:
        write: Returns documents with at least so many tokens of each kind, by kind, of the text's first or another
            part; see `Writer.domains`.
        tokenizer: The tokenizer of the base model.
        window: The tokens of a window.
        windows: The windows of each kind that are fitted to.
    """

    write: Callable[[int, int], Domains]
    tokenizer: Any
    window: int
    windows: int
    _one: threading.Lock = dataclasses.field(default_factory=threading.Lock, init=False, repr=False)

    def fitted(self) -> Domains:
        """Return the documents to fit to, by kind. Raises what `Writer.domains` raises."""
        return self._parts[0]

    def at_least(self, windows: int) -> Domains:
        """Return documents that hold at least so many windows of each kind: those to fit to, and more if need be.

        Raises what `Writer.domains` raises.
        """
        fitted, missing = self.fitted(), (windows - self.windows) * self.window
        if missing <= 0:
            return fitted
        more = self.write(missing + LENGTH, 1)
        return {kind: [*documents, *more[kind]] for kind, documents in fitted.items()}

    def unseen(self) -> tuple[list[list[int]], ...]:
        """Return UNSEEN windows of each kind, a shard each, that no fit sees; () where the model writes too little."""
        return self._unseen

    @functools.cached_property
    def _unseen(self) -> tuple[list[list[int]], ...]:
        try:
            parts = self._parts[1]
        except TextError:
            return ()
        cut = [texts.all_windows(self.tokenizer, documents, self.window)[:UNSEEN] for documents in parts.values()]
        return tuple([window] for windows in cut for window in windows)

    @property
    def _written(self) -> Domains | TextError:
        """What the model writes, or why it is too little: that takes minutes, and is found out once."""
        with self._one:
            return self._found

    @functools.cached_property
    def _found(self) -> Domains | TextError:
        held = UNSEEN * self.window
        try:
            return self.write(self.window * self.windows + held + 2 * LENGTH, 0)  # a document is not cut in two
        except TextError as error:
            return error

    @functools.cached_property
    def _parts(self) -> tuple[Domains, Domains]:
        written, held = self._written, UNSEEN * self.window
        if isinstance(written, TextError):
            raise written
        counts = {kind: self._last(documents, held) for kind, documents in written.items()}
        return (
            {kind: documents[: len(documents) - counts[kind]] for kind, documents in written.items()},
            {kind: documents[len(documents) - counts[kind] :] for kind, documents in written.items()},
        )

    def _last(self, documents: Sequence[Document], tokens: int) -> int:
        """Return how many of the last documents hold at least so many tokens."""
        held = 0
        for count, document in enumerate(reversed(documents), start=1):
            held += len(self.tokenizer.encode(document.text, add_special_tokens=False))
            if held >= tokens:
                return count
        return len(documents)


def _read(path: Path) -> dict[str, list[str]]:
    return typed(dict[str, list[str]], cached.read_json(path), "own text")


def is_text(tokens: Sequence[int]) -> bool:
    """Return whether tokens are worth fitting to: neither almost none nor the same ones again and again."""
    runs = [tuple(tokens[place : place + RUN]) for place in range(len(tokens) - RUN + 1)]
    return len(tokens) >= LEAST_TOKENS and len(set(runs)) >= LEAST_DISTINCT * len(runs)


def kinds(tokenizer: Any, part: int = 0) -> dict[str, Callable[[], Prompts]]:
    """Return the kinds of text that are written, each with what makes its prompts, endlessly and always the same.

    Another part of a text begins with other tokens.
    """
    begin: list[int] = tokenizer.encode("")  # what the tokenizer puts before a text
    found: dict[str, Callable[[], Prompts]] = {
        "begin": lambda: _random_starts(tokenizer, begin, part),
        "starts": lambda: _in_turn(
            [[*begin, *tokenizer.encode(start, add_special_tokens=False)] for start in STARTS.split("|")]
        ),
    }
    with contextlib.suppress(TextError):  # there is no chat template, or it wants chats of another form
        asked = [chat.chat_ids(tokenizer, [{"role": "user", "content": one}]) for one in ASKED.split("|")]
        short = [ids for ids in asked if len(ids) <= LENGTH]
        if short:
            found["chat"] = lambda: _in_turn(short)
    return found


def _random_starts(tokenizer: Any, begin: Sequence[int], seed: int) -> Prompts:
    """Yield the begin token with a random token of the vocabulary, so that texts of many kinds and languages begin."""
    draw, special = torch.Generator().manual_seed(seed), set(tokenizer.all_special_ids)
    size = len(tokenizer.get_vocab())
    while True:
        token = int(torch.randint(size, (1,), generator=draw))
        if token not in special and tokenizer.decode([token]).strip("\ufffd \n"):
            yield [*begin, token]


def _in_turn(prompts: Sequence[list[int]]) -> Prompts:
    while True:
        yield from prompts
