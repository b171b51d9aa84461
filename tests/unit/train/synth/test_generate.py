"""Pages on demand: always the same, from what their split may show, with boxes where the finished picture has them."""

import re
from dataclasses import replace

import numpy as np
import pytest

from train.synth import KINDS, PRESETS, SPLITS, PageOptions, SizeRange, render
from train.synth import sheet as sheets
from train.synth.content import Dice
from train.synth.degrade import degrade
from train.synth.document import Document
from train.synth.fonts import glyphs
from train.synth.generate import draw
from train.synth.layouts import FAMILIES, TEMPLATES
from train.synth.page import Box
from train.synth.questions import grounded, reachable
from train.synth.split import named

SMALL = replace(PRESETS["small-512"], sizes=((384, 384),))


@pytest.mark.parametrize("index", range(6))
def test_a_page_is_the_same_each_time(index: int):
    first = render(index, "train", 5, SMALL)
    for other in range(3):  # other pages between must change nothing
        render(other, "test", 1, SMALL)
    again = render(index, "train", 5, SMALL)
    assert first.page.pixels.tobytes() == again.page.pixels.tobytes()
    assert (first.template, first.questions, first.page.places) == (again.template, again.questions, again.page.places)


def test_pages_differ_by_index_seed_and_split():
    drawn = [render(0, "train", 0, SMALL), render(1, "train", 0, SMALL), render(0, "train", 1, SMALL)]
    drawn += [render(0, split, 0, SMALL) for split in SPLITS if split != "train"]
    assert len({document.page.pixels.tobytes() for document in drawn}) == len(drawn)


def test_streams_of_splits_differ():
    streams = {tuple(named(split).rng(0, 0).integers(0, 2**62, 4)) for split in SPLITS}
    assert len(streams) == len(SPLITS)


@pytest.mark.parametrize(
    ("split", "unseen_fonts", "unseen_layouts"),
    [
        ("train", False, False),
        ("validation", False, False),
        ("test", False, False),
        ("unseen_fonts", True, False),
        ("unseen_layouts", False, True),
        ("unseen", True, True),
    ],
)
def test_a_split_shows_its_own_fonts_and_templates(split, unseen_fonts, unseen_layouts, monkeypatch):
    used = set()

    def noted(face, size):
        used.add(face.file.name)
        return glyphs(face, size)

    monkeypatch.setattr(sheets, "glyphs", noted)
    templates = {render(index, split, 0, SMALL).template for index in range(40)}
    train, unseen = named("train"), named("unseen")
    seen_files = {face.file.name for face in train.faces} | {face.bold().file.name for face in train.faces}
    unseen_files = {face.file.name for face in unseen.faces} | {face.bold().file.name for face in unseen.faces}
    assert not seen_files & unseen_files
    assert used <= (unseen_files if unseen_fonts else seen_files)
    assert all(TEMPLATES[name].unseen == unseen_layouts for name in templates)


def test_no_template_of_unseen_is_trained_on():
    for family in FAMILIES:
        trained = {template.name for template in named("train").templates(family)}
        kept_back = {template.name for template in named("unseen").templates(family)}
        assert trained and kept_back and not trained & kept_back


def test_boxes_are_fractions_with_two_decimals():
    seen = 0
    for index in range(30):
        document = render(index, "train", 2, replace(SMALL, strength=1.0))
        for question in document.questions:
            assert question.kind in KINDS and question.prompt and question.answer
            if question.kind == "ground":
                seen += 1
                assert re.fullmatch(r"\[([01]\.\d{2},){3}[01]\.\d{2}\]", question.answer)
                x0, y0, x1, y1 = (float(side) for side in question.answer[1:-1].split(","))
                assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
                assert x1 - x0 >= 0.02 and y1 - y0 >= 0.02, question
    assert seen > 20


@pytest.mark.parametrize("template", ["receipt/left", "form/grid", "table/ruled", "screen/application"])
def test_boxes_cover_what_they_name_after_turning(template: str):
    """Characters whose place was in a box are in it afterwards, and the box has not swallowed the page."""
    options = PageOptions(((640, 640),), 16, 24)
    sheet = draw(TEMPLATES[template], Dice(np.random.default_rng(3)), (640, 640), named("train").faces, options)
    straight = Document(sheet.page, template, sheet.questions(100))
    turned = next(
        worse
        for seed in range(100)
        if (worse := degrade(straight, np.random.default_rng(seed), 1.0)).page.places != straight.page.places
    )
    compared = 0
    for before, after in zip(straight.questions, turned.questions, strict=True):
        if before.box is None:
            continue
        within = [at for at, place in enumerate(straight.page.places) if _holds(before.box, place)]
        places = [turned.page.places[at] for at in within]
        held = [_holds(after.box.padded(2), place) for place in places]
        assert all(held)
        compared += len(held)
        area = reachable(after.box, 640, 640)
        assert area.width < before.box.width + 0.1 * 640 and area.height < before.box.height + 0.1 * 640
    assert compared > 50


def _holds(box, place) -> bool:
    x, y = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
    return box.x0 <= x <= box.x1 and box.y0 <= y <= box.y1


def test_boxes_are_clipped_to_the_page():
    assert grounded(reachable(Box(-5, 2, 12, 4), 10, 10), 10, 10) == "[0.00,0.20,1.00,0.40]"


def test_sizes_stay_in_their_range():
    drawn = [SizeRange((400, 500)).draw(Dice(np.random.default_rng(seed))) for seed in range(300)]
    assert all(400 <= max(size) <= 500 and min(size) >= 0.49 * max(size) for size in drawn)
    assert sum(width == height for width, height in drawn) > 100
    assert any(width > 1.4 * height for width, height in drawn) and any(height > 1.4 * width for width, height in drawn)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_draw_pages_of_their_size_with_questions(preset: str):
    longest = int(preset.split("-")[1])
    for index in range(3):
        document = render(index, "train", 0, PRESETS[preset])
        assert 0.9 * longest <= max(document.page.width, document.page.height) <= longest
        assert 1 <= len(document.questions) <= PRESETS[preset].questions


def test_kinds_all_occur_and_pages_have_several_questions():
    documents = [render(index, "train", 0, SMALL) for index in range(120)]
    assert {question.kind for document in documents for question in document.questions} == set(KINDS)
    assert np.mean([len(document.questions) for document in documents]) > 8


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown split 'dev', expected one of train"):
        render(0, "dev")
    with pytest.raises(ValueError, match="unknown families poems"):
        PageOptions(families=(("poems", 1.0),))
    with pytest.raises(ValueError, match="no text size between 49 and 50"):
        PageOptions(min_px=49, max_px=50)
