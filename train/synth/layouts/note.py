"""Lines of running text: notes, lists, letters."""

import itertools

from train.synth import content
from train.synth.layouts.parts import around
from train.synth.page import Box
from train.synth.sheet import Flow, Line, Sheet, inset

EMS, MOST_EMS, DARK = 9, 110, 0.05
MOST = 24  # lines of a page
READ_LINE = ("Read line {number}.", "What does line {number} say?", "Transcribe line {number}.")
READ_ITEM = ("Read item {number}.", "What is item {number}?", "What does point {number} of the list say?")
READ_TITLE = ("What is the title?", "Read the heading.", "What is the heading of the page?")


def paragraph(sheet: Sheet) -> None:
    """A heading and a text that runs on from line to line."""
    flow = _column(sheet)
    title = _title(sheet, flow, sheet.dice.pick(("left", "centre")))
    drawn = _wrapped(sheet, flow, sheet.dice.whole(3, MOST))
    _ask_lines(sheet, drawn, READ_LINE if title is None else ("Read line {number} of the text.",))
    _about(sheet, title, "note")


def bullets(sheet: Sheet) -> None:
    """A list with a sign before every item."""
    flow = _column(sheet)
    title = _title(sheet, flow, "left")
    sign = sheet.dice.pick(("-", "*", "+", ">", "~"))
    _list(sheet, flow, lambda number: sign)
    _about(sheet, title, "list")


def numbered(sheet: Sheet) -> None:
    """A list with numbers."""
    flow = _column(sheet)
    title = _title(sheet, flow, "left")
    after = sheet.dice.pick((".", ")", ":"))
    _list(sheet, flow, lambda number: f"{number}{after}")
    _about(sheet, title, "list")


def letter(sheet: Sheet) -> None:
    """Place and date, a greeting, text, and who wrote it."""
    dice, flow = sheet.dice, _column(sheet)
    date = flow.write(content.date, align=dice.pick(("left", "right")))
    if date:
        sheet.fact("date of the letter", *date, kind="date")
    flow.skip(sheet.em * 0.5)
    name = content.first_name(dice)
    greeting = flow.write(f"{dice.pick(('Dear', 'Hello', 'Hi'))} {name},")
    if greeting:
        sheet.ask("field", ("Who is the letter to?", "To whom is the letter addressed?"), name, greeting[1])
    room = flow.left - 2.5 * sheet.height()
    lines = min(dice.whole(2, 14), max(1, int(room / (sheet.height() * flow.leading))))
    drawn = _wrapped(sheet, flow, lines)
    flow.skip(sheet.em * 0.5)
    ending = flow.write(dice.pick(("Yours,", "Best wishes,", "Regards,", "Thank you,")))
    signed = flow.write(content.person, "bold") if ending else None
    if signed:
        sheet.ask("field", ("Who signed the letter?", "Who wrote the letter?"), signed[0].text, signed[1])
        sheet.ground("the signature", signed[1])
        sheet.caption(f"A letter from {signed[0].text}.")
    if drawn:
        sheet.ground("the text of the letter", around([box for _, box in drawn]))


def columns(sheet: Sheet) -> None:
    """Two columns of short lines under a heading across both."""
    flow = _column(sheet)
    title = _title(sheet, flow, "centre")
    half = (flow.box.width - sheet.em) / 2
    room = int(flow.left / (sheet.height() * flow.leading))
    rows = min(room, sheet.dice.whole(3, 12))
    top = flow.y
    for side, name in ((0, "left"), (1, "right")):
        x = flow.box.x0 + side * (half + sheet.em)
        column = Flow(sheet, Box(x, top, x + half, flow.box.y1), flow.leading)
        drawn = [row for row in (column.write(content.phrase) for _ in range(rows)) if row]
        for number, (line, box) in enumerate(drawn[:9], 1):
            asked = (f"Read line {{number}} of the {name} column.", f"What is line {{number}} in the {name} column?")
            sheet.ask("transcribe", asked, line.text, box, number=str(number))
        if drawn:
            sheet.ground(f"the {name} column", around([box for _, box in drawn]))
            count = (f"How many lines does the {name} column have?",)
            sheet.ask("count", count, str(len(drawn)))
    sheet.page.vertical(flow.box.x0 + half + sheet.em / 2, top, flow.y + flow.left, sheet.style.muted)
    _about(sheet, title, "note")


