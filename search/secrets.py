"""Masks passwords and tokens in everything that is printed, logged, stored or sent.

A secret is recognized by its place, as in `scheme://USER:PASSWORD@HOST` and `?token=…`, or by its value: those of
environment variables whose name tells it, of `.env`, and of the URLs that were handed to `remember`.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, quote_plus, unquote

MASK = "***"
SHORTEST = 4  # characters of a value that is masked wherever it is a word
ANYWHERE = 8  # characters of a value that is masked within words too

WORD = r"[^\s\"'<>`]"
EXAMPLE = r"USER(?::PASSWORD)?@"  # what messages and help texts say
# All up to the last @ of a word: an unescaped @, :, / or # may be part of the password. A third slash begins a path.
USERS = (
    re.compile(rf"(?P<before>\b[a-zA-Z][a-zA-Z0-9+.\-]*://)(?!/|{EXAMPLE}){WORD}*@"),
    re.compile(rf"(?P<before>\b[a-zA-Z][a-zA-Z0-9+.\-]+:/)(?!/){WORD}*:{WORD}*@"),
    re.compile(r"(?P<before>(?<![\w/@.*:-]))[\w.+-]+:[^\s@/\"'<>`]+@(?=[\w\[])"),
)
NAMES = (
    r"(?:\w*(?:password|passwd|passphrase|secret|signature|credentials?)|pwd|pass|pw|"
    r"(?:(?:access|auth|api|id|refresh|session|bearer|private|oauth|security|hf|x-amz-security)[_-]?)?token|"
    r"\w*(?:access|api|secret|private|account|signing|encryption|auth)[_-]?key(?:[_-]?id)?|"
    r"sig|x-(?:amz|goog)-(?:signature|credential)|jwt|authorization)"
)
VALUE = r"(?P<value>'[^']*'|\"[^\"]*\"|[^\s&;\"'<>`]*[^\s&;\"'<>`:,.)])"
PARAMETERS = (
    re.compile(rf"(?i)(?<![\w-])(?P<before>{NAMES}\s?=\s?){VALUE}"),
    re.compile(rf"(?i)(?P<before>(?P<quote>[\"']){NAMES}(?P=quote)\s*:\s*){VALUE}"),
    re.compile(r"(?i)(?P<before>\b(?:basic|bearer)\s+)(?P<value>[A-Za-z0-9+/_.~=-]{8,})"),
)
SECRET_NAME = re.compile(
    r"(?i)(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASS|PWD|PW|CREDENTIALS?|API_?KEY|\w*KEY(?:_ID)?)(?:_|$)"
)
OWN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD", "HF_TOKEN")
PLACES = ("PWD", "OLDPWD")  # directories, in spite of their names

_FORMAT_WARNING = warnings.formatwarning
_remembered: set[str] = set()


def remember(value: str) -> None:
    """Mask the value, and as a URL its password, wherever they occur from now on."""
    _remembered.update(_forms(value))


def remember_url(url: str) -> None:
    """Mask the user and the password of a URL, and the secrets of its query, wherever they occur from now on."""
    _remembered.update(_parts(url))


def remember_reference(name: str) -> None:
    """Mask the value of an environment variable that a study file refers to, unless it is a plain word or a path."""
    value = os.environ.get(name, "")
    if SECRET_NAME.search(name):
        remember(value)
    elif "://" in value:
        remember_url(value)
    elif len(value) >= ANYWHERE and not value.startswith(("/", ".", "~")) and not Path(value).exists():
        remember(value)


def masked(text: str) -> str:
    """Return a text without the passwords and tokens in it."""
    for value in sorted({*_remembered, *_of_environment()}, key=len, reverse=True):
        if value in text:
            text = _without(text, value)
    return masked_places(text)


def line_of(error: BaseException, most: int = 200) -> str:
    """Return the first line of an error's text without secrets, at most `most` characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return masked(lines[0])[:most]  # masked before it is cut: half a URL is not recognized


def masked_places(text: str) -> str:
    """Return a text without what stands where passwords and tokens stand, whatever their values are."""
    for pattern in USERS:
        text = pattern.sub(rf"\g<before>{MASK}@", text)
    for pattern in PARAMETERS:
        text = pattern.sub(rf"\g<before>{MASK}", text)
    return text


