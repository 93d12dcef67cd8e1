"""Encodes texts in a process of its own, run as a script: python tokenizer_child.py TOKENIZER_JSON.

It reads texts from standard input, each after its length in bytes (4 bytes, big-endian), and answers each with a line:
`ok`, or what is wrong. The first line tells whether the tokenizer was loaded. It imports nothing of this project.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys

BASE_MEMORY = 2_000_000_000  # bytes of address space for the tokenizer
MEMORY_PER_BYTE = 1000  # of text: a token of each byte has a string, a number and two offsets


def main(path: str) -> None:
    """Load the tokenizer, and encode texts until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    _limit(BASE_MEMORY + MEMORY_PER_BYTE * os.path.getsize(path) // 10)  # noqa: PTH202 imported as little as possible
    import tokenizers

    def answer(line: str) -> None:
        answers.write(f"{line}\n")
        answers.flush()

    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
    except BaseException as error:  # a panic of its Rust code is no Exception
        answer(_line(error))
        return
    answer("ok")
    while len(prefix := sys.stdin.buffer.read(4)) == 4:
        data = sys.stdin.buffer.read(int.from_bytes(prefix, "big"))
        _limit(BASE_MEMORY + MEMORY_PER_BYTE * len(data))
        try:
            tokenizer.encode(data.decode("utf-8"))
        except BaseException as error:
            answer(_line(error))
        else:
            answer("ok")


def _limit(size: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # a lower limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (size, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _line(error: BaseException) -> str:
    return ascii(" ".join(str(error).split()) or type(error).__name__)[1:-1][:160]


if __name__ == "__main__":
    main(sys.argv[1])
