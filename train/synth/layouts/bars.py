"""Bar charts."""

from dataclasses import dataclass

from train.synth import content
from train.synth.layouts import axes
from train.synth.layouts.axes import Scale
from train.synth.layouts.parts import disc
from train.synth.page import Box, Colour
from train.synth.questions import Entry, Series
from train.synth.sheet import Flow, Line, Sheet

EMS, MOST_EMS, DARK = 12, 110, 0.15
MOST = 12  # bars
LOOKUP = (
    "What is the value of {name}?",
    "How much is {name}?",
    "What number does the bar {name} show?",
    "Value of {name}?",
)
HIGHEST = ("Which bar is highest?", "Which bar is the tallest?", "What has the largest value?")
LOWEST = ("Which bar is lowest?", "Which bar is the shortest?", "What has the smallest value?")
LONGEST = ("Which bar is longest?", "What has the largest value?")
SHORTEST = ("Which bar is shortest?", "What has the smallest value?")


@dataclass(frozen=True)
class Look:
    """numbers: values printed at the bars' ends. scale: numbers along the axis. stems: thin lines that end in discs."""

    numbers: bool
    scale: bool
    colourful: bool = False
    stems: bool = False


def upright(sheet: Sheet) -> None:
    """Bars that stand, their values above them."""
    _upright(sheet, Look(numbers=True, scale=sheet.dice.chance(0.4)))


def scaled(sheet: Sheet) -> None:
    """Bars that stand on a grid, which their values are read off."""
    _upright(sheet, Look(numbers=False, scale=True, colourful=sheet.dice.chance(0.5)))


def level(sheet: Sheet) -> None:
    """Bars that lie, names at the left, values at their ends or on a scale below."""
    numbers = sheet.dice.chance(0.6)
    _level(sheet, Look(numbers, not numbers, sheet.dice.chance(0.4)))


def grouped(sheet: Sheet) -> None:
    """Two bars to each name, told apart by a legend."""
    flow, title = axes.start(sheet)
    dice = sheet.dice
    kinds = axes.names(dice, 2, ordered=False)
    colours = axes.palette(sheet, 2)
    _legend(sheet, flow, kinds, colours)
    count = max(2, min(6, int(flow.box.width / sheet.em / 5)))
    labels = axes.names(dice, dice.whole(2, count), dice.chance(0.3))
    plot, slots, names, scale, ticks = _stand(sheet, flow, labels, True)
    if plot is None:
        return
    for kind, (label, colour) in enumerate(zip(kinds, colours, strict=True)):
        shown, entries = axes.values(dice, scale, len(names), True), []
        for (x0, x1), (name, name_box), value in zip(slots, names, shown, strict=True):
            middle, side = (x0 + x1) / 2, (x1 - x0) * 0.4
            left = middle - side if kind == 0 else middle
            bar = Box(left, plot.y1 - plot.height * value / scale.top, left + side, plot.y1)
            sheet.page.rectangle(bar, colour)
            entries.append(Entry(name, str(value), value, bar, name_box, ticks[value]))
        lookup = (f"What is the value of {label} for {{name}}?", f"How much is {label} in {{name}}?")
        most, least = (f"Where is {label} highest?",), (f"Where is {label} lowest?",)
        where = f"the bar of {label} for {{name}}"
        sheet.series.append(Series("groups of bars", lookup, most, least, where, tuple(entries), counted=kind == 0))
    _about(sheet, title, plot)


def stems(sheet: Sheet) -> None:
    """Thin stems that end in discs, lying or standing."""
    look = Look(numbers=True, scale=False, stems=True)
    (_upright if sheet.dice.chance(0.5) else _level)(sheet, look)


