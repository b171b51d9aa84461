"""Few words, large: what reading is learnt from first."""

from train.synth import content
from train.synth.page import Box
from train.synth.sheet import Line, Sheet, inset
from train.synth.style import ink_on

EMS, MOST_EMS, DARK = 5, 40, 0.2
MOST = 7  # words on a page
READ_ALL = ("Read all the text.", "Read everything on the page.", "What does the page say?", "Transcribe the text.")
READ_ONE = ("Read the text.", "What does it say?", "What is written here?", "Transcribe the text.")


def single(sheet: Sheet) -> None:
    """One line anywhere."""
    line = sheet.fit(_tokens(sheet.dice.whole(1, 2)), sheet.page.width - sheet.em, sheet.dice.pick(("body", "huge")))
    if line is None:
        return
    x = sheet.dice.uniform(sheet.em / 2, sheet.page.width - sheet.em / 2 - line.width)
    y = sheet.dice.uniform(0, max(0, sheet.page.height - line.height))
    box = sheet.put(line, x, y)
    sheet.ask("transcribe", READ_ONE, line.text, box)
    sheet.ground(f'the text "{line.text}"', box)


def stacked(sheet: Sheet) -> None:
    """Lines one below the other, in one column, aligned alike."""
    align = sheet.dice.pick(("left", "centre", "right"))
    area = inset(sheet.box, sheet.em / 2)
    rows = min(sheet.dice.whole(2, 6), int(area.height // (sheet.height() * 1.1)))
    lines = [sheet.fit(_tokens(1), area.width) for _ in range(rows)]
    pitch = area.height / max(1, rows)
    drawn = []
    for row, line in enumerate(lines):
        if line is not None:
            y = area.y0 + row * pitch + sheet.dice.uniform(0, max(0, pitch - line.height))
            drawn.append((line, sheet.put(line, area.x0, y, area.width, align)))
    _ask_lines(sheet, drawn)


def scattered(sheet: Sheet) -> None:
    """One word to a band, anywhere along it, in different sizes and colours."""
    rows = min(sheet.dice.whole(2, MOST), int(sheet.page.height // (sheet.height("large") * 1.15)))
    pitch = sheet.page.height / max(1, rows)
    drawn = []
    for row in range(rows):
        line = sheet.fit(_tokens(1), sheet.page.width - sheet.em, sheet.dice.pick(("small", "body", "bold", "large")))
        if line is not None:
            x = sheet.dice.uniform(sheet.em / 2, sheet.page.width - sheet.em / 2 - line.width)
            y = row * pitch + sheet.dice.uniform(0, max(0, pitch - line.height))
            drawn.append((line, sheet.put(line, x, y)))
    _ask_lines(sheet, drawn)


def tiles(sheet: Sheet) -> None:
    """One word to a coloured tile."""
    dice, gap = sheet.dice, sheet.em / 3
    columns = max(1, min(3, int(sheet.page.width // (sheet.em * 5))))
    rows = max(1, min(3, int(sheet.page.height // (sheet.height() * 1.8))))
    width, height = (sheet.page.width - gap) / columns, (sheet.page.height - gap) / rows
    drawn = []
    for row in range(rows):
        for column in range(columns):
            tile = Box(column * width, row * height, (column + 1) * width, (row + 1) * height)
            tile = Box(tile.x0 + gap, tile.y0 + gap, tile.x1, tile.y1)
            colour = tuple(dice.whole(0, 255) for _ in range(3))
            sheet.page.rectangle(tile, colour)
            line = sheet.fit(_tokens(1), tile.width - gap)
            if line is not None:
                middle = (tile.y0 + tile.y1 - line.height) / 2
                drawn.append((line, sheet.put(line, tile.x0, middle, tile.width, "centre", ink_on(colour))))
                sheet.ground(f'the tile with "{line.text}"', tile)
    _ask_lines(sheet, drawn, tiles=True)


def stairs(sheet: Sheet) -> None:
    """Words that step down from one corner to the other."""
    rows = min(sheet.dice.whole(2, 6), int(sheet.page.height // (sheet.height() * 1.1)))
    lines = [sheet.fit(_tokens(1), sheet.page.width - sheet.em) for _ in range(rows)]
    pitch, falling = sheet.page.height / max(1, rows), sheet.dice.chance(0.5)
    drawn = []
    for row, line in enumerate(lines):
        if line is not None:
            step = (row if falling else rows - 1 - row) / max(1, rows - 1)
            x = sheet.em / 2 + step * (sheet.page.width - sheet.em - line.width)
            drawn.append((line, sheet.put(line, x, row * pitch + (pitch - line.height) / 2)))
    _ask_lines(sheet, drawn)


def _tokens(count: int):
    return lambda dice: " ".join(content.token(dice) for _ in range(count))


def _ask_lines(sheet: Sheet, drawn: list[tuple[Line, Box]], tiles: bool = False) -> None:
    """drawn: in reading order."""
    if not drawn:
        return
    texts = [line.text for line, _ in drawn]
    whole = drawn[0][1]
    for _, box in drawn[1:]:
        whole = whole | box
    sheet.ask("transcribe", READ_ALL, " ".join(texts), whole)
    sheet.ask("count", ("How many words are on the page?", "How many words do you see?"), str(len(texts)))
    for number, (line, box) in enumerate(drawn):
        if texts.count(line.text) == 1 and not tiles:
            sheet.ground(f'"{line.text}"', box)
        if number + 1 < len(drawn) and texts.count(line.text) == 1:
            below, its_box = drawn[number + 1]
            follows = ('Which word comes after "{word}"?', 'What follows "{word}"?')
            sheet.ask("label", follows, below.text, its_box, word=line.text)
    top, bottom = drawn[0], drawn[-1]
    if not tiles and len(drawn) > 1:
        sheet.ask("field", ("Read the top line.", "What is written at the top?"), top[0].text, top[1])
        sheet.ask("field", ("Read the bottom line.", "What is written at the bottom?"), bottom[0].text, bottom[1])
    if tiles and len(drawn) > 1:
        sheet.ask("field", ("Which word is in the top left tile?", "Read the first tile."), top[0].text, top[1])
        sheet.ask(
            "field", ("Which word is in the bottom right tile?", "Read the last tile."), bottom[0].text, bottom[1]
        )


SEEN = {"single": single, "stacked": stacked, "scattered": scattered, "tiles": tiles}
UNSEEN = {"stairs": stairs}
