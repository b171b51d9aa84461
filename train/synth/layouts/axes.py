"""What bar charts and line charts share: contents, a title, and a scale with its grid."""

from dataclasses import dataclass

from train.synth import content, words
from train.synth.content import Dice, Maker
from train.synth.layouts.parts import margin
from train.synth.page import Box, Colour
from train.synth.sheet import Flow, Line, Sheet
from train.synth.style import mix

MEASURES = (
    "Sales",
    "Visitors",
    "Rain in mm",
    "Points",
    "Output",
    "Orders",
    "Cost",
    "Calls",
    "Hours",
    "Members",
    "Votes",
)
MONTHS = tuple(month[:3] for month in words.MONTHS)
STEPS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000)


@dataclass(frozen=True)
class Scale:
    """From 0 to `step * count`, a grid line at each step."""

    step: int
    count: int

    @property
    def top(self) -> int:
        return self.step * self.count

    def ticks(self) -> list[int]:
        return [self.step * at for at in range(self.count + 1)]


def draw_scale(dice: Dice, room: float, pitch: float) -> Scale:
    """As many grid lines as fit `room` pixels, at most one in `pitch`, for numbers of a random size."""
    most = max(2, min(10, int(room // pitch)))
    return Scale(dice.pick(STEPS), dice.whole(min(4, most), most))


def values(dice: Dice, scale: Scale, count: int, on_grid: bool, reach: float = 1.0) -> list[int]:
    """Numbers on the grid lines, or anywhere up to `reach` of the scale, then no two too near to be told apart."""
    if on_grid:
        return [scale.step * dice.whole(1, scale.count) for _ in range(count)]
    return [max(1, int(slot / 60 * reach * scale.top)) for slot in dice.sample(range(5, 61), count)]


def names(dice: Dice, count: int, ordered: bool) -> list[str]:
    """What stands along the axis; `ordered`: things that follow each other, as months do."""
    if ordered:
        style, start = dice.whole(0, 3), dice.whole(0, 11)
        if style == 0 and count <= 12:
            return [MONTHS[(start + at) % 12] for at in range(count)]
        if style == 1:
            year = dice.whole(1960, 2020)
            return [str(year + at) for at in range(count)]
        if style == 2 and count <= 7:
            return [words.DAYS[(start + at) % 7][:3] for at in range(count)]
        letter = dice.pick("WQPDK")
        return [f"{letter}{at}" for at in range(1, count + 1)]
    make: Maker = dice.pick((content.city, content.first_name, content.noun, content.short_code, content.syllables))
    found: dict[str, None] = {}
    for _ in range(6 * count):
        found[make(dice)] = None
    return dice.sample(list(found), count)


def start(sheet: Sheet) -> tuple[Flow, str | None]:
    """The title, and what is left below it."""
    flow = Flow(sheet, sheet.box.padded(-margin(sheet)), 1.1)
    align = sheet.dice.pick(("left", "centre"))
    written = flow.write(content.heading, "large", align, sheet.style.strong) if sheet.dice.chance(0.85) else None
    flow.skip(sheet.em * 0.4)
    if written is None:
        return flow, None
    sheet.ask(
        "field", ("What is the title of the chart?", "Read the title.", "What is the chart called?"), *_told(written)
    )
    sheet.ground("the title", written[1])
    return flow, written[0].text


def measure(sheet: Sheet, flow: Flow) -> str | None:
    """What is measured, in small text over the chart."""
    written = flow.write(lambda dice: dice.pick(MEASURES), "small")
    if written is None:
        return None
    sheet.ask("field", ("What does the chart measure?", "What is the axis labelled?"), *_told(written))
    return written[0].text


def vertical_scale(sheet: Sheet, area: Box, scale: Scale, grid: bool) -> tuple[Box, dict[int, Box]]:
    """Numbers at the left of `area`, lines across the rest; the plot's box, and where each number stands."""
    drawn = sheet.glyphs("small")
    width = max(drawn.width(str(tick)) for tick in scale.ticks()) + sheet.em * 0.4
    plot = Box(area.x0 + width, area.y0 + drawn.height / 2, area.x1, area.y1)
    places = {}
    for tick in scale.ticks():
        y = plot.y1 - plot.height * tick / scale.top
        line = Line(str(tick), drawn, drawn.width(str(tick)))
        places[tick] = sheet.put(line, area.x0, y - drawn.height / 2, width - sheet.em * 0.4, "right")
        if grid or not tick:
            sheet.page.horizontal(plot.x0, plot.x1, y, sheet.style.muted if not tick else _faint(sheet))
    sheet.page.vertical(plot.x0, plot.y0, plot.y1, sheet.style.muted)
    return plot, places


def level_scale(sheet: Sheet, area: Box, scale: Scale, grid: bool) -> tuple[Box, dict[int, Box]]:
    """The same with numbers along the bottom; `area` starts where the plot does."""
    drawn = sheet.glyphs("small")
    half = drawn.width(str(scale.top)) / 2 + 1
    plot = Box(area.x0, area.y0, area.x1 - half, area.y1 - drawn.height * 1.15)
    places = {}
    for tick in scale.ticks():
        x = plot.x0 + plot.width * tick / scale.top
        line = Line(str(tick), drawn, drawn.width(str(tick)))
        places[tick] = sheet.put(line, x - line.width / 2, plot.y1 + drawn.height * 0.12)
        if grid or not tick:
            sheet.page.vertical(x, plot.y0, plot.y1, sheet.style.muted if not tick else _faint(sheet))
    sheet.page.horizontal(plot.x0, plot.x1, plot.y1, sheet.style.muted)
    return plot, places


def palette(sheet: Sheet, count: int) -> list[Colour]:
    """Different colours that stand out from the paper."""
    light = sum(sheet.style.paper) < 300
    strong = (
        (31, 119, 180),
        (214, 90, 20),
        (44, 140, 60),
        (190, 40, 45),
        (130, 90, 170),
        (120, 80, 60),
        (20, 130, 150),
    )
    chosen = sheet.dice.sample(strong, count)
    return [mix(colour, (255, 255, 255), 0.35) for colour in chosen] if light else chosen


def _faint(sheet: Sheet) -> Colour:
    return mix(sheet.style.paper, sheet.style.ink, 0.15)


def _told(written: tuple[Line, Box]) -> tuple[str, Box]:
    return written[0].text, written[1]