def _column(sheet: Sheet) -> Flow:
    """A column of text, not so wide that its lines grow long."""
    edge = sheet.dice.uniform(0.03, 0.08) * min(sheet.page.width, sheet.page.height)
    box = inset(sheet.box, edge)
    width = min(box.width, sheet.dice.uniform(24, 44) * sheet.em)
    x0 = box.x0 + sheet.dice.pick((0, 0, 0.5, 1)) * (box.width - width)
    return Flow(sheet, Box(x0, box.y0, x0 + width, box.y1), sheet.dice.uniform(1.0, 1.35))


def _title(sheet: Sheet, flow: Flow, align: str) -> tuple[Line, Box] | None:
    if sheet.dice.chance(0.2):
        return None
    title = flow.write(content.heading, "large", align, sheet.style.strong)
    if title is not None and sheet.dice.chance(0.3):
        flow.rule()
    return title


def _wrapped(sheet: Sheet, flow: Flow, most: int) -> list[tuple[Line, Box]]:
    """Sentences broken into lines that fill the column's width."""
    glyphs, drawn, rest = sheet.glyphs(), [], []
    space = glyphs.width(" ")
    while len(drawn) < most and flow.fits(glyphs.height):
        text, width = "", 0
        while True:
            if not rest:
                rest = content.sentence(sheet.dice).split()
            wide = glyphs.width(rest[0])
            if text and width + space + wide > flow.box.width:
                break
            word = rest.pop(0)
            if wide > flow.box.width:
                continue
            text, width = (f"{text} {word}", width + space + wide) if text else (word, wide)
        written = flow.write(text)
        if written is None:
            break
        drawn.append(written)
    return drawn


def _list(sheet: Sheet, flow: Flow, sign) -> None:
    make = sheet.dice.pick((content.phrase, content.goods, content.sentence, content.token, content.person))
    indent = sheet.glyphs().width(sign(20)) + sheet.em / 2
    items = Flow(sheet, Box(flow.box.x0 + indent, flow.y, flow.box.x1, flow.box.y1), flow.leading)
    drawn = []
    for number in range(1, sheet.dice.whole(2, MOST) + 1):
        y = items.y
        written = items.write(make)
        if written is None:
            break
        # The sign shares its line's size, which may have shrunk to fit
        sheet.page.text(flow.box.x0, y, sign(number), written[0].glyphs, sheet.style.ink)
        drawn.append(written)
    _ask_lines(sheet, drawn, READ_ITEM)
    if drawn:
        sheet.ask("count", ("How many items does the list have?", "How many items are listed?"), str(len(drawn)))
        sheet.ground("the list", around([box for _, box in drawn]))


def _ask_lines(sheet: Sheet, drawn: list[tuple[Line, Box]], phrasings: tuple[str, ...]) -> None:
    """By number where a line can still be counted, by the line before where that is unique."""
    texts = [line.text for line, _ in drawn]
    for number, (line, box) in enumerate(drawn[:12], 1):
        sheet.ask("transcribe", phrasings, line.text, box, number=str(number))
    for (line, _), (below, box) in itertools.pairwise(drawn):
        if texts.count(line.text) == 1 and len(line.text) < 60:
            asked = ('Which line comes after "{line}"?', 'What stands below "{line}"?')
            sheet.ask("label", asked, below.text, box, line=line.text)
    for line, box in sheet.dice.sample(drawn, 2):
        if texts.count(line.text) == 1:
            sheet.ground(f'the line "{line.text}"', box)
    if len(drawn) > 1:
        sheet.ask("field", ("Read the last line.", "What does the last line say?"), drawn[-1][0].text, drawn[-1][1])


def _about(sheet: Sheet, title: tuple[Line, Box] | None, what: str) -> None:
    if title is None:
        sheet.caption(f"A {what} without a title.")
        return
    sheet.ask("field", READ_TITLE, title[0].text, title[1])
    sheet.ground("the title", title[1])
    sheet.caption(f'A {what} titled "{title[0].text}".')


SEEN = {"paragraph": paragraph, "bullets": bullets, "numbered": numbered, "letter": letter}
UNSEEN = {"columns": columns}
