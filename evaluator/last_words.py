"""Quotes the end of a program's output in an error."""

from __future__ import annotations

from pathlib import Path

BYTES = 8000  # of a log, from its end
LOOKED_AT = 30  # lines of it
QUOTED_LINES, QUOTED_CHARACTERS = 3, 300
NOISE = "leaked"  # of nanobind, at the end of every vLLM


def of_text(text: str) -> str:
    """Return the last lines that name an error, else the last lines, as one line; "" where there is none."""
    told = [line.strip() for line in text[-BYTES:].split("\n") if line.strip() and NOISE not in line][-LOOKED_AT:]
    wrong = [line for line in told if "error" in line.lower()] or told
    return " | ".join(line[:QUOTED_CHARACTERS] for line in wrong[-QUOTED_LINES:])


def of(log: Path) -> str:
    """Return the last words of a log in brackets, to be put behind an error; "" where it holds none."""
    try:
        quoted = of_text(log.read_bytes()[-BYTES:].decode(errors="replace"))
    except OSError:
        return ""
    return f" (its last words: {quoted})" if quoted else ""
