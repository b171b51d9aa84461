"""Pieces that several layouts are made of."""

from train.synth.content import Maker
from train.synth.fields import Field
from train.synth.page import Box, Colour
from train.synth.shapes import disc_mask
from train.synth.sheet import Line, Sheet
from train.synth.style import mix


def margin(sheet: Sheet) -> float:
    """A page's margin in pixels."""
    return max(sheet.em * 0.4, sheet.dice.uniform(0.02, 0.06) * min(sheet.page.width, sheet.page.height))


def strip(sheet: Sheet, ems: tuple[float, float]) -> Box:
    """A strip of paper, as wide as `ems` allows, lying on a table where it leaves room; returns its inner box."""
    width = sheet.dice.uniform(*ems) * sheet.em
    if width > 0.85 * sheet.page.width:
        return sheet.box.padded(-margin(sheet))
    x = sheet.dice.uniform(0, sheet.page.width - width)
    paper = Box(x, 0, x + width, sheet.page.height)
    ground = mix(sheet.style.accent, sheet.style.paper, sheet.dice.uniform(0.2, 0.8))
    sheet.page.rectangle(sheet.box, ground)
    sheet.page.rectangle(paper, sheet.style.paper)
    return paper.padded(-sheet.em * 0.7)


def pair(
    sheet: Sheet,
    field: Field,
    box: Box,
    value_x: float | None = None,
    align: str = "left",
    role: str = "body",
    colon: str = ":",
    value: Maker | str | None = None,
) -> Box | None:
    """Label and value in one line at the top of `box`; the value from `value_x`, or behind the label, or at the right.

    None, and nothing drawn, where they do not fit; otherwise the box around both.
    """
    gap = sheet.em * 0.5
    name = sheet.dice.pick(field.labels)
    label = sheet.fit(name + colon, (box.width - gap) * 0.62, role)
    if label is None or label.height > box.height:
        return None
    start = max(box.x0 + label.width + gap, value_x or 0)
    written = sheet.fit(value or field.make, box.x1 - start, role)
    if written is None or not written.text or written.height > box.height:
        return None
    label_box = sheet.put(label, box.x0, box.y0)
    value_box = sheet.put(written, start, box.y0 + _drop(label, written), box.x1 - start, align)
    sheet.fact(field.name, written, value_box, name, label_box, field.kind)
    return label_box | value_box


def logo(sheet: Sheet, box: Box) -> None:
    """A mark of simple shapes in the accent colour."""
    colour: Colour = sheet.style.accent
    shape = sheet.dice.whole(0, 3)
    if shape == 0:
        sheet.page.rectangle(box, colour)
        sheet.page.rectangle(box.padded(-box.width * 0.3), sheet.style.paper)
    elif shape == 1:
        sheet.page.rectangle(box, colour)
        sheet.page.rectangle(Box(box.x0, box.y0, box.x0 + box.width / 2, box.y0 + box.height / 2), sheet.style.tint)
    elif shape == 2:
        disc(sheet, box, colour)
    else:
        disc(sheet, box, colour)
        disc(sheet, box.padded(-box.width * 0.25), sheet.style.paper)
    sheet.ground("the logo", box)


def disc(sheet: Sheet, box: Box, colour: Colour) -> None:
    """The largest disc about the box's centre."""
    side = max(1, round(min(box.width, box.height)))
    x, y = (box.x0 + box.x1 - side) / 2, (box.y0 + box.y1 - side) / 2
    sheet.page.mask(x, y, disc_mask(side), colour)


def around(boxes: list[Box]) -> Box:
    whole = boxes[0]
    for box in boxes[1:]:
        whole = whole | box
    return whole


def _drop(line: Line, smaller: Line) -> float:
    """How much lower a smaller line starts to stand on the other's baseline, about."""
    return 0.8 * (line.height - smaller.height)
