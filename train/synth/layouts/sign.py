"""Signs in streets: names, directions, shops, traffic."""

from collections.abc import Callable

from train.synth import content, words
from train.synth.content import Maker
from train.synth.layouts.parts import around, disc
from train.synth.page import BLACK, WHITE, Box, Colour
from train.synth.shapes import polygon_mask
from train.synth.sheet import Line, Sheet
from train.synth.style import mix

EMS, MOST_EMS, DARK = 9, 40, 0
SKIES: tuple[Colour, ...] = ((185, 215, 240), (205, 225, 240), (225, 225, 225), (240, 215, 190), (160, 190, 225))
GROUNDS: tuple[Colour, ...] = ((110, 130, 90), (130, 130, 125), (150, 135, 110), (90, 110, 80), (170, 165, 155))
PLATES: tuple[tuple[Colour, Colour], ...] = (
    *(((0, 70, 150), WHITE), ((0, 100, 60), WHITE), (WHITE, BLACK), (WHITE, (0, 50, 130)), ((20, 20, 20), WHITE)),
    *(((240, 200, 30), BLACK), ((120, 20, 30), WHITE), ((90, 60, 30), WHITE)),
)
READ = ("Read the text on the sign.", "What does the sign say?", "What is written on the sign?")
SIDES = ("left", "right", "straight ahead")


def street(sheet: Sheet) -> None:
    """Name plates on a pole, one over the other."""
    count = min(sheet.dice.whole(1, 3), max(1, int(sheet.page.height * 0.75 / (sheet.height("large") * 2.1))))
    _scene(sheet)
    ground, ink = sheet.dice.pick(PLATES)
    x = sheet.page.width * sheet.dice.uniform(0.35, 0.65)
    _pole(sheet, x, sheet.page.height * 0.05)
    y, drawn = sheet.page.height * sheet.dice.uniform(0.06, 0.15), []
    for _ in range(count):
        line = sheet.fit(content.street, sheet.page.width * 0.88, "large")
        if line is not None:
            plate, box = _plate(sheet, line, x, y, ground, ink)
            drawn.append((line.text, plate, box))
            y = plate.y1 + sheet.em * sheet.dice.uniform(0.15, 0.8)
    _about_plates(sheet, drawn, "street")
    if drawn:
        sheet.caption(
            f"A street sign of {drawn[0][0]}." if len(drawn) == 1 else f"A pole with {len(drawn)} street signs."
        )


def direction(sheet: Sheet) -> None:
    """A board with arrows, places and distances."""
    _scene(sheet)
    dice = sheet.dice
    ground, ink = dice.pick(PLATES)
    pitch = sheet.height("bold") * dice.uniform(1.2, 1.6)
    rows = max(1, min(6, int(sheet.page.height * 0.7 / pitch)))
    width = min(sheet.page.width * 0.94, sheet.em * dice.uniform(14, 22))
    x = dice.uniform(0.02 * sheet.page.width, 0.98 * sheet.page.width - width)
    y, air = sheet.page.height * dice.uniform(0.04, 0.15), sheet.em * 0.5
    count = dice.whole(min(2, rows), rows)
    board = Box(x, y, x + width, y + count * pitch + 2 * air)
    _pole(sheet, x + width * 0.2, board.y1)
    _pole(sheet, x + width * 0.8, board.y1)
    sheet.page.rectangle(board, ground)
    sheet.page.rectangle(board.padded(-max(2, air / 3)), ink, max(1, round(air / 6)))
    places = []
    for at in range(count):
        row = Box(board.x0 + air, board.y0 + air + at * pitch, board.x1 - air, board.y0 + air + (at + 1) * pitch)
        place = _direction_row(sheet, row, ink)
        if place is not None:
            places.append(place)
    sheet.ground("the sign", board)
    if places:
        sheet.ask("count", ("How many places are on the sign?", "How many destinations are listed?"), str(len(places)))
        sheet.caption(f"A direction sign to {places[0]}." if len(places) == 1 else "A sign with directions.")


