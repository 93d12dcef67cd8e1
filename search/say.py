"""The callback that is told, in a few words for people, what is being done; and how warnings get to them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

Say = Callable[[str], None]

LOGGERS = ("compressors", "evaluator", "search")


def silent(text: str) -> None:
    """Tell nobody."""


class _Printed(logging.Handler):
    """_Printed prints a warning as a line on standard error, also while a progress bar is shown there."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"warning: {record.getMessage()}", file=sys.stderr, flush=True)


def print_warnings() -> None:
    """Print what these packages log as warnings; a second call does nothing."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Printed) for handler in logger.handlers):
            logger.addHandler(_Printed(logging.WARNING))