def _upright(sheet: Sheet, look: Look) -> None:
    flow, title = axes.start(sheet)
    if sheet.dice.chance(0.5):
        axes.measure(sheet, flow)
    dice = sheet.dice
    count = max(2, min(MOST, int(flow.box.width / sheet.em / 4.5)))
    labels = axes.names(dice, dice.whole(min(3, count), count), dice.chance(0.4))
    plot, slots, names, scale, ticks = _stand(sheet, flow, labels, look.scale)
    if plot is None:
        return
    head = sheet.height("small") * 1.2 + look.stems * _radius(sheet, slots[0][1] - slots[0][0]) if look.numbers else 0
    values = axes.values(dice, scale, len(names), not look.numbers, 1 - head / plot.height)
    colours = axes.palette(sheet, 7) if look.colourful else axes.palette(sheet, 1)
    entries = []
    for at, ((x0, x1), (name, name_box), value) in enumerate(zip(slots, names, values, strict=True)):
        inset = (x1 - x0) * 0.18
        bar = Box(x0 + inset, plot.y1 - plot.height * value / scale.top, x1 - inset, plot.y1)
        _bar(sheet, bar, colours[at % len(colours)], look, lying=False)
        text_box = ticks.get(value)
        if look.numbers:
            line = sheet.fit(str(value), x1 - x0, "small")
            if line is None:
                text_box = None
            else:
                text_box = sheet.put(
                    line, x0, bar.y0 - line.height - look.stems * _radius(sheet, x1 - x0), x1 - x0, "centre"
                )
        entries.append(Entry(name, str(value) if text_box else "", value, bar, name_box, text_box))
    _note(sheet, entries, title, plot, HIGHEST, LOWEST)


def _level(sheet: Sheet, look: Look) -> None:
    flow, title = axes.start(sheet)
    dice = sheet.dice
    rows = max(2, min(MOST, int((flow.left - sheet.height("small") * 1.5) / sheet.height() / 1.4)))
    fitted = [sheet.fit(name, flow.box.width * 0.4) for name in axes.names(dice, dice.whole(min(3, rows), rows), False)]
    lines = [line for line in fitted if line is not None]
    if not lines or flow.left < sheet.height() * 2:
        return
    left = flow.box.x0 + max(line.width for line in lines) + sheet.em * 0.5
    scale = axes.draw_scale(dice, (flow.box.x1 - left) * 0.9, sheet.style.small * 4)
    area = Box(left, flow.y, flow.box.x1, flow.box.y1)
    if look.scale:
        plot, ticks = axes.level_scale(sheet, area, scale, True)
    else:
        plot, ticks = area, {}
        sheet.page.vertical(plot.x0, plot.y0, plot.y1, sheet.style.muted)
    tail = sheet.line(f" {scale.top}0", "small").width if look.numbers else 0
    values = axes.values(dice, scale, len(lines), not look.numbers)
    colours = axes.palette(sheet, 7) if look.colourful else axes.palette(sheet, 1)
    pitch, entries = plot.height / len(lines), []
    for at, (line, value) in enumerate(zip(lines, values, strict=True)):
        middle = plot.y0 + pitch * (at + 0.5)
        thick = min(pitch * 0.7, sheet.em * 3)
        bar = Box(plot.x0, middle - thick / 2, plot.x0 + (plot.width - tail) * value / scale.top, middle + thick / 2)
        _bar(sheet, bar, colours[at % len(colours)], look, lying=True)
        name_box = sheet.put(line, flow.box.x0, middle - line.height / 2, left - flow.box.x0 - sheet.em * 0.5, "right")
        text_box = ticks.get(value)
        if look.numbers:
            number = sheet.line(str(value), "small")
            reach = look.stems * _radius(sheet, thick)
            text_box = sheet.put(number, bar.x1 + sheet.em * 0.25 + reach, middle - number.height / 2)
        entries.append(Entry(line.text, str(value) if text_box else "", value, bar, name_box, text_box))
    _note(sheet, entries, title, plot, LONGEST, SHORTEST)