def shop(sheet: Sheet) -> None:
    """A house front: the shop's name over the window, opening hours beside the door."""
    page, dice = sheet.page, sheet.dice
    wall = mix(dice.pick(((200, 180, 160), (190, 190, 185), (170, 120, 100), (215, 205, 180))), WHITE, 0.15)
    page.rectangle(sheet.box, wall)
    page.rectangle(Box(0, page.height * 0.92, page.width, page.height), (120, 120, 120))
    ground, ink = dice.pick(PLATES)
    line = sheet.fit(content.shop, page.width * 0.86, "large")
    if line is None:
        return
    board = Box(page.width * 0.03, page.height * 0.06, page.width * 0.97, page.height * 0.06 + line.height * 1.6)
    page.rectangle(board, ground)
    name = sheet.put(line, board.x0, board.y0 + line.height * 0.3, board.width, "centre", ink)
    top = board.y1 + page.height * 0.05
    window = Box(page.width * 0.06, top, page.width * 0.94, page.height * 0.88)
    page.rectangle(window, mix(dice.pick(SKIES), (90, 110, 130), 0.3))
    page.rectangle(window, mix(wall, BLACK, 0.4), max(2, round(sheet.em * 0.2)))
    sheet.ask("transcribe", READ, line.text, name)
    sheet.ask("field", ("What is the shop called?", "What is the name of the shop?"), line.text, name)
    sheet.ground("the shop sign", board)
    sheet.ground("the window", window)
    sheet.caption(f"The front of {line.text}.")
    _hours(sheet, window.padded(-sheet.em * 0.7))


def traffic(sheet: Sheet) -> None:
    """A round sign with a number, over a plate with words."""
    _scene(sheet)
    page, dice = sheet.page, sheet.dice
    side = min(min(page.width, page.height) * dice.uniform(0.3, 0.45), 6 * sheet.sizes[-1])
    x, y = page.width * dice.uniform(0.35, 0.65), page.height * dice.uniform(0.03, 0.12)
    _pole(sheet, x, y + side / 2)
    box = Box(x - side / 2, y, x + side / 2, y + side)
    disc(sheet, box, (200, 20, 30))
    disc(sheet, box.padded(-side * 0.11), WHITE)
    number = sheet.fit(lambda dice: str(5 * dice.whole(1, 26)), side * 0.7, "huge")
    if number is not None:
        drawn = sheet.put(number, box.x0, y + (side - number.height) / 2, side, "centre", BLACK)
        asked = ("What is the speed limit?", "Which number is on the round sign?", "How fast may one drive?")
        sheet.ask("field", asked, number.text, drawn)
        sheet.caption(f"A speed limit of {number.text}.")
    sheet.ground("the round sign", box)
    makes: tuple[Maker, ...] = (
        *(content.street, content.city, content.token, lambda dice: f"{dice.whole(50, 900)} m"),
        *(
            lambda dice: f"Except {content.noun(dice)}",
            lambda dice: f"{dice.whole(5, 11):02d}:00-{dice.whole(13, 22)}:00",
        ),
    )
    line = sheet.fit(dice.pick(makes), page.width * 0.85, "bold")
    if line is not None and box.y1 + line.height * 2 < page.height:
        plate, text = _plate(sheet, line, x, box.y1 + sheet.em * 0.3, WHITE, BLACK)
        sheet.ask("transcribe", ("Read the plate below the sign.", "What is written below the sign?"), line.text, text)
        sheet.ground("the plate below the sign", plate)


