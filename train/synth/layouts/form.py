"""Filled-in forms."""

from train.synth import content, fields, words
from train.synth.fields import Field
from train.synth.layouts.parts import margin, pair
from train.synth.page import Box
from train.synth.shapes import stroke_mask
from train.synth.sheet import Flow, Sheet

EMS, MOST_EMS, DARK = 12, 110, 0.02
MOST = 24  # fields
TITLES = (
    "Registration",
    "Application",
    "Personal data",
    "Membership form",
    "Visitor form",
    "Questionnaire",
    "Order form",
)
BOXES = (
    "Newsletter",
    "I agree",
    "Urgent",
    "Married",
    "Student",
    "First visit",
    "Smoker",
    "Driver",
    "Vegetarian",
    "Copy",
)


def dotted(sheet: Sheet) -> None:
    """Labels at the left, values on lines beside them."""
    flow, title = _start(sheet)
    colon = sheet.dice.pick((":", ""))
    for column, held in _columns(sheet, flow, 16, 1.5):
        start = column.box.x0 + column.box.width * sheet.dice.uniform(0.35, 0.5)
        for field in held:
            area = Box(column.box.x0, column.y, column.box.x1, column.box.y1 - 2)
            box = pair(sheet, field, area, start, colon=colon)
            if box is not None:
                y = column.y + sheet.height() + 1
                sheet.page.horizontal(sheet.facts[-1].box.x0, column.box.x1, y, sheet.style.muted)
                column.skip(round(sheet.height() * 1.5))
    _finish(sheet, title)


def boxed(sheet: Sheet) -> None:
    """A label above each box that holds the value."""
    flow, title = _start(sheet)
    for column, held in _columns(sheet, flow, 11, 3.1):
        for field in held:
            _labelled_box(sheet, column, field)
    _finish(sheet, title)


def grid(sheet: Sheet) -> None:
    """A ruled table of two columns, labels in shaded cells."""
    flow, title = _start(sheet)
    pad = sheet.em * 0.4
    height = round(sheet.height() + 2 * pad)
    for column, held in _columns(sheet, flow, 18, height / sheet.height()):
        share = sheet.dice.uniform(0.38, 0.5)
        for field in held:
            row = Box(column.box.x0, column.y, column.box.x1, column.y + height)
            if column.fits(height) and _cells(sheet, field, row, share, pad):
                column.skip(height - 1)
    _finish(sheet, title)


