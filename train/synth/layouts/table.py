"""Tables of figures and words."""

from dataclasses import dataclass

from train.synth import content, words
from train.synth.content import Dice, Maker
from train.synth.layouts.grid import Grid, GridLook, draw_grid
from train.synth.layouts.parts import margin
from train.synth.questions import Entry, Series
from train.synth.sheet import Flow, Sheet

EMS, MOST_EMS, DARK = 12, 110, 0.08
MOST_ROWS, MOST_COLUMNS = 18, 6
SUBJECTS: dict[str, tuple[str, Maker]] = {
    "City": ("cities", content.city),
    "Name": ("people", content.person),
    "Product": ("products", content.goods),
    "Company": ("companies", content.company),
    "Code": ("codes", content.code),
    "Word": ("words", content.noun),
    "Street": ("streets", content.street),
    "Team": ("teams", content.surname),
}
TEXTS: dict[str, Maker] = {
    "Date": content.date,
    "Time": content.time,
    "Room": content.short_code,
    "Contact": content.first_name,
    "Ref.": content.code,
    "Place": content.city,
    "Phone": content.phone,
    "Colour": lambda dice: dice.pick(("red", "blue", "green", "black", "white", "yellow", "grey", "brown")),
}
NUMBERS = (
    "Points",
    "Stock",
    "Price",
    "Weight",
    "Height",
    "Score",
    "Visits",
    "Sales",
    "Orders",
    "Votes",
    "Length",
    "Age",
)


@dataclass(frozen=True)
class Contents:
    """numeric: by column, the numbers that its cells show, or None."""

    subject: str
    plural: str
    heads: list[str]
    rows: list[list[str]]
    numeric: list[list[float] | None]


def ruled(sheet: Sheet) -> None:
    """Every cell in a frame."""
    _table(sheet, GridLook("grid", sheet.dice.pick(("bold", "tint", "band"))))


def zebra(sheet: Sheet) -> None:
    """Every second row shaded."""
    _table(sheet, GridLook("zebra", sheet.dice.pick(("band", "rule"))))


def plain(sheet: Sheet) -> None:
    """Columns kept apart by space alone."""
    _table(sheet, GridLook("none", sheet.dice.pick(("bold", "rule")), wide=sheet.dice.chance(0.5)))


def lined(sheet: Sheet) -> None:
    """Thin rules between the rows."""
    _table(sheet, GridLook("rows", sheet.dice.pick(("rule", "tint", "bold"))))


def turned(sheet: Sheet) -> None:
    """One column for each thing: the heads stand at the left."""
    flow = Flow(sheet, sheet.box.padded(-margin(sheet)), 1.2)
    title = _title(sheet, flow)
    things = max(2, min(5, int(flow.box.width / sheet.em / 8)))
    held = _contents(sheet, things, sheet.dice.whole(2, 9))
    heads = [held.subject, *(row[0] for row in held.rows)]
    rows = [[head, *(row[at] for row in held.rows)] for at, head in enumerate(held.heads) if at]
    look = GridLook(sheet.dice.pick(("grid", "rows")), sheet.dice.pick(("tint", "bold")))
    aligns = "l" + sheet.dice.pick("cr") * things
    grid = draw_grid(sheet, flow, heads, rows, aligns, look, list(range(things, 1, -1)))
    if grid is None:
        return
    shown = len(grid.columns) - 1
    for row in grid.rows:
        numbers = held.numeric[held.heads.index(row[0].text)]
        entries = [
            Entry(head.text, cell.text, numbers[at] if numbers else 0, cell.area, head.box, cell.box)
            for at, (head, cell) in enumerate(zip(grid.heads[1:], row[1:], strict=True))
        ]
        sheet.series.append(_series(held, row[0].text, entries, numbers is not None, row is grid.rows[0]))
    for at in range(1, shown + 1):
        sheet.ground(f'the column "{grid.heads[at].text}"', grid.column_box(at))
    _about(sheet, grid, title, held)


