"""Line charts."""

from collections.abc import Callable
from dataclasses import dataclass

from train.synth.content import Dice
from train.synth.layouts import axes
from train.synth.layouts.axes import Scale
from train.synth.layouts.parts import disc
from train.synth.page import Box, Colour
from train.synth.questions import Entry, Series
from train.synth.shapes import polygon_mask, stroke_mask
from train.synth.sheet import Line, Sheet
from train.synth.style import mix

EMS, MOST_EMS, DARK = 12, 110, 0.15
MOST = 12  # points
LOOKUP = ("What is the value for {name}?", "How much is it in {name}?", "What does the line show at {name}?")
HIGHEST = ("Where is the line highest?", "When is the maximum?", "At which point is the largest value?")
LOWEST = ("Where is the line lowest?", "When is the minimum?", "At which point is the smallest value?")
Point = tuple[float, float]


def marked(sheet: Sheet) -> None:
    """A disc and a number at every point."""
    _chart(sheet, _marks, numbers=True)


def gridded(sheet: Sheet) -> None:
    """Points on the lines of a grid, which their values are read off."""
    _chart(sheet, _marks, numbers=False)


def filled(sheet: Sheet) -> None:
    """The area below the line in a lighter colour."""
    _chart(sheet, _area, numbers=sheet.dice.chance(0.5))


def double(sheet: Sheet) -> None:
    """Two lines, named where they end."""
    _chart(sheet, _marks, numbers=False, lines=2)


def stepped(sheet: Sheet) -> None:
    """Level pieces, joined by upright ones."""
    _chart(sheet, _steps, numbers=sheet.dice.chance(0.5))


@dataclass(frozen=True)
class Plot:
    """names: (name, its box, x of its point) along the bottom. ticks: where the scale's numbers stand.

    numbers: values printed at the points. slanted: the line goes straight from point to point.
    """

    box: Box
    scale: Scale
    ticks: dict[int, Box]
    names: list[tuple[str, Box, float]]
    numbers: bool
    slanted: bool

    def points(self, values: list[int]) -> list[Point]:
        """Where values lie on the page."""
        heights = (self.box.height * value / self.scale.top for value in values)
        return [(x, self.box.y1 - height) for (_, _, x), height in zip(self.names, heights, strict=True)]


def _chart(sheet: Sheet, draw: Callable, numbers: bool, lines: int = 1) -> None:
    flow, title = axes.start(sheet)
    if sheet.dice.chance(0.5):
        axes.measure(sheet, flow)
    low = sheet.height("small") * 1.3
    area = Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1 - low)
    if area.height < sheet.em * 3:
        return
    dice = sheet.dice
    tails = _tails(sheet, lines, area)
    scale = axes.draw_scale(dice, area.height, sheet.height("small") * 1.5)
    inner = Box(area.x0, area.y0, area.x1 - max(tail.width for tail in tails), area.y1)
    box, ticks = axes.vertical_scale(sheet, inner, scale, grid=not numbers or dice.chance(0.3))
    plot = Plot(box, scale, ticks, _names(sheet, box, low), numbers, draw is not _steps)
    if len(plot.names) < 2:
        return
    reach = 1 - 1.3 * sheet.height("small") / box.height
    shown: list[list[int]] = []
    for tail, colour in zip(tails, axes.palette(sheet, lines), strict=True):
        values = _apart(dice, shown, lambda: axes.values(dice, scale, len(plot.names), not numbers, reach))
        shown.append(values)
        draw(sheet, box, plot.points(values), colour)
        _note(sheet, plot, values, tail)
    sheet.ground("the chart", box)
    sheet.caption(f'A line chart titled "{title}".' if title else "A line chart.")
    sheet.ask("count", ("How many lines does the chart have?", "How many lines are drawn?"), str(lines))


def _tails(sheet: Sheet, lines: int, area: Box) -> list[Line]:
    """What stands behind each line's end: its name, or nothing where there is only one."""
    if lines == 1:
        return [sheet.line("", "small")]
    fitted = [sheet.fit(name, area.width * 0.25, "small") for name in axes.names(sheet.dice, lines, ordered=False)]
    return [line or sheet.line(letter, "small") for line, letter in zip(fitted, "AB", strict=True)]


