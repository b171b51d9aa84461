"""Large figures, about one to a visual token: counters, boards, boxes of a form. What can be asked about first.

Digits are tokens of their own for the language model. Where a cell of the encoder's grid holds one of them, the cell
can stand for that very token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from train.synth import content
from train.synth.content import Dice, Maker
from train.synth.layouts.parts import disc
from train.synth.page import BLACK, Box, Colour
from train.synth.shapes import polygon_mask
from train.synth.sheet import TRIES, Line, Sheet
from train.synth.style import ink_on, mix

EMS, MOST_EMS, DARK = 4, 40, 0.2
ROWS = 5
READ_ALL = ("Read the page.", "Read everything on the page.", "Transcribe the page.")
READ_ONE = ("Read the number.", "What number is shown?", "What does it show?")
TOP = ("Read the top number.", "What stands at the top?", "What is the first number?")
BOTTOM = ("Read the bottom number.", "What stands at the bottom?", "What is the last number?")


def _price(dice: Dice) -> str:
    return f"{content.cents(dice, 200) / 100:.2f}"


def _day(dice: Dice) -> str:
    return f"{dice.whole(1, 28):02d}{dice.pick('./-')}{dice.whole(1, 12):02d}"


def _clock(dice: Dice) -> str:
    return f"{dice.whole(0, 23):02d}:{dice.whole(0, 59):02d}"


def _count(dice: Dice) -> str:
    return str(dice.whole(1, 10 ** dice.whole(1, 5) - 1))


def _place(dice: Dice) -> str:
    return f"{dice.pick(content.LETTERS)}{dice.whole(1, 99)}" if dice.chance(0.5) else str(dice.whole(1, 399))


def _digits(dice: Dice) -> str:
    return "".join(str(dice.whole(0, 9)) for _ in range(dice.whole(3, 6)))


LABELS: tuple[tuple[Maker, tuple[str, ...]], ...] = (
    (_price, ("Total", "Tax", "Tip", "Cash", "Change", "Price", "Discount", "Balance")),
    (_day, ("Date", "Due", "Issued", "Valid")),
    (_clock, ("Time", "Start", "End", "Open", "Closed", "Arrival")),
    (_place, ("Room", "Gate", "Seat", "Bus", "Line", "Platform", "Table", "Floor")),
    (_count, ("Score", "Points", "Pages", "Items", "Stock", "Weight", "Speed", "Steps")),
    (_digits, ("Code", "Order", "Number", "PIN", "Member", "Ticket")),
    (lambda dice: f"{dice.whole(1, 99)}%", ("Battery", "Humidity", "Off", "Share")),
)


@dataclass(frozen=True)
class Row:
    """A number to be drawn into `box`, a slot of `pitch` pixels for each of its characters."""

    text: str
    box: Box
    pitch: float
    size: int


Draw = Callable[[Sheet, Row], Box]
Printed = tuple[str, Box]


def boxed(sheet: Sheet) -> None:
    """A box for each character, as on a form."""
    _rows(sheet, _boxes)


def display(sheet: Sheet) -> None:
    """Light figures on a dark panel."""
    panel, ink = (
        mix(sheet.style.accent, BLACK, 0.7),
        sheet.dice.pick(((255, 190, 60), (120, 255, 140), (255, 255, 255))),
    )

    def draw(sheet: Sheet, row: Row) -> Box:
        sheet.page.rectangle(row.box, panel)
        return _spread(sheet, row, ink)

    _rows(sheet, draw)


def spaced(sheet: Sheet) -> None:
    """Nothing but the figures, widely spaced."""
    _rows(sheet, _spread)


def tiles(sheet: Sheet) -> None:
    """A coloured tile for each character."""
    whole = sheet.dice.whole
    colour: Colour = (whole(0, 255), whole(0, 255), whole(0, 255))

    def draw(sheet: Sheet, row: Row) -> Box:
        for slot in _slots(row):
            sheet.page.rectangle(slot.padded(-max(1, row.pitch * 0.04)), colour)
        return _spread(sheet, row, ink_on(colour))

    _rows(sheet, draw)


def badges(sheet: Sheet) -> None:
    """A polygon for each character, turned any way: signs, hexagonal tiles, buttons."""
    dice = sheet.dice
    colour: Colour = (dice.whole(0, 255), dice.whole(0, 255), dice.whole(0, 255))
    count, turn = dice.whole(4, 6), dice.uniform(0, 2 * math.pi)

    def draw(sheet: Sheet, row: Row) -> Box:
        side = round(row.box.height)
        angles = [turn + 2 * math.pi * corner / count for corner in range(count)]
        corners = [(side / 2 * (1 + math.cos(angle)), side / 2 * (1 + math.sin(angle))) for angle in angles]
        mask = polygon_mask(side, side, corners)
        for slot in _slots(row):
            sheet.page.mask((slot.x0 + slot.x1 - side) / 2, (slot.y0 + slot.y1 - side) / 2, mask, colour)
        return _spread(sheet, row, ink_on(colour))

    _rows(sheet, draw)


def discs(sheet: Sheet) -> None:
    """A disc for each character, as balls of a lottery."""
    colour = sheet.style.accent

    def draw(sheet: Sheet, row: Row) -> Box:
        for slot in _slots(row):
            middle, radius = (slot.y0 + slot.y1) / 2, min(row.pitch, slot.height) / 2
            across = (slot.x0 + slot.x1) / 2
            disc(sheet, Box(across - radius, middle - radius, across + radius, middle + radius), colour)
        return _spread(sheet, row, ink_on(colour))

    _rows(sheet, draw)


def grid(sheet: Sheet) -> None:
    """A page full of them."""
    _grid(sheet, _spread)


def keypad(sheet: Sheet) -> None:
    """A page full of boxes with one each."""
    _grid(sheet, _boxes)


def _grid(sheet: Sheet, draw: Draw) -> None:
    dice, page, drawn = sheet.dice, sheet.page, []
    size = dice.pick([size for size in sheet.sizes if size >= 0.5 * sheet.sizes[-1]])
    pitch = max(size, 0.8 * sheet.sizes[-1]) * dice.uniform(1.35, 1.7)
    height = max(sheet.glyphs("bold", size).height, 0.95 * pitch)
    x, y = dice.uniform(0, 0.5) * pitch, dice.uniform(0, 0.4) * pitch
    while y + height <= page.height:
        room = int((page.width - x) / pitch)
        text = "".join(_character(dice) for _ in range(dice.whole(max(1, room - 2), room)))
        box = draw(sheet, Row(text, Box(x, y, x + pitch * len(text), y + height), pitch, size))
        drawn.append(((text, box), (text, box)))
        y += height * dice.uniform(1.0, 1.2)
    _ask(sheet, drawn)


def _character(dice: Dice) -> str:
    return str(dice.whole(0, 9)) if dice.chance(0.85) else dice.pick(content.LETTERS + ".:/-%")


def _rows(sheet: Sheet, draw: Draw) -> None:
    """Numbers one below the other, most of them with a label above."""
    dice, page = sheet.dice, sheet.page
    y, drawn = page.height * dice.uniform(0.01, 0.06), []
    for _ in range(dice.whole(2, max(ROWS, page.height // 64))):
        size = dice.pick([size for size in sheet.sizes if size >= 0.8 * sheet.sizes[-1]])
        pitch, height = size * dice.uniform(1.35, 1.7), sheet.glyphs("bold", size).height
        make, names = dice.pick(LABELS)
        x = dice.uniform(0.02, 0.12) * page.width
        text = _fitting(dice, make, int((page.width - x) / pitch))
        label = _label(sheet, dice.pick(names)) if dice.chance(0.8) else None
        top = y + (label.height * 1.1 if label else 0)
        if text is None or top + height > page.height * 0.98:
            continue
        x += dice.uniform(0, max(0, page.width * 0.98 - x - pitch * len(text)))
        label_box = sheet.put(label, min(x, page.width - label.width), y) if label else None
        box = draw(sheet, Row(text, Box(x, top, x + pitch * len(text), top + height), pitch, size))
        written = Line(text, sheet.glyphs("bold", size), 0)
        if label:
            sheet.fact(label.text if label.text.isupper() else label.text.lower(), written, box, label.text, label_box)
        whole = (f"{label.text} {text}", box | label_box) if label else (text, box)
        drawn.append(((text, box), whole))
        y = top + height * dice.uniform(1.1, 1.4)
    _ask(sheet, drawn)


def _fitting(dice: Dice, make: Maker, most: int) -> str | None:
    texts = (make(dice) for _ in range(TRIES))
    return next((text for text in texts if len(text) <= most), None)


def _label(sheet: Sheet, name: str) -> Line | None:
    """In text of about half the figures' size."""
    sizes = [size for size in sheet.sizes if size <= 0.55 * sheet.sizes[-1]] or sheet.sizes[:1]
    drawn = sheet.glyphs("body", sheet.dice.pick(sizes))
    width = drawn.width(name)
    return Line(name, drawn, width) if width < 0.9 * sheet.page.width else None


