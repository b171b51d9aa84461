"""The JSONL file that answers are appended to, and that a later run goes on with."""

import json
from pathlib import Path
from typing import Any, cast

from runtime.batch.questions import is_id
from runtime.errors import UserError

_BEGINNING = b'{"id": '  # of every line


class AnswerFile:
    """Answers, one a line, in the order in which they were finished.

    Attributes:
        ids: of the questions that the file has an answer or an error for.
        failed: how many of them have an error.
    """

    def __init__(self, file: Path):
        """Open the file or make a new one. Of a run that was killed the last line may be half written; it is cut off.

        Raises:
            UserError: the file holds something else than answers.
        """
        self.ids: set[str | int] = set()
        self.failed = 0
        self._path, self._file = file, open(file, "a+b")  # noqa: SIM115  # closed by __exit__
        try:
            self._recover()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, question_id: str | int, values: dict[str, Any]) -> None:
        """Append a line with these values. `error` among them makes it a failed one."""
        line = {"id": question_id, **values}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self._count(line)

    def _count(self, line: dict[str, Any]) -> None:
        self.ids.add(line["id"])
        self.failed += "error" in line

    def _recover(self) -> None:
        self._file.seek(0)
        end = 0
        for number, content in enumerate(self._file, 1):
            line, whole = _parsed(content), content.endswith(b"\n")
            if line is not None:
                self._count(line)
                if not whole:  # an editor took the last line's end
                    self._file.write(b"\n")
            elif whole or not content.startswith(_BEGINNING[: len(content)]):  # nothing of ours to be cut off
                raise UserError(f"{self._path}, line {number}: no answer of an earlier run; name another file")
            else:
                self._file.truncate(end)
                return
            end += len(content)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None where this is no line of a file of answers."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    values = cast(dict[str, Any], found)
    return values if is_id(values.get("id")) and values.keys() & {"text", "error"} else None