def fingerpost(sheet: Sheet) -> None:
    """Arms that point to either side."""
    _scene(sheet)
    page, dice = sheet.page, sheet.dice
    wood, ink = dice.pick((((110, 70, 40), WHITE), ((230, 225, 210), BLACK), ((20, 80, 60), WHITE)))
    pitch = sheet.height("bold") * 1.9
    count = max(1, min(5, int(page.height * 0.8 / pitch)))
    x = page.width * dice.uniform(0.45, 0.55)
    _pole(sheet, x, page.height * 0.03)
    y, arms = page.height * 0.06, []
    for _ in range(dice.whole(1, count)):
        line = sheet.fit(_place_and_distance, page.width * 0.42, "bold")
        if line is None:
            continue
        left = dice.chance(0.5)
        arms.append(_arm(sheet, line, x, y, left, wood, ink))
        y += pitch
    for number, (text, arm, box) in enumerate(arms, 1):
        asked = (f"Read arm {number} of the signpost.", f"What does arm {number} from the top say?")
        sheet.ask("transcribe", asked, text, box)
        if sum(other.startswith(text) for other, _, _ in arms) == 1:
            sheet.ground(f'the arm with "{text}"', arm)
    if arms:
        sheet.ask("count", ("How many arms does the signpost have?",), str(len(arms)))
        sheet.caption("A signpost." if len(arms) > 1 else f"A signpost to {arms[0][0]}.")


def _scene(sheet: Sheet) -> None:
    """Sky and ground, sometimes houses between them."""
    page, dice = sheet.page, sheet.dice
    horizon = page.height * dice.uniform(0.65, 0.85)
    page.rectangle(sheet.box, dice.pick(SKIES))
    if dice.chance(0.6):
        at = -page.width * 0.1
        while at < page.width:
            width = page.width * dice.uniform(0.1, 0.3)
            house = mix(dice.pick(GROUNDS), dice.pick(SKIES), 0.5)
            page.rectangle(Box(at, horizon - page.height * dice.uniform(0.05, 0.4), at + width, horizon), house)
            at += width
    page.rectangle(Box(0, horizon, page.width, page.height), dice.pick(GROUNDS))


def _pole(sheet: Sheet, x: float, y: float) -> None:
    half = max(2, sheet.page.width * 0.012)
    sheet.page.rectangle(Box(x - half, y, x + half, sheet.page.height * 0.95), (105, 105, 110))


def _plate(sheet: Sheet, line: Line, x: float, y: float, ground: Colour, ink: Colour) -> tuple[Box, Box]:
    """A plate about a line, centred at x where the page allows; the plate, and the text's box."""
    air = line.height * 0.35
    width = line.width + 2 * air
    left = min(max(0, x - width / 2), sheet.page.width - width)
    plate = Box(left, y, left + width, y + line.height + air)
    sheet.page.rectangle(plate, ground)
    sheet.page.rectangle(plate.padded(-max(1, air * 0.2)), ink, max(1, round(air * 0.12)))
    return plate, sheet.put(line, left + air, y + air / 2, colour=ink)


def _about_plates(sheet: Sheet, drawn: list[tuple[str, Box, Box]], what: str) -> None:
    """drawn: (text, plate, box of the text), from the top."""
    if len(drawn) == 1:
        sheet.ask("transcribe", READ, drawn[0][0], drawn[0][2])
        sheet.ask("field", (f"Which {what} is it?", f"What is the {what} called?"), drawn[0][0], drawn[0][2])
        sheet.ground("the sign", drawn[0][1])
        return
    for place, (text, plate, box) in zip(("top", "second", "third"), drawn, strict=False):
        sheet.ask("transcribe", (f"Read the {place} sign.", f"What does the {place} sign say?"), text, box)
        sheet.ground(f"the sign of {text}", plate)
    if drawn:
        sheet.ask("count", ("How many signs are there?", "Count the signs."), str(len(drawn)))
        sheet.ground("all the signs", around([plate for _, plate, _ in drawn]))