def _slots(row: Row) -> list[Box]:
    lefts = [row.box.x0 + at * row.pitch for at in range(len(row.text))]
    return [Box(left, row.box.y0, left + row.pitch, row.box.y1) for left in lefts]


def _spread(sheet: Sheet, row: Row, colour: Colour | None = None) -> Box:
    """Each character in the middle of its slot."""
    glyphs = sheet.glyphs("bold", row.size)
    sheet.printed.append(row.text)
    ink = None
    for character, slot in zip(row.text, _slots(row), strict=True):
        x = slot.x0 + (row.pitch - glyphs.width(character)) / 2
        box = sheet.page.text(x, slot.y0, character, glyphs, colour or sheet.style.ink)
        ink = box if ink is None else ink | box
    return ink


def _boxes(sheet: Sheet, row: Row) -> Box:
    for slot in _slots(row):
        sheet.page.rectangle(slot.padded(-1), sheet.style.muted, max(1, round(row.pitch / 30)))
    return _spread(sheet, row)


def _ask(sheet: Sheet, drawn: list[tuple[Printed, Printed]]) -> None:
    """drawn: from the top, numbers without and with their labels."""
    if not drawn:
        return
    numbers, rows = zip(*drawn, strict=True)
    whole = rows[0][1]
    for _, box in rows:
        whole = whole | box
    if len(rows) <= ROWS:
        sheet.ask("transcribe", READ_ALL, " ".join(text for text, _ in rows), whole)
    for text, box in numbers:
        sheet.ground(f'the number "{text}"', box)
    if len(drawn) == 1:
        sheet.ask("field", READ_ONE, *numbers[0])
        return
    sheet.ask("field", TOP, *numbers[0])
    sheet.ask("field", BOTTOM, *numbers[-1])
    sheet.ask("count", ("How many numbers are on the page?", "How many numbers do you see?"), str(len(drawn)))


SEEN = {
    "boxed": boxed,
    "display": display,
    "spaced": spaced,
    "tiles": tiles,
    "badges": badges,
    "grid": grid,
    "keypad": keypad,
}
UNSEEN = {"discs": discs}
