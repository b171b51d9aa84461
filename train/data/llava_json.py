"""LLaVA's JSON: records of images and of messages between a human and the model."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import UserError

_SURROGATE = re.compile("[\ud800-\udfff]")


class MalformedError(ValueError):
    """A record that cannot be used; the message says why."""


class Turn(NamedTuple):
    question: str
    answer: str


def read_records(file: Path) -> Iterator[Any]:
    """The records of a JSON list or of JSON lines; a line that is not JSON comes as its text.

    Raises:
        UserError: the file is neither; it is one of lines if the first one is JSON.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            first = next((line for line in stream if line.strip()), "")
            stream.seek(0)
            if first.lstrip().startswith("["):
                yield from json.load(stream)
            else:
                json.loads(first or "null")
                yield from (_record(line) for line in stream if line.strip())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{file}: neither a list of records nor one in each line: {error}") from error


def _record(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def images_of(record: Any) -> list[str]:
    """A record's image paths: none, one or several. Raises MalformedError."""
    if not isinstance(record, dict):
        raise MalformedError("not a JSON object")
    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise MalformedError(f"'image' is {images!r}; expected a path or a list of paths")
    return images


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """A record's questions and answers as they are written; a first message that is the model's is left out, as in the
    reference implementation. Raises MalformedError."""
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise MalformedError("no 'conversations'; expected a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise MalformedError("a message has no text; expected keys 'from' and 'value'")
        if _SURROGATE.search(message["value"]):
            raise MalformedError("a lone surrogate, which no encoding can represent")
    if messages[0].get("from") == "gpt":
        messages = messages[1:]
    roles = [message.get("from") for message in messages]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise MalformedError(f"roles are {', '.join(map(str, roles)) or 'none'}; expected human and gpt in turn")
    values = [message["value"] for message in messages]
    return [Turn(*pair) for pair in zip(values[::2], values[1::2], strict=True)]