def _names(sheet: Sheet, plot: Box, low: float) -> list[tuple[str, Box, float]]:
    """(name, its box, x of its point) along the bottom."""
    dice = sheet.dice
    most = max(3, min(MOST, int(plot.width / sheet.style.small / 3.4)))
    count = dice.whole(max(3, most // 2), most)
    width, names = plot.width / count, []
    for at, label in enumerate(axes.names(dice, count, ordered=True)):
        line = sheet.fit(label, width * 0.95, "small")
        if line is not None:
            x0 = plot.x0 + at * width
            names.append((label, sheet.put(line, x0, plot.y1 + low * 0.15, width, "centre"), x0 + width / 2))
    return names


def _apart(dice: Dice, others: list[list[int]], make: Callable[[], list[int]]) -> list[int]:
    """Values of a line that ends elsewhere than the others, so that their names do not collide."""
    values = make()
    for _ in range(20):
        if all(abs(values[-1] - other[-1]) > 0.25 * max(values[-1], other[-1]) for other in others):
            break
        values = make()
    return values


def _note(sheet: Sheet, plot: Plot, values: list[int], tail: Line) -> None:
    """Write the numbers and the line's name, and note what can be asked."""
    entries, half, points = [], sheet.em * 0.6, plot.points(values)
    for at, ((name, name_box, _), value, (x, y)) in enumerate(zip(plot.names, values, points, strict=True)):
        text_box = _number(sheet, plot, str(value), points, at) if plot.numbers else plot.ticks[value]
        box = Box(x - half, y - half, x + half, y + half)
        entries.append(Entry(name, str(value), value, box, name_box, text_box))
    if not tail.text:
        sheet.series.append(Series("points", LOOKUP, HIGHEST, LOWEST, "the point of {name}", tuple(entries)))
        _trend(sheet, entries)
        return
    x, y = points[-1]
    box = sheet.put(tail, x + sheet.em * 0.5, y - tail.height / 2)
    sheet.ground(f'the name "{tail.text}" at the line', box)
    lookup = (f"What is the value of {tail.text} for {{name}}?", f"How much is {tail.text} in {{name}}?")
    most, least = (f"Where is {tail.text} highest?",), (f"Where is {tail.text} lowest?",)
    where = f"the point of {tail.text} for {{name}}"
    sheet.series.append(Series("points", lookup, most, least, where, tuple(entries), counted=False))


def _number(sheet: Sheet, plot: Plot, text: str, points: list[Point], at: int) -> Box:
    """Beside a point, where a slanted line leaves room: below a low, else above, on the outer side of a slope."""
    number, (x, y), gap = sheet.line(text, "small"), points[at], sheet.em * 0.25
    sides = [points[other][1] for other in (at - 1, at + 1) if 0 <= other < len(points)]
    left, top = x - number.width / 2, y - number.height - gap
    if plot.slanted and all(level < y for level in sides) and y + gap + number.height < plot.box.y1:
        top = y + gap
    elif plot.slanted and len(sides) == 2 and sides[1] < y <= sides[0]:  # the line rises
        left = x - number.width
    elif plot.slanted and sides[0] < y:
        left = x
    return sheet.put(number, min(max(0, left), sheet.page.width - number.width), top)


def _trend(sheet: Sheet, entries: list[Entry]) -> None:
    at = sheet.dice.whole(0, len(entries) - 2)
    first, second = entries[at], entries[at + 1]
    if first.number != second.number:
        asked = ("Does the line rise or fall from {first} to {second}?", "From {first} to {second}: rise or fall?")
        answer = "Rise" if second.number > first.number else "Fall"
        sheet.ask("compare", asked, answer, first.box | second.box, first=first.name, second=second.name)


def _marks(sheet: Sheet, plot: Box, points: list[Point], colour: Colour) -> None:
    _stroke(sheet, plot, points, colour)
    side = max(5, sheet.em * 0.4)
    for x, y in points:
        disc(sheet, Box(x - side / 2, y - side / 2, x + side / 2, y + side / 2), colour)


def _area(sheet: Sheet, plot: Box, points: list[Point], colour: Colour) -> None:
    corners = [(points[0][0], plot.y1), *points, (points[-1][0], plot.y1)]
    local = [(x - plot.x0, y - plot.y0) for x, y in corners]
    mask = polygon_mask(round(plot.width), round(plot.height), local)
    sheet.page.mask(plot.x0, plot.y0, mask, mix(colour, sheet.style.paper, 0.65))
    _stroke(sheet, plot, points, colour)


def _steps(sheet: Sheet, plot: Box, points: list[Point], colour: Colour) -> None:
    half = (points[1][0] - points[0][0]) / 2
    corners = []
    for x, y in points:
        corners += [(x - half, y), (x + half, y)]
    _stroke(sheet, plot, corners, colour)


def _stroke(sheet: Sheet, plot: Box, points: list[Point], colour: Colour) -> None:
    air = sheet.em
    local = [(x - plot.x0 + air, y - plot.y0 + air) for x, y in points]
    mask = stroke_mask(round(plot.width + 2 * air), round(plot.height + 2 * air), local, max(1.5, sheet.em * 0.12))
    sheet.page.mask(plot.x0 - air, plot.y0 - air, mask, colour)


SEEN = {"marked": marked, "gridded": gridded, "filled": filled, "double": double}
UNSEEN = {"stepped": stepped}
