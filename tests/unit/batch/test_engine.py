"""Many questions on a fake model: whoever is answered beside it, an answer is that of `Model.generate`."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.batch import run
from runtime.batch.answers import AnswerFile
from runtime.batch.engine import answers
from runtime.batch.questions import Question
from runtime.serve.types import Failed
from runtime.types import Options, Sampling
from tests.support.fakes import FakeDecoder, FakeEncoder, FakeTokenizer, fake_model

SLOTS = 3
WAIT = 20  # seconds, that a test waits for what must come


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    files = [tmp_path / f"{width}.png" for width in range(2, 6)]
    for width, file in enumerate(files, 2):
        Image.fromarray(np.full((1, width, 3), 40 * width, np.uint8)).save(file)
    return files


def question(number, images=(), prompt=None, **changed):
    return Question(0, number, tuple(images), prompt or f"Question {number}?", changed)


def answered(model, questions, options=None):
    """{id: values}, each of which came once."""
    found = [(one.id, values) for one, values in answers(model, iter(questions), options or Options(8), SLOTS)]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize(
    "options",
    [
        Options(8),
        Options(40, stop=("7", "3 1")),
        Options(8, Sampling(temperature=1.3, top_k=20, seed=4)),
        Options(8, Sampling(repetition_penalty=1.5)),
        Options(8, resolution=1),
    ],
    ids=["greedy", "stop strings", "sampled", "penalised", "resolution"],
)
@pytest.mark.parametrize("batches", [False, True], ids=["cpu", "gpu"])
def test_answers_are_those_of_single_runs(options, batches, pictures):
    questions = [
        question(number, pictures[number % 4 : number % 4 + number % 3], f"{'Long. ' * (number % 12)}What?")
        for number in range(30)
    ]
    questions += [question(30, max_new_tokens=2), question(31, [pictures[0]], "See <image>!", system="S")]
    submitted = threading.Event()

    def taken():
        for number, one in enumerate(questions):
            if number == SLOTS:
                submitted.set()
            yield one

    model = fake_model(FakeDecoder(fault=lambda: submitted.wait(WAIT)), FakeEncoder(batches))
    found = answered(model, taken(), options)
    assert found.keys() == {one.id for one in questions}
    assert max(model.decoder.batches[0].steps) > 1, "several were decoded together"
    for one in questions:
        *_, last = fake_model().generate(list(one.images), one.prompt, one.options(options))
        assert found[one.id] == {
            "text": last.result.text,
            "finish_reason": last.result.finish_reason,
            "visual_tokens": last.result.visual_tokens,
            "prompt_tokens": last.result.prompt_tokens,
            "new_tokens": len(last.result.token_ids),
        }


def test_what_is_wrong_with_one_fails_that_one_alone(pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(pictures[3].read_bytes()[:44])
    good = [question(number, pictures[:1]) for number in range(10)]
    bad = [
        question("broken", [tmp_path / "broken.png"]),
        question("missing", [pictures[0], tmp_path / "none.png"]),
        question("placeholders", pictures[:1], "<image> <image>"),
        question("long", (), "x" * 300),
        question("deadly", (), f"Who {FakeTokenizer.DEADLY}?"),
    ]
    mixed = [one for pair in zip(good[:5], bad, strict=True) for one in pair] + good[5:]
    found = answered(fake_model(), mixed)
    expected = answered(fake_model(), good)
    assert {number: found[number] for number in expected} == expected
    for name, says in (
        ("broken", "broken.png"),
        ("missing", "none.png: No such file"),
        ("placeholders", "2 <image> placeholder"),
        ("long", "longer than the context of 200"),
        ("deadly", "RuntimeError"),
    ):
        assert found[name].keys() == {"error"} and says in found[name]["error"]


def test_few_questions_are_held_at_once():
    taken, done = 0, 0

    def many():
        nonlocal taken
        for number in range(200):
            taken += 1
            assert taken - done <= 2 * SLOTS + 1
            yield question(number, max_new_tokens=1 + number % 5)

    for _ in answers(fake_model(), many(), Options(), SLOTS):
        done += 1
    assert done == 200


def test_a_crash_ends_the_batch():
    def fault():
        raise RuntimeError("the device is gone")

    finished = answers(fake_model(FakeDecoder(fault=fault)), map(question, range(9)), Options(), SLOTS)
    with pytest.raises(Failed, match="the device is gone"):
        next(finished)


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Runs questions.jsonl into answers.jsonl on a fake model; returns the exit code."""
    monkeypatch.setattr(run, "_loaded", lambda *_: (fake_model(), SLOTS))
    lines = [{"id": f"q{number}", "image": [], "prompt": f"Question {number}?"} for number in range(20)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lambda: run.answer_batch(
        tmp_path / "questions.jsonl", tmp_path / "answers.jsonl", "bundle", Options(5), None, None
    )


def lines_of(file):
    return {line["id"]: line for line in map(json.loads, file.read_text().splitlines())}


@pytest.mark.parametrize("after", [0, 1, 7])
def test_an_interrupted_run_goes_on(after, batch, tmp_path, monkeypatch, capsys):
    out = tmp_path / "answers.jsonl"
    assert batch() == 0
    expected = lines_of(out)
    assert expected.keys() == {f"q{number}" for number in range(20)}
    out.unlink()
    capsys.readouterr()

    write = AnswerFile.write

    def interrupted(self, question_id, values):
        if len(self.ids) == after:
            raise KeyboardInterrupt
        write(self, question_id, values)

    with monkeypatch.context() as patched:
        patched.setattr(AnswerFile, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch()
    assert f"{after} of 20 questions, 0 failed; the same command goes on" in capsys.readouterr().err
    begun = out.read_bytes()
    out.write_bytes(begun + b'{"id": "q')
    assert batch() == 0
    assert out.read_bytes().startswith(begun), "what was there is not computed again"
    assert lines_of(out) == expected
    assert len(out.read_text().splitlines()) == 20
    monkeypatch.setattr(run, "_loaded", None)  # nothing is left: no model is loaded
    assert batch() == 0


def test_a_failed_question_is_told_by_the_exit_code_until_its_line_is_removed(batch, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    out.write_text('{"id": "q3", "error": "no such file"}\n')
    assert batch() == batch() == 1
    assert "20 of 20 questions, 1 failed; remove their lines to ask them again" in capsys.readouterr().err
    out.write_text("".join(out.read_text().splitlines(keepends=True)[1:]))
    assert batch() == 0
    assert len(lines_of(out)) == 20
