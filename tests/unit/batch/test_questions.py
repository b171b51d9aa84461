"""The file of questions: what is taken, and that an error names the line before anything is computed."""

import pytest

from runtime.batch.questions import check_questions, read_questions
from runtime.errors import UserError
from runtime.types import Options

GOOD = '{"image": "a.png", "prompt": "What?"}'


@pytest.fixture
def written(tmp_path):
    def write(*lines):
        file = tmp_path / "questions.jsonl"
        file.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
        return file

    return write


def test_what_a_line_says(written, tmp_path):
    file = written(
        b"\xef\xbb\xbf" + GOOD.encode(),
        "",
        '{"id": "x", "image": ["a.png", "/b.png"], "prompt": "é", "max_new_tokens": 3, "system": "Be brief."}\r',
        '{"id": 0, "image": [], "prompt": "", "max_new_tokens": null, "category": [{}]}',
    )
    first, second, third = read_questions(file)
    assert (first.line, first.id, first.images, first.prompt) == (1, 1, (tmp_path / "a.png",), "What?")
    assert first.options(Options(9, system="S")) == Options(9, system="S")
    assert (second.id, second.prompt) == ("x", "é")
    assert list(map(str, second.images)) == [str(tmp_path / "a.png"), "/b.png"]
    assert second.options(Options(9, stop=("!",))) == Options(3, stop=("!",), system="Be brief.")
    assert (third.line, third.id, third.images, third.options(Options(9))) == (4, 0, (), Options(9))
    assert check_questions(file) == {1, "x", 0}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "no JSON"),
        (b'{"image": "\xff", "prompt": "?"}', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('["a.png"]', "expected a JSON object"),
        ('{"image": "a.png"}', "the key 'prompt' is missing"),
        ('{"prompt": "What?"}', "the key 'image' is missing"),
        ('{"prompt": "What?", "image": null}', "the key 'image' is missing"),
        ('{"prompt": "What?", "image": ["a.png", 3]}', "'image' is .* a path or a list of paths"),
        ('{"prompt": 3, "image": "a.png"}', "'prompt' is 3, expected a string"),
        ('{"prompt": "", "image": [], "id": true}', "'id' is True, expected a string or a whole number"),
        ('{"prompt": "", "image": [], "id": 1.5}', "'id' is 1.5"),
        ('{"prompt": "", "image": [], "max_new_tokens": 0}', "'max_new_tokens' is 0, expected a whole number from 1"),
        ('{"prompt": "", "image": [], "max_new_tokens": "9"}', "'max_new_tokens' is '9'"),
        ('{"prompt": "", "image": [], "system": 3}', "'system' is 3, expected a string"),
    ],
)
def test_a_line_that_is_none_is_an_error_with_its_number(line, says, written):
    with pytest.raises(UserError, match=f"questions.jsonl, line 3: {says}"):
        check_questions(written(GOOD, "", line, GOOD))


@pytest.mark.parametrize("second", ['{"id": "x", "image": [], "prompt": ""}', '{"image": [], "prompt": ""}'])
def test_an_id_that_occurs_twice_is_an_error(second, written):
    first = '{"id": "x", "image": [], "prompt": ""}' if "id" in second else '{"id": 2, "image": [], "prompt": ""}'
    with pytest.raises(UserError, match=r"line 2: another line has the id ('x'|2)"):
        check_questions(written(first, second))


def test_a_file_that_is_not_there_or_is_none(tmp_path):
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        check_questions(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="not a file"):
        check_questions(tmp_path)
