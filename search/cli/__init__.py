"""Holds the command line, which parses, calls and prints; the logic is elsewhere.

Tables for people and JSON (`--json`) go to standard output; progress and warnings to standard error.
Exit status 0: done, 1: failed, 2: wrong usage. Heavy imports wait until a command runs.
"""

from __future__ import annotations

from search.cli import by_hand, compress, machine, study
from search.cli.main import main

__all__ = ["by_hand", "compress", "machine", "main", "study"]