def masked_url(url: str) -> str:
    """Return a URL, or what was meant as one, without its user, its password and the secrets of its query."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    if "@" in rest and not (separator and rest.startswith("/")):
        rest = f"{MASK}@{rest.rpartition('@')[2]}"
    return masked_places(f"{scheme}{separator}{rest}")


def masked_values(values: Any) -> Any:
    """Return JSON values with `masked_places` applied to each text in them."""
    if isinstance(values, str):
        return masked_places(values)
    if isinstance(values, Mapping):
        return {key: masked_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [masked_values(value) for value in values]
    return values


def masked_word(word: str) -> str:
    """Return a word of a command line, such as `storage=URL`, without the secrets in it."""
    key, separator, value = word.partition("=")
    if separator and key.lstrip("+").rpartition(".")[2] == "storage":
        return f"{key}={masked_url(value)}"
    return masked(word)


def masked_words(words: Iterable[str]) -> list[str]:
    """Return the words of a command line without the secrets in them."""
    shown, after_storage = [], False
    for word in words:
        shown.append(masked_url(word) if after_storage else masked_word(word))
        after_storage = word == "--storage"
    return shown


def install() -> None:
    """Mask the tracebacks of this process, and what its loggers write to standard error."""
    sys.excepthook = _print_exception
    threading.excepthook = lambda args: _print_exception(args.exc_type, args.exc_value, args.exc_traceback)
    warnings.formatwarning = _format_warning
    if not isinstance(logging.getLogRecordFactory(), _Records):
        logging.setLogRecordFactory(_Records(logging.getLogRecordFactory()))


class _Records:
    """Creates log records whose message and traceback are masked."""

    def __init__(self, create: Any) -> None:
        self._create = create

    def __call__(self, *args: Any, **options: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._create(*args, **options)
        with contextlib.suppress(Exception):  # a message that can't be formatted is reported by logging itself
            text = record.getMessage()
            if masked(text) != text:
                record.msg, record.args = masked(text), None
        if record.exc_info and record.exc_info[0] is not None and record.exc_text is None:
            record.exc_text = masked("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record


def _format_warning(*args: Any, **options: Any) -> str:
    return masked(_FORMAT_WARNING(*args, **options))


def _print_exception(
    kind: type[BaseException], error: BaseException | None, where: TracebackType | None = None
) -> None:
    if sys.stderr is not None:
        sys.stderr.write(masked("".join(traceback.format_exception(kind, error, where))))


def _without(text: str, value: str) -> str:
    if len(value) >= ANYWHERE and not value.isdecimal():
        return text.replace(value, MASK)
    return re.sub(rf"(?<![\w/.-]){re.escape(value)}(?![\w/-])", MASK, text)


def _of_environment() -> Iterable[str]:
    """Yield the values of environment variables that are secrets by their names, and those of their URLs."""
    for name, value in os.environ.items():
        if "://" in value or name.endswith(("_URI", "_URL", "_DSN")):
            yield from _parts(value)
        elif name in OWN or (SECRET_NAME.search(name) and name not in PLACES):
            yield from _forms(value)


def _parts(url: str) -> Iterable[str]:
    """Yield the secrets of a URL: all before the last @, the user or password in it, and parameters of the query."""
    rest = url.partition("://")[2] or url
    for pattern in PARAMETERS:
        for match in pattern.finditer(rest):
            yield from _forms(match["value"].strip("'\""))
    if "@" not in rest or rest.startswith("/"):
        return
    user = rest.rpartition("@")[0]
    name, colon, password = user.partition(":")
    yield from _forms(user)
    yield from _forms(password)
    if "@" in password:  # what a parser takes for the host begins after the first @
        yield from _forms(password.partition("@")[2])
    if not colon or len(name) >= 20:  # a token in the place of a user
        yield from _forms(name)


def _forms(value: str) -> Iterable[str]:
    """Yield the value as it may be spelled: as it is, percent-encoded and decoded."""
    value = value.strip()
    for form in {value, quote(value, safe=""), quote_plus(value), unquote(value)}:
        if len(form) >= SHORTEST and not form.startswith(MASK) and not _is_ordinary(form):
            yield form


def _is_ordinary(value: str) -> bool:
    """Return whether the value is part of this machine's paths, where a mask would only hide which file is meant."""
    with contextlib.suppress(Exception):
        if value == getpass.getuser():
            return True
    return value in Path.home().parts or value == str(Path.home())