def _table(sheet: Sheet, look: GridLook) -> None:
    flow = Flow(sheet, sheet.box.padded(-margin(sheet)), sheet.dice.uniform(1.05, 1.5))
    title = _title(sheet, flow)
    rows = min(MOST_ROWS, int(flow.left / sheet.height() / flow.leading) - 1)
    columns = max(2, min(MOST_COLUMNS, int(flow.box.width / sheet.em / 6)))
    few = max(2, rows // 3)
    held = _contents(sheet, sheet.dice.whole(few, max(few, rows)), sheet.dice.whole(columns // 2, columns - 1))
    aligns = "l" + "".join("r" if numbers else sheet.dice.pick("lc") for numbers in held.numeric[1:])
    spare = list(range(len(held.heads) - 1, 1, -1))
    grid = draw_grid(sheet, flow, held.heads, held.rows, aligns, look, spare)
    if grid is None:
        return
    for at, head in enumerate(grid.heads):
        if not at:
            continue
        numbers = held.numeric[grid.columns[at]]
        entries = [
            Entry(
                row[0].text,
                row[at].text,
                numbers[number] if numbers else 0,
                grid.row_box(number),
                row[0].box,
                row[at].box,
            )
            for number, row in enumerate(grid.rows)
        ]
        sheet.series.append(_series(held, head.text, entries, numbers is not None, at == 1))
        sheet.ground(f'the column "{head.text}"', grid.column_box(at))
    _about(sheet, grid, title, held)


def _series(held: Contents, head: str, entries: list[Entry], numeric: bool, first: bool) -> Series:
    lookup = (
        f"What is the {head} of {{name}}?",
        f'Read the {head} for "{{name}}".',
        f"Which {head} does {{name}} have?",
        f'What does the table give as {head} of "{{name}}"?',
    )
    most = (f"Which {held.subject} has the highest {head}?", f"Who or what has the largest {head}?")
    least = (f"Which {held.subject} has the lowest {head}?", f"Who or what has the smallest {head}?")
    if first:
        ground, shown = 'the row of "{name}"', tuple(entries)
    else:
        ground, shown = f'the {head} of "{{name}}"', tuple(_cell_only(entry) for entry in entries)
    return Series(held.plural, lookup, most, least, ground, shown, counted=first, compared=numeric)


def _cell_only(entry: Entry) -> Entry:
    return Entry(entry.name, entry.text, entry.number, entry.text_box.padded(4), entry.name_box, entry.text_box)


def _contents(sheet: Sheet, rows: int, columns: int) -> Contents:
    """Different subjects, and columns of numbers and of texts."""
    dice = sheet.dice
    subject = dice.pick(tuple(SUBJECTS))
    plural, make = SUBJECTS[subject]
    names = _different(dice, make, rows)
    heads, cells, numeric = [subject], [names], [None]
    kinds = [*dice.sample(NUMBERS, 3), *dice.sample(tuple(TEXTS), 2), dice.pick(words.NOUNS).capitalize()]
    for head in dice.sample(kinds, columns):
        heads.append(head)
        if head in TEXTS:
            cells.append([TEXTS[head](dice) for _ in names])
            numeric.append(None)
            continue
        numbers, texts = _numbers(dice, len(names))
        cells.append(texts)
        numeric.append(numbers)
    return Contents(subject, plural, heads, [list(row) for row in zip(*cells, strict=True)], numeric)


def _different(dice: Dice, make: Maker, count: int) -> list[str]:
    found: dict[str, None] = {}
    for _ in range(4 * count):
        found[make(dice)] = None
        if len(found) == count:
            break
    return list(found)


def _numbers(dice: Dice, count: int) -> tuple[list[float], list[str]]:
    """Numbers of one size, and how they are printed."""
    style, high = dice.whole(0, 3), 10 ** dice.whole(2, 4)
    if style == 0:
        values = [dice.whole(0, high * 10) / 10 for _ in range(count)]
        return values, [f"{value:.1f}" for value in values]
    values = [float(dice.whole(0, high)) for _ in range(count)]
    if style == 1:
        money = content.money(dice)
        return values, [money(int(value) * 10) for value in values]
    return values, [f"{value:.0f}" for value in values]


def _title(sheet: Sheet, flow: Flow) -> str | None:
    if sheet.dice.chance(0.25):
        return None
    written = flow.write(content.heading, "large", sheet.dice.pick(("left", "centre")), sheet.style.strong)
    flow.skip(sheet.em * 0.3)
    if written is None:
        return None
    asked = ("What is the title of the table?", "Read the heading.", "What is the table called?")
    sheet.ask("field", asked, written[0].text, written[1])
    sheet.ground("the title", written[1])
    return written[0].text


def _about(sheet: Sheet, grid: Grid, title: str | None, held: Contents) -> None:
    sheet.ground("the table", grid.box)
    sheet.ground("the head of the table", grid.heads[0].area | grid.heads[-1].area)
    sheet.ask("count", ("How many columns does the table have?", "Count the columns."), str(len(grid.heads)))
    if len(grid.rows) > 1:
        last = grid.rows[-1][0]
        asked = ("What stands first in the last row?", "Read the first cell of the last row.")
        sheet.ask("field", asked, last.text, last.box)
    for number, row in list(enumerate(grid.rows, 1))[:8]:
        at = sheet.dice.whole(0, len(row) - 1)
        where = f"row {number}, column {at + 1}"
        asked = (f"Read {where}, not counting the head.", f"Below the head, what stands in {where}?")
        sheet.ask("transcribe", asked, row[at].text, row[at].box)
    sheet.caption(f'A table titled "{title}".' if title else f"A table of {held.plural}.")


SEEN = {"ruled": ruled, "zebra": zebra, "plain": plain, "lined": lined}
UNSEEN = {"turned": turned}
