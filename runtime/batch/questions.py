"""Questions out of a JSONL file: {"id": ..., "image": PATH or [PATH, ...], "prompt": TEXT} a line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from runtime.errors import UserError
from runtime.types import Options

MAX_SHOWN_CHARS = 60  # of a value in an error


@dataclass(frozen=True)
class Question:
    """A line of the file.

    Attributes:
        line: its number, from 1.
        id: the line's own, or its number.
        images: paths.
        prompt: as `Model.generate` takes it.
        changed: fields of `Options` that the line sets.
    """

    line: int
    id: str | int
    images: tuple[Path, ...]
    prompt: str
    changed: dict[str, Any]

    def options(self, common: Options) -> Options:
        """How to answer it. common: options of all questions."""
        return replace(common, **self.changed)


def read_questions(file: Path) -> Iterator[Question]:
    """The questions of a file, read line by line. Empty lines are none, keys that are not known are left alone.

    Raises:
        UserError: a line is no JSON object, lacks a key or has a wrong value; the message has the line's number.
    """
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                question = _parsed(line, number, file.parent)
            except UserError as error:
                raise UserError(f"{file}, line {number}: {error}") from error
            yield question


def check_questions(file: Path) -> set[str | int]:
    """The IDs of a file's questions. Raises UserError as `read_questions`, and where two have the same."""
    if not file.is_file():  # it is read twice, which a pipe cannot be
        raise UserError(f"{file}: {'not a file' if file.exists() else 'no such file'}, expected questions as JSONL")
    ids: set[str | int] = set()
    for question in read_questions(file):
        if question.id in ids:
            raise UserError(
                f"{file}, line {question.line}: another line has the id {question.id!r}; without 'id' it is the number"
            )
        ids.add(question.id)
    return ids


def is_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_paths(value: object) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(map(_is_text, cast(list[object], value))))


def _is_count(value: object) -> bool:
    return is_id(value) and isinstance(value, int) and value > 0


# key -> (whether a value will do, what is expected); null is as good as no key
_REQUIRED: dict[str, tuple[Callable[[object], bool], str]] = {
    "image": (_are_paths, "a path or a list of paths"),
    "prompt": (_is_text, "a string"),
}
_OPTIONS: dict[str, tuple[Callable[[object], bool], str]] = {
    "max_new_tokens": (_is_count, "a whole number from 1"),
    "system": (_is_text, "a string"),
}
_KEYS = {"id": (is_id, "a string or a whole number"), **_REQUIRED, **_OPTIONS}


def _parsed(line: bytes, number: int, folder: Path) -> Question:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"no JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, nested too deep
        raise UserError(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"expected a JSON object, found {_shown(found)}")
    values = {key: value for key, value in cast(dict[str, Any], found).items() if key in _KEYS and value is not None}
    for key in _REQUIRED:
        if key not in values:
            raise UserError(f"the key {key!r} is missing")
    for key, value in values.items():
        fits, expected = _KEYS[key]
        if not fits(value):
            raise UserError(f"{key!r} is {_shown(value)}, expected {expected}")
    images = [values["image"]] if _is_text(values["image"]) else values["image"]
    changed = {key: values[key] for key in _OPTIONS if key in values}
    paths = tuple(folder / image for image in images)
    return Question(number, values.get("id", number), paths, values["prompt"], changed)


def _shown(value: object) -> str:
    return repr(value)[:MAX_SHOWN_CHARS]
