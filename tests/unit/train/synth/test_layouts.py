"""Every template on pages of several sizes: nothing leaves the page or lies on other text, and answers are true."""

import re
import string

import numpy as np
import pytest

from train.synth import KINDS, PageOptions
from train.synth.content import Dice
from train.synth.fonts import faces
from train.synth.generate import draw
from train.synth.layouts import FAMILIES, TEMPLATES
from train.synth.page import Box, Page
from train.synth.sheet import Sheet
from train.synth.style import contrast

# (width, height), smallest and largest text: pixels
SIZES = [
    ((256, 256), 24, 40),
    ((512, 512), 16, 40),
    ((400, 800), 14, 32),
    ((800, 400), 12, 32),
    ((1024, 1024), 12, 48),
]
PAGES = 4  # for each template and size
ALLOWED = set(string.printable[:95]) | set("€£")
READ = ("field", "label", "total", "date", "transcribe")


class Recorder:
    """Every line that was drawn: its text and box, also of what was cut off, and its contrast to what lay under it."""

    def __init__(self, monkeypatch):
        self.lines: list[tuple[str, Box, float]] = []
        original = Page.text

        def text(page, x, y, text, glyphs, colour=(0, 0, 0)):
            rows = slice(max(0, round(y)), max(0, round(y) + glyphs.height))
            part = page.pixels[rows, max(0, round(x)) : max(0, round(x) + glyphs.width(text))].copy()
            box = original(page, x, y, text, glyphs, colour)
            under = np.median(part.reshape(-1, 3), axis=0) if part.size else (0, 0, 0)
            self.lines.append((text, box, contrast(tuple(colour), tuple(under))))
            return box

        monkeypatch.setattr(Page, "text", text)


def sheets(name: str) -> list[Sheet]:
    """Pages of a template, the same each time."""
    drawn = []
    for number, (size, min_px, max_px) in enumerate(SIZES):
        options = PageOptions((size,), min_px, max_px)
        for page in range(PAGES):
            dice = Dice(np.random.default_rng([number, page, len(name)]))
            drawn.append(draw(TEMPLATES[name], dice, size, faces("seen"), options))
    return drawn


def inside(page: Page, box: Box) -> str:
    """The characters whose centres lie in a box, in the order they were drawn."""
    found = []
    for character, (x0, y0, x1, y1) in zip(page.characters, page.places, strict=True):
        if box.x0 <= (x0 + x1) / 2 <= box.x1 and box.y0 <= (y0 + y1) / 2 <= box.y1:
            found.append(character)
    return "".join(found)


def overlap(a: Box, b: Box) -> float:
    """Shared area as a share of the smaller box."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    smaller = min(a.width * a.height, b.width * b.height)
    return width * height / smaller if width > 0 and height > 0 and smaller else 0.0


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_lies_on_the_page_apart_from_other_text_and_stands_out(name: str, monkeypatch):
    recorder = Recorder(monkeypatch)
    for sheet in _each(name, recorder):
        for text, box, difference in recorder.lines:
            assert set(text) <= ALLOWED, text
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= sheet.page.width and box.y1 <= sheet.page.height, text
            assert difference >= 2.9, (text, difference)
        for at, (text, box, _) in enumerate(recorder.lines):
            for other, its_box, _ in recorder.lines[:at]:
                assert overlap(box, its_box) < 0.1, (text, other)


def _each(name: str, recorder: Recorder):
    """Draw the template's pages one by one, with a fresh record for each."""
    for number, (size, min_px, max_px) in enumerate(SIZES):
        for page in range(PAGES):
            recorder.lines.clear()
            dice = Dice(np.random.default_rng([number, page, len(name)]))
            yield draw(TEMPLATES[name], dice, size, faces("seen"), PageOptions((size,), min_px, max_px))


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_stand_where_the_question_says(name: str):
    asked = 0
    for sheet in sheets(name):
        for question in sheet.questions(1000):
            assert question.kind in KINDS and question.prompt
            if question.kind in READ:
                asked += 1
                assert question.box is not None, question
                assert question.answer.replace(" ", "") in inside(sheet.page, question.box.padded(1)), question
            if question.kind == "ground":
                assert not question.answer
                assert 0 <= question.box.x0 < question.box.x1 <= sheet.page.width
                assert 0 <= question.box.y0 < question.box.y1 <= sheet.page.height
                assert question.box.width >= 0.02 * sheet.page.width, question
                assert question.box.height >= 0.02 * sheet.page.height, question
            else:
                assert question.answer
    assert asked


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_same_words_are_never_asked_with_two_answers(name: str):
    for sheet in sheets(name):
        prompts = [question.prompt for question in sheet.questions(1000)]
        assert len(prompts) == len(set(prompts))


def number_of(text: str) -> float:
    """An amount as printed, whichever sign parts the decimals."""
    digits = re.sub(r"[^\d.,]", "", text).strip(".,")
    if re.search(r"[.,]\d{1,2}$", digits):
        whole, decimals = re.split(r"[.,](?=\d{1,2}$)", digits)
        return float(re.sub(r"[.,]", "", whole) + "." + decimals)
    return float(re.sub(r"[.,]", "", digits))


@pytest.mark.parametrize("family", ["receipt", "invoice", "table", "bars", "lines"])
def test_comparisons_follow_from_what_is_printed(family: str):
    compared = 0
    for template in FAMILIES[family]:
        for sheet in sheets(template.name):
            questions = sheet.questions(1000)
            for series in (series for series in sheet.series if series.compared):
                printed = {}
                for entry in series.entries:
                    assert entry.name.replace(" ", "") == inside(sheet.page, entry.name_box)
                    if entry.text:
                        printed[entry.name] = number_of(inside(sheet.page, entry.text_box))
                if len(printed) < len(series.entries):
                    continue
                for phrasings, extreme in ((series.most, max), (series.least, min)):
                    for question in questions:
                        if question.kind == "compare" and question.prompt in phrasings:
                            assert question.answer == extreme(printed, key=printed.get), question
                            compared += 1
    assert compared > 10


@pytest.mark.parametrize("variant", ["scaled", "upright", "level", "stems"])
def test_longer_bars_have_larger_numbers(variant: str):
    for sheet in sheets(f"bars/{variant}"):
        for series in sheet.series:
            entries = sorted(series.entries, key=lambda entry: entry.number)
            standing = len({entry.box.y1 for entry in entries}) == 1 and len(entries) > 1
            lengths = [entry.box.height if standing else entry.box.width for entry in entries]
            assert lengths == sorted(lengths)


@pytest.mark.parametrize("family", ["receipt", "invoice"])
def test_totals_are_sums(family: str):
    checked = 0
    for template in FAMILIES[family]:
        for sheet in sheets(template.name):
            totals = [number_of(fact.value) for fact in sheet.facts if fact.kind == "total"]
            parts = [number_of(fact.value) for fact in sheet.facts if fact.name == "tax" and family == "invoice"]
            items = sum(number_of(entry.text) for series in sheet.series for entry in series.entries)
            if totals and items:
                assert totals == [pytest.approx(items + sum(parts), abs=0.01)]
                checked += 1
    assert checked > 20


def test_every_family_holds_a_template_back():
    for family, templates in FAMILIES.items():
        assert len(templates) >= 4, family
        assert any(template.unseen for template in templates), family
        assert sum(not template.unseen for template in templates) >= 3, family