def _stand(sheet: Sheet, flow: Flow, labels: list[str], scaled: bool):
    """(plot, slots, names, scale, ticks): a plot over a row of names, each slot with the names that fitted it.

    The plot is None where the page is too low.
    """
    low = sheet.height("small") * 1.3
    area = Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1 - low)
    if area.height < sheet.em * 2:
        return None, [], [], None, {}
    scale: Scale = axes.draw_scale(sheet.dice, area.height, sheet.height("small") * 1.4)
    if scaled:
        plot, ticks = axes.vertical_scale(sheet, area, scale, sheet.dice.chance(0.8))
    else:
        plot, ticks = area, {}
        sheet.page.horizontal(plot.x0, plot.x1, plot.y1, sheet.style.ink)
    width = plot.width / len(labels)
    slots, names = [], []
    for at, label in enumerate(labels):
        x0 = plot.x0 + at * width
        line = sheet.fit(label, width - sheet.em * 0.3, "small") or sheet.fit(content.short_code, width, "small")
        if line is None or any(line.text == name for name, _ in names):
            continue
        slots.append((x0, x0 + width))
        names.append((line.text, sheet.put(line, x0, plot.y1 + low * 0.15, width, "centre")))
    return (plot if names else None), slots, names, scale, ticks


def _bar(sheet: Sheet, bar: Box, colour: Colour, look: Look, lying: bool) -> None:
    if not look.stems:
        sheet.page.rectangle(bar, colour)
        return
    side = 2 * _radius(sheet, bar.height if lying else bar.width)
    x, y = (bar.x1, (bar.y0 + bar.y1) / 2) if lying else ((bar.x0 + bar.x1) / 2, bar.y0)
    width = max(2, round(side / 6))
    if lying:
        sheet.page.horizontal(bar.x0, bar.x1, y - width / 2, colour, width)
    else:
        sheet.page.vertical(x - width / 2, bar.y0, bar.y1, colour, width)
    disc(sheet, Box(x - side / 2, y - side / 2, x + side / 2, y + side / 2), colour)


def _radius(sheet: Sheet, thick: float) -> float:
    """Of the disc at the end of a stem, in a place `thick` pixels wide."""
    return min(0.3 * thick, 0.9 * sheet.em)


def _legend(sheet: Sheet, flow: Flow, kinds: list[str], colours: list[Colour]) -> None:
    x, glyphs = flow.box.x0, sheet.glyphs("small")
    side = round(glyphs.size * 0.8)
    for kind, colour in zip(kinds, colours, strict=True):
        line = Line(kind, glyphs, glyphs.width(kind))
        if x + side * 1.5 + line.width > flow.box.x1:  # the second below the first
            x = flow.box.x0
            flow.skip(glyphs.height)
        y = flow.y + (glyphs.height - side) / 2
        square = Box(x, y, x + side, y + side)
        sheet.page.rectangle(square, colour)
        box = sheet.put(line, x + side * 1.5, flow.y)
        sheet.ground(f"the legend of {kind}", square | box)
        x += side * 1.5 + line.width + sheet.em
    flow.skip(glyphs.height * 1.2)


def _note(sheet: Sheet, entries: list[Entry], title, plot: Box, most: tuple[str, ...], least: tuple[str, ...]) -> None:
    sheet.series.append(Series("bars", LOOKUP, most, least, "the bar of {name}", tuple(entries)))
    ends = (("first", entries[0]), ("last", entries[-1]))
    for which, entry in ends if len(entries) > 1 else ():
        asked = (f"What is the {which} bar called?", f"What does the {which} bar stand for?")
        sheet.ask("field", asked, entry.name, entry.name_box)
    _about(sheet, title, plot)


def _about(sheet: Sheet, title: str | None, plot: Box) -> None:
    sheet.ground("the chart", plot)
    sheet.caption(f'A bar chart titled "{title}".' if title else "A bar chart.")


SEEN = {"upright": upright, "scaled": scaled, "level": level, "grouped": grouped}
UNSEEN = {"stems": stems}