def _direction_row(sheet: Sheet, row: Box, ink: Colour) -> str | None:
    """Arrow, place and distance; returns the place."""
    dice, side = sheet.dice, round(row.height * 0.6)
    kilometres = sheet.fit(lambda dice: f"{dice.whole(1, 480)} km", row.width * 0.35)
    if kilometres is None:
        return None
    place = sheet.fit(content.city, row.width - side * 1.5 - kilometres.width - sheet.em * 0.5, "bold")
    if place is None:
        return None
    way = dice.pick(SIDES)
    _arrow(sheet, Box(row.x0, row.y0 + (row.height - side) / 2, row.x0 + side, 0), way, ink)
    name = sheet.put(place, row.x0 + side * 1.5, row.y0 + (row.height - place.height) / 2, colour=ink)
    far = sheet.put(kilometres, row.x0, row.y0 + (row.height - kilometres.height) / 2, row.width, "right", ink)
    asked = ("How far is it to {place}?", "What is the distance to {place}?", "How many kilometres is it to {place}?")
    sheet.ask("field", asked, kilometres.text, far, place=place.text)
    sheet.ask("label", ("Which place is {far} away?", "Where is it {far} to?"), place.text, name, far=kilometres.text)
    sheet.ask("compare", ("Which way is {place}: left, right or straight ahead?",), way, name, place=place.text)
    sheet.ground(f"the row of {place.text}", row)
    return place.text


def _arrow(sheet: Sheet, box: Box, way: str, ink: Colour) -> None:
    """An arrow in a square at the box's corner, as wide as the box."""
    side = round(box.width)
    shape = [(0.5, 0), (1, 0.5), (0.65, 0.5), (0.65, 1), (0.35, 1), (0.35, 0.5), (0, 0.5)]
    turn: dict[str, Callable] = {
        "straight ahead": lambda x, y: (x, y),
        "left": lambda x, y: (y, x),
        "right": lambda x, y: (1 - y, x),
    }
    corners = [turn[way](x, y) for x, y in shape]
    mask = polygon_mask(side, side, [(x * side, y * side) for x, y in corners])
    sheet.page.mask(box.x0, box.y0, mask, ink)


def _hours(sheet: Sheet, window: Box) -> None:
    """A card in the window: days and opening hours."""
    dice = sheet.dice
    rows = min(dice.whole(1, 5), int(window.height / sheet.height() / 1.2))
    width = min(window.width, sheet.em * 14)
    if rows < 1:
        return
    pitch = sheet.height() * 1.15
    card = Box(window.x0, window.y1 - rows * pitch - sheet.em * 0.6, window.x0 + width, window.y1)
    sheet.page.rectangle(card, WHITE)
    start = dice.whole(0, 6)
    for at in range(rows):
        y = card.y0 + sheet.em * 0.3 + at * pitch
        day = words.DAYS[(start + at) % 7]
        label = sheet.fit(day if width > sheet.em * 12 else day[:2], width * 0.45)
        hours = sheet.fit(lambda dice: f"{dice.whole(6, 11)}-{dice.whole(12, 23)}", width * 0.45)
        if label is None or hours is None:
            continue
        sheet.put(label, card.x0 + sheet.em * 0.4, y, colour=BLACK)
        box = sheet.put(hours, card.x0, y, card.width - sheet.em * 0.4, "right", BLACK)
        asked = ("When is the shop open on {day}?", "What are the hours on {day}?", "Opening hours of {day}?")
        sheet.ask("field", asked, hours.text, box, day=day)
    sheet.ground("the opening hours", card)


def _place_and_distance(dice) -> str:
    return f"{content.city(dice)} {dice.whole(1, 99)}" if dice.chance(0.6) else content.city(dice)


def _arm(sheet: Sheet, line: Line, x: float, y: float, left: bool, wood: Colour, ink: Colour) -> tuple[str, Box, Box]:
    """(text, arm, box of the text): a board from the post outwards, pointed at its end."""
    height, tip = line.height * 1.4, line.height * 0.6
    width = round(line.width + tip + sheet.em * 0.4)
    corners = [(0, 0), (width - tip, 0), (width, height / 2), (width - tip, height), (0, height)]
    if left:
        corners = [(width - at, level) for at, level in corners]
    start = x - width if left else x
    sheet.page.mask(start, y, polygon_mask(width, round(height), corners), wood)
    box = sheet.put(line, start + (tip if left else sheet.em * 0.3), y + line.height * 0.2, colour=ink)
    return line.text, Box(start, y, start + width, y + height), box


SEEN = {"street": street, "direction": direction, "shop": shop, "traffic": traffic}
UNSEEN = {"fingerpost": fingerpost}
