"""Checks the values of a study file, and says in one line what is wrong with them and in which file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from search.config.space_section import Dimension, Range
from search.config.spelling import nearest
from search.config.study_file import StudyFile
from search.errors import ConfigError

MEMBERS = ("Range", "int")
MOST_PROBLEMS = 5  # of a study file that are listed


def validate(values: Any, where: str, sources: Sequence[tuple[str, Any]] = ()) -> StudyFile:
    """Check the values of a study file.

    Args:
        values: The sections and keys, as YAML gives them.
        where: What an error message begins with, such as "study 'demo'".
        sources: The composed files as pairs (name, values), last one first; an error then names its file.

    Raises:
        ConfigError: A key or a value is wrong.
    """
    try:
        return StudyFile.model_validate(values)
    except ValidationError as error:
        problems: dict[str, str] = {}  # a union reports one problem per member: the first is enough
        for problem in error.errors():
            if len(problems) >= MOST_PROBLEMS:
                problems.setdefault(_where(problem), "")
            elif _where(problem) not in problems:
                file = _source_of(problem["loc"], sources)
                problems[_where(problem)] = f"{file + ': ' if file else ''}{_explain(problem)}"
        more = f"; and {len(problems) - MOST_PROBLEMS:,} more" if len(problems) > MOST_PROBLEMS else ""
        raise ConfigError(f"{where}: " + "; ".join([*problems.values()][:MOST_PROBLEMS]) + more) from None


def _source_of(location: Sequence[Any], sources: Sequence[tuple[str, Any]]) -> str:
    """Return the name of the file that set the value at `location`, or "" for an override or a default."""
    for name, values in sources:
        at = values
        for part in location:
            if (isinstance(at, dict) and part in at) or (isinstance(at, list) and part in range(len(at))):
                at = at[part]
            elif part not in MEMBERS:
                break
        else:
            return name
    return ""


def _where(problem: Any) -> str:
    # pydantic adds the members of a union to the location; only keys are plain words
    return ".".join(
        str(part) for part in problem["loc"] if str(part).replace("_", "").isalnum() and part not in MEMBERS
    )


def _explain(problem: Any) -> str:
    where = _where(problem)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(where.rpartition('.')[2], _keys_of_section(problem['loc']))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = "is required"
    found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
    return f"{where + ': ' if where else ''}{message}{found}"


def _keys_of_section(location: Sequence[Any]) -> list[str]:
    """Return the keys of the section that holds the key at `location`."""
    section: Any = StudyFile
    for part in location[:-1]:
        field = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, BaseModel) else None
        section = field.annotation if field is not None else None
        if section == Dimension:
            section = Range
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return []
