"""Cells in rows and columns, sized by what stands in them; drawn for tables, invoices and windows."""

from dataclasses import dataclass

from train.synth.fonts import Glyphs
from train.synth.page import WHITE, Box
from train.synth.sheet import Flow, Line, Sheet


@dataclass(frozen=True)
class GridLook:
    """How a grid is told from plain text.

    rules: `none`, `rows` (lines between them), `grid` (a frame about every cell) or `zebra` (every second row shaded).
    head: `bold`, `band` (on the accent colour), `tint` (shaded) or `rule` (a line below). wide: fill the whole width.
    """

    rules: str
    head: str
    wide: bool = True


@dataclass(frozen=True)
class Cell:
    """box: of the text's ink. area: of the whole cell."""

    text: str
    box: Box
    area: Box


@dataclass(frozen=True)
class Grid:
    """heads: of the columns that were drawn. columns: which of those asked for they are. rows: without the head."""

    heads: list[Cell]
    columns: list[int]
    rows: list[list[Cell]]
    box: Box

    def row_box(self, row: int) -> Box:
        return self.rows[row][0].area | self.rows[row][-1].area

    def column_box(self, column: int) -> Box:
        return self.heads[column].area | self.rows[-1][column].area


def draw_grid(
    sheet: Sheet, flow: Flow, heads: list[str], rows: list[list[str]], aligns: str, look: GridLook, spare: list[int]
) -> Grid | None:
    """Draw as many rows as fit, in smaller text where they are too wide, without the columns of `spare` if need be.

    aligns: `l`, `c` or `r` for each column. spare: columns to leave out, the first one first. None, and nothing
    drawn, where not even one row fits.
    """
    columns, spare = list(range(len(heads))), list(spare)
    while True:
        kept = [[row[column] for column in columns] for row in rows]
        sized = _sized(sheet, flow.box.width, [heads[column] for column in columns], kept)
        if sized is not None:
            break
        if not spare:
            return None
        columns.remove(spare.pop(0))
    size, widths, pad = sized
    plain, bold = sheet.glyphs("body", size), sheet.glyphs("bold", size)
    height = round(plain.height * flow.leading + pad * 0.4)
    fitting = int((flow.left - height * 1.2) // height)
    if fitting < 1:
        return None
    kept = kept[:fitting]
    if look.wide:
        extra = (flow.box.width - sum(widths)) / len(widths)
        widths = [width + extra for width in widths]
    edges = [flow.box.x0]
    for width in widths:
        edges.append(edges[-1] + width)
    chosen = "".join(aligns[column] for column in columns)
    box = Box(edges[0], flow.y, edges[-1], flow.y + height * (len(kept) + 1) + 2)
    drawn_heads = _head(sheet, look, [heads[column] for column in columns], edges, flow.y, height, bold, chosen, pad)
    flow.skip(height + 2)
    drawn = []
    for number, row in enumerate(kept):
        with_prefix(sheet, look, number, Box(edges[0], flow.y, edges[-1], flow.y + height))
        drawn.append(_cells(sheet, row, edges, flow.y, height, plain, chosen, pad, sheet.style.ink))
        flow.skip(height)
    if look.rules == "grid":
        for edge in (*edges[:-1], edges[-1] - 1):
            sheet.page.vertical(edge, box.y0, box.y1, sheet.style.muted)
        sheet.page.rectangle(box, sheet.style.muted, 1)
    return Grid(drawn_heads, columns, drawn, box)


def _sized(sheet: Sheet, room: float, heads: list[str], rows: list[list[str]]):
    """(text size, column widths, padding) of the largest text up to the body's with which all fits `room` pixels."""
    for size in (size for size in reversed(sheet.sizes) if size <= sheet.style.body):
        plain, bold, pad = sheet.glyphs("body", size), sheet.glyphs("bold", size), size * 0.45
        widths = [
            max(bold.width(head), *(plain.width(row[column]) for row in rows)) + 2 * pad
            for column, head in enumerate(heads)
        ]
        if sum(widths) <= room:
            return size, widths, pad
    return None


def _head(sheet, look: GridLook, heads, edges, y, height, bold: Glyphs, aligns: str, pad: float) -> list[Cell]:
    area = Box(edges[0], y, edges[-1], y + height)
    ink = sheet.style.ink
    if look.head == "band":
        sheet.page.rectangle(area, sheet.style.accent)
        ink = WHITE
    elif look.head == "tint":
        sheet.page.rectangle(area, sheet.style.tint)
    elif look.head == "rule":
        sheet.page.horizontal(area.x0, area.x1, area.y1, sheet.style.ink, 2)
    return _cells(sheet, heads, edges, y, height, bold, aligns, pad, ink)


def with_prefix(sheet: Sheet, look: GridLook, number: int, area: Box) -> None:
    if look.rules == "zebra" and number % 2:
        sheet.page.rectangle(area, sheet.style.tint)
    elif look.rules in ("rows", "grid") and number:
        sheet.page.horizontal(area.x0, area.x1, area.y0, sheet.style.muted)


def _cells(sheet, texts, edges, y, height, glyphs: Glyphs, aligns: str, pad: float, ink) -> list[Cell]:
    cells, names = [], {"l": "left", "c": "centre", "r": "right"}
    for text, align, left, right in zip(texts, aligns, edges, edges[1:], strict=False):
        line = Line(text, glyphs, glyphs.width(text))
        top = y + (height - glyphs.height) / 2
        box = sheet.put(line, left + pad, top, right - left - 2 * pad, names[align], ink)
        cells.append(Cell(text, box, Box(left, y, right, y + height)))
    return cells
