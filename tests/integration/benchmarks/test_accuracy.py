"""The accuracy benchmark: what it asks, how it scores, what it writes."""

import json

import pytest
from PIL import Image

import runtime
from benchmarks import accuracy
from benchmarks.accuracy import Answered, ask, measure, pages
from tests.support.commands import run_main
from train.synth import PRESETS


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


def test_the_pages_have_as_many_questions_as_asked_for_and_are_those_of_the_split():
    taken = list(pages("test", 25, seed=3))
    assert sum(len(questions) for _, questions in taken) == 25
    first = accuracy.render(0, "test", 3, PRESETS["page-1536"])
    assert taken[0][0].questions == first.questions
    assert (taken[0][0].page.pixels == first.page.pixels).all()


def test_pages_of_a_preset_with_questions_of_some_kinds():
    kinds = ("count", "label")
    taken = list(pages("test", 9, 0, PRESETS["figures-320"], kinds))
    assert {question.kind for _, questions in taken for question in questions} == set(kinds)
    assert sum(len(questions) for _, questions in taken) == 9
    assert {document.page.pixels.shape for document, _ in taken} == {(320, 320, 3)}


def test_answers_are_the_runtimes(model):
    (document, questions), *_ = pages("test", 3, seed=0)
    answers, visual_tokens = ask(model, document, questions, 256)
    options = runtime.Options(accuracy.MAX_NEW_TOKENS, resolution=256)
    for question, answer in zip(questions, answers, strict=True):
        *_, last = model.generate([Image.fromarray(document.page.pixels)], question.prompt, options)
        assert (answer.said, answer.wanted, answer.kind) == (last.result.text, question.answer, question.kind)
        assert visual_tokens == last.result.visual_tokens == 16


def test_a_row_is_the_mean_over_its_questions(model, monkeypatch):
    said = iter(["12.50", "12.5", "no", "[0.1,0.1,0.5,0.5]", "[0.6,0.6,0.9,0.9]", "nowhere"])
    kinds = ["total", "total", "field", "ground", "ground", "ground"]
    wanted, box = ["12.50", "12.50", "Yes", *3 * ["[0.10,0.10,0.50,0.60]"]], (0.1, 0.1, 0.5, 0.6)

    def answered(_model, _document, questions, _res):
        boxes = [box if kind == "ground" else None for kind in kinds]
        return [Answered(*asked, next(said), box) for *asked, box in zip(kinds, wanted, boxes, strict=True)], 144

    monkeypatch.setattr(accuracy, "ask", answered)
    monkeypatch.setattr(accuracy, "pages", lambda *_: [(None, kinds)])
    row = measure(model, 768, "test", 6, 0)
    assert (row.res, row.visual_tokens, row.split, row.questions, row.grounding_questions) == (768, 144, "test", 6, 3)
    assert row.anls == pytest.approx((1 + 0.8 + 0) / 3, abs=1e-4)
    assert row.exact_match == pytest.approx(1 / 3, abs=1e-4)
    assert row.iou50 == pytest.approx(1 / 3, abs=1e-4)
    assert row.anls_by_kind == {"field": 0.0, "total": 0.9}


def test_no_questions_are_refused_before_the_bundle_is_read():
    done = run_main("benchmarks.accuracy", "--bundle", "nowhere", "--questions", 0)
    assert done.returncode == 2
    assert "argument --questions: 0, expected at least 1" in done.stderr


def test_the_command_writes_a_row_for_each_resolution_and_split(conformance_bundle, tmp_path):
    file = tmp_path / "accuracy.json"
    arguments = ("--res", 128, 256, "--split", "test", "--questions", 4, "--json", file)
    done = run_main("benchmarks.accuracy", "--bundle", conformance_bundle, *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["res"], row["visual_tokens"], row["questions"]) for row in rows] == [(128, 4, 4), (256, 16, 4)]
    assert all(0 <= row[key] <= 1 for row in rows for key in ("anls", "exact_match", "iou50"))
    with Image.open(file.with_suffix(".png")) as chart:
        assert chart.format == "PNG"


def test_kinds_that_no_page_has_are_told():
    with pytest.raises(ValueError, match="no question of kind total"):
        list(pages("test", 3, 0, PRESETS["figures-320"], ("total",)))
