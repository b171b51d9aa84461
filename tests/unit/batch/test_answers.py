"""The file of answers: whatever a killed run left of it, the next one goes on."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.batch.answers import AnswerFile
from runtime.errors import UserError

ANSWERS = st.dictionaries(st.text() | st.integers(), st.fixed_dictionaries({"text": st.text()}), max_size=4)


@given(ANSWERS, st.data())
def test_a_file_that_was_cut_anywhere_is_repaired(tmp_path_factory, answers, data):
    path = tmp_path_factory.mktemp("cut") / "answers.jsonl"
    with AnswerFile(path) as file:
        for question_id, values in answers.items():
            file.write(question_id, values)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    with AnswerFile(path) as file:
        kept = set(file.ids)
        whole = content[:cut].count(b"\n")
        assert kept in (set(list(answers)[:whole]), set(list(answers)[: whole + 1]))
        for question_id, values in answers.items():
            if question_id not in kept:
                file.write(question_id, values)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"id": question_id, **values} for question_id, values in answers.items()
    ]


def test_errors_are_counted_over_runs(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        file.write("a", {"error": "no such file"})
        file.write("b", {"text": ""})
        assert file.failed == 1
    with AnswerFile(path) as file:
        assert (file.ids, file.failed) == ({"a", "b"}, 1)


@pytest.mark.parametrize(
    ("line", "content"),
    [
        (1, b"\x89PNG\r\n\x1a\n"),
        (1, b"notes without an end"),
        (2, b'{"id": 1, "text": ""}\n{"image": "a.png", "prompt": "What?"}\n'),
        (2, b'{"id": 1, "text": ""}\n{"id": 2, "te\n'),
        (1, b'{"id": 1.5, "text": ""}\n'),
        (1, b'{"id": 1}\n'),
        (1, b"[]\n"),
    ],
)
def test_a_file_of_something_else_is_left_alone(line, content, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"answers.jsonl, line {line}: no answer"):
        AnswerFile(path)
    assert path.read_bytes() == content
