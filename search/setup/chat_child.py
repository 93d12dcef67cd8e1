"""Renders chats with a chat template in a process of its own, run as a script: python chat_child.py.

It reads JSON values from standard input, each after its length in bytes (4 bytes, big-endian), and answers each with a
line of JSON. The first value is the template, and its answer is {"ok": true}. Each following one holds the template's
variables, and its answer is {"text": …}. {"error": …} says what is wrong. It imports nothing of this project.

The template runs as transformers runs it: in jinja2's immutable sandbox, with the same filters and functions, but that
strftime_now gives one and the same day, so that a prompt is tomorrow what it is today.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import resource
import sys
from typing import Any

MEMORY = 1_000_000_000  # bytes of address space
MOST_CHARACTERS = 10_000_000  # of a rendered chat
DAY = datetime.datetime(2026, 1, 1)
OLDEST = (3, 1, 6)  # of jinja2: older sandboxes are known to be broken out of


def main() -> None:
    """Read the template, and render chats until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with contextlib.suppress(ValueError, OSError):  # a lower limit holds already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def answer(values: dict[str, Any]) -> None:
        answers.write(f"{json.dumps(values)}\n")
        answers.flush()

    template = None
    while len(prefix := sys.stdin.buffer.read(4)) == 4:
        values = json.loads(sys.stdin.buffer.read(int.from_bytes(prefix, "big")))
        try:
            if template is None:
                template = compiled(values)
                answer({"ok": True})
                continue
            text = template.render(**values)
            if len(text) > MOST_CHARACTERS:
                raise ValueError(f"it writes {len(text):,} characters")
            answer({"text": text})
        except BaseException as error:  # the template is a program from outside
            answer({"error": (" ".join(str(error).split()) or type(error).__name__)[:160]})
            if template is None:
                return


def compiled(source: str) -> Any:
    """Return a template that is ready to be rendered.

    Raises:
        TemplateError: It is no template.
        ImportError: jinja2 is too old.
    """
    import jinja2
    from jinja2 import ext, nodes, sandbox, utils

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < OLDEST:
        raise ImportError(f"jinja2 {jinja2.__version__} is too old; install 3.1.6 or later")

    class Generation(ext.Extension):
        """The block `generation`, which marks what a model has written and changes no text."""

        tags = {"generation"}  # noqa: RUF012  as jinja2 reads it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inner"), [], [], body).set_lineno(line)

        def _inner(self, caller: Any) -> Any:
            return caller()

    class Dict:
        """`dict` for templates, without a type's attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

    class Namespace(utils.Namespace):
        """`namespace` for templates, without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, rest = args[0], args[1:]
            values = dict(*rest, **kwargs)
            for name in values:
                _require_public(name)
            utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _require_public(name)
            super().__setitem__(name, value)

    def _require_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} is no name for an attribute of a namespace")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=DAY.strftime, dict=Dict(), namespace=Namespace
    )
    return environment.from_string(source)


if __name__ == "__main__":
    main()