def ticked(sheet: Sheet) -> None:
    """A few fields, and boxes to tick."""
    flow, title = _start(sheet)
    room = int(flow.left / sheet.height() / 1.5)
    for field in fields.drawn(sheet.dice, fields.FORM, min(room // 2, sheet.dice.whole(1, 10))):
        if pair(sheet, field, Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1)):
            flow.skip(round(sheet.height() * 1.4))
    flow.skip(sheet.em * 0.4)
    _tick_boxes(sheet, flow)
    _finish(sheet, title, counted=False)  # a tick box is a field, too


def below(sheet: Sheet) -> None:
    """Values over a line, small labels below it."""
    flow, title = _start(sheet)
    for column, held in _columns(sheet, flow, 12, 3.0):
        for field in held:
            _label_below(sheet, column, field)
    _finish(sheet, title)


def _start(sheet: Sheet) -> tuple[Flow, str | None]:
    """The heading, and what is left below it."""
    flow = Flow(sheet, sheet.box.padded(-margin(sheet)))
    dice = sheet.dice
    make = dice.pick((lambda dice: dice.pick(TITLES), content.heading, content.company))
    written = flow.write(make, "large", dice.pick(("left", "centre")), sheet.style.strong)
    flow.skip(sheet.em * 0.4)
    if written is None:
        return flow, None
    sheet.ask("field", ("What is the title of the form?", "Read the heading."), written[0].text, written[1])
    sheet.ground("the heading", written[1])
    return flow, written[0].text


def _columns(sheet: Sheet, flow: Flow, ems: float, pitch: float) -> list[tuple[Flow, list[Field]]]:
    """The rest of the page as one column, or as two where each is at least `ems` text sizes wide, with their fields.

    pitch: of the fields, in heights of a line.
    """
    gap = sheet.em * 1.5
    count = 2 if flow.box.width > 2 * ems * sheet.em + gap and sheet.dice.chance(0.6) else 1
    width = (flow.box.width - gap * (count - 1)) / count
    rows = max(1, min(int(flow.left / (pitch * sheet.height())), sheet.dice.whole(3, MOST // count)))
    held = fields.drawn(sheet.dice, fields.FORM, rows * count)
    columns = []
    for at in range(count):
        left = flow.box.x0 + at * (width + gap)
        columns.append((Flow(sheet, Box(left, flow.y, left + width, flow.box.y1)), held[at::count]))
    return columns


def _labelled_box(sheet: Sheet, column: Flow, field: Field) -> None:
    """A label in small text, below it a frame with the value."""
    pad = round(sheet.em * 0.35)
    label = sheet.fit(sheet.dice.pick(field.labels), column.box.width, "small")
    value = sheet.fit(field.make, column.box.width - 2 * pad)
    if label is None or value is None or not column.fits(label.height + value.height + 3 * pad):
        return
    label_box = sheet.put(label, column.box.x0, column.y)
    top = column.y + label.height
    frame = Box(column.box.x0, top, column.box.x1, top + value.height + 2 * pad)
    sheet.page.rectangle(frame, sheet.style.muted, max(1, sheet.em // 16))
    value_box = sheet.put(value, frame.x0 + pad, top + pad)
    sheet.fact(field.name, value, value_box, label.text, label_box, field.kind)
    sheet.ground(f'the box labelled "{label.text}"', frame)
    column.skip(label.height + frame.height + pad)


def _cells(sheet: Sheet, field: Field, row: Box, share: float, pad: float) -> bool:
    """A ruled row: the label in a shaded cell, the value beside it."""
    middle = row.x0 + row.width * share
    label = sheet.fit(sheet.dice.pick(field.labels), middle - row.x0 - 2 * pad)
    value = sheet.fit(field.make, row.x1 - middle - 2 * pad)
    if label is None or value is None:
        return False
    sheet.page.rectangle(Box(row.x0, row.y0, middle, row.y1), sheet.style.tint)
    sheet.page.rectangle(row, sheet.style.muted, 1)
    sheet.page.vertical(middle, row.y0, row.y1, sheet.style.muted)
    label_box, value_box = sheet.put(label, row.x0 + pad, row.y0 + pad), sheet.put(value, middle + pad, row.y0 + pad)
    sheet.fact(field.name, value, value_box, label.text, label_box, field.kind)
    return True


def _label_below(sheet: Sheet, column: Flow, field: Field) -> None:
    label = sheet.fit(sheet.dice.pick(field.labels), column.box.width, "small")
    value = sheet.fit(field.make, column.box.width)
    if label is None or value is None or not column.fits(label.height + value.height + 4):
        return
    value_box = sheet.put(value, column.box.x0, column.y)
    line = column.y + value.height + 1
    sheet.page.horizontal(column.box.x0, column.box.x1, line, sheet.style.muted)
    label_box = sheet.put(label, column.box.x0, line + 2)
    sheet.fact(field.name, value, value_box, label.text, label_box, field.kind)
    column.skip(value.height + label.height + 4 + sheet.em * 0.4)


def _tick_boxes(sheet: Sheet, flow: Flow) -> None:
    """Named boxes, some of them ticked."""
    dice, side = sheet.dice, round(sheet.em * 0.8)
    names = dice.sample(BOXES, 5) + [dice.pick(words.NOUNS).capitalize() for _ in range(3)]
    ticked, drawn = [], []
    for name in dict.fromkeys(dice.sample(names, dice.whole(2, 8))):
        line = sheet.fit(name, flow.box.width - side * 2)
        if line is None or not flow.fits(line.height):
            continue
        y = flow.y + (line.height - side) / 2
        square = Box(flow.box.x0, y, flow.box.x0 + side, y + side)
        sheet.page.rectangle(square, sheet.style.ink, max(1, side // 12))
        box = sheet.put(line, flow.box.x0 + side * 1.6, flow.y)
        marked = dice.chance(0.5)
        if marked:
            _tick(sheet, square)
            ticked.append(name)
        drawn.append(name)
        asked = ('Is "{name}" ticked?', 'Is the box "{name}" checked?')
        sheet.ask("compare", asked, "Yes" if marked else "No", square, name=name)
        sheet.ground(f'the tick box "{name}"', square | box)
        flow.skip(round(line.height * 1.15))
    if drawn:
        sheet.ask("count", ("How many boxes are ticked?", "How many boxes are checked?"), str(len(ticked)))
        sheet.ask("count", ("How many tick boxes are there?",), str(len(drawn)))


def _tick(sheet: Sheet, square: Box) -> None:
    """A cross, or a filled square."""
    side = round(square.width)
    inner = square.padded(-max(2, side * 0.22))
    if sheet.dice.chance(0.4) or inner.width < 5:
        sheet.page.rectangle(inner, sheet.style.ink)
        return
    edge, far = side * 0.2, side * 0.8
    for start, end in (((edge, edge), (far, far)), ((edge, far), (far, edge))):
        sheet.page.mask(square.x0, square.y0, stroke_mask(side, side, [start, end], max(1, side / 9)), sheet.style.ink)


def _finish(sheet: Sheet, title: str | None, counted: bool = True) -> None:
    if sheet.facts and counted:
        asked = ("How many fields are filled in?", "How many fields does the form have?")
        sheet.ask("count", asked, str(len(sheet.facts)))
    sheet.caption(f'A form titled "{title}".' if title else "A form.")


SEEN = {"dotted": dotted, "boxed": boxed, "grid": grid, "ticked": ticked}
UNSEEN = {"below": below}
