"""Flags with and without the names of their countries."""

import itertools

from train.synth import content
from train.synth.flags import FLAGS, RATIO, flag
from train.synth.layouts.parts import margin
from train.synth.page import Box
from train.synth.sheet import Flow, Sheet

EMS, MOST_EMS, DARK = 12, 90, 0.1
COUNTRIES = tuple(FLAGS)
WHICH = ("Which country's flag is shown?", "Whose flag is this?", "What country does the flag belong to?")
WHICH_AT = ("Which country's flag is {place}?", "Whose flag is {place}?")
TITLES = ("Participants", "Final", "Offices", "Group A", "Group B", "Results", "Medals", "Travel plan", "Partners")


def single(sheet: Sheet) -> None:
    """One large flag, seldom with its name."""
    country = sheet.dice.pick(COUNTRIES)
    height = sheet.dice.uniform(0.3, 0.6) * min(sheet.page.height, sheet.page.width / RATIO)
    x = sheet.dice.uniform(0, sheet.page.width - height * RATIO)
    y = sheet.dice.uniform(0, sheet.page.height - height - sheet.height() * 1.3)
    box = _flag(sheet, country, x, y, height)
    sheet.ask("caption", WHICH, country, box)
    sheet.ask("count", ("How many flags are shown?", "Count the flags."), "1")
    sheet.ground("the flag", box)
    if sheet.dice.chance(0.3):
        line = sheet.fit(country, sheet.page.width)
        if line is not None:
            left = min(max(0, (box.x0 + box.x1 - line.width) / 2), sheet.page.width - line.width)
            named = sheet.put(line, left, box.y1 + line.height * 0.15)
            sheet.ask("field", ("Which country is named?", "Read the name below the flag."), country, named)
    sheet.caption(f"The flag of {country}.")


def gallery(sheet: Sheet) -> None:
    """Flags in rows, their names below them."""
    flow, title = _start(sheet)
    columns = max(1, min(5, int(flow.box.width / sheet.em / 8)))
    rows = max(1, min(4, int(flow.left / sheet.em / 6)))
    width, height = flow.box.width / columns, flow.left / rows
    tall = min(height - sheet.height() * 1.6, width * 0.8 / RATIO)
    if tall < 8:
        return
    countries = sheet.dice.sample(COUNTRIES, columns * rows)
    shown = []
    for at, country in enumerate(countries):
        x, y = flow.box.x0 + at % columns * width, flow.y + at // columns * height
        line = sheet.fit(country, width * 0.95)
        if line is None:
            continue
        box = _flag(sheet, country, x + (width - tall * RATIO) / 2, y, tall)
        name = sheet.put(line, x, y + tall + line.height * 0.15, width, "centre")
        shown.append((country, box, name))
    _about(sheet, title, shown, "below")


def listed(sheet: Sheet) -> None:
    """A list: flag, country, points."""
    _list(sheet, mirrored=False)


def quiz(sheet: Sheet) -> None:
    """Numbered flags without names."""
    flow, title = _start(sheet)
    columns = max(1, min(4, int(flow.box.width / sheet.em / 7)))
    rows = max(1, min(3, int(flow.left / sheet.em / 5)))
    width, height = flow.box.width / columns, flow.left / rows
    tall = min(height - sheet.height() * 1.3, width * 0.85 / RATIO)
    if tall < 8:
        return
    countries = sheet.dice.sample(COUNTRIES, columns * rows)
    marks = [str(at) for at in range(1, 20)] if sheet.dice.chance(0.5) else list("ABCDEFGHIJKLMNOP")
    for at, country in enumerate(countries):
        x, y = flow.box.x0 + at % columns * width, flow.y + at // columns * height
        sheet.put(sheet.line(marks[at], "bold"), x, y)
        box = _flag(sheet, country, x, y + sheet.height("bold"), tall)
        sheet.ask("caption", WHICH_AT, country, box, place=f"marked {marks[at]}")
        sheet.ground(f"the flag of {country}", box)
        asked = ("Which mark has the flag of {country}?",)
        sheet.ask("label", asked, marks[at], _mark_box(sheet, x, y, marks[at]), country=country)
    sheet.ask("count", ("How many flags are shown?", "Count the flags."), str(len(countries)))
    sheet.caption(f'Flags under the title "{title}".' if title else "Flags without names.")


def mirrored(sheet: Sheet) -> None:
    """A list with the flags at the right."""
    _list(sheet, mirrored=True)


def _list(sheet: Sheet, mirrored: bool) -> None:
    flow, title = _start(sheet)
    pitch = sheet.height() * sheet.dice.uniform(1.3, 2.0)
    rows = max(1, min(12, int(flow.left / pitch)))
    tall, shown = pitch * 0.75, []
    for country in sheet.dice.sample(COUNTRIES, sheet.dice.whole(min(2, rows), rows)):
        points = sheet.line(content.number(sheet.dice))
        room = flow.box.width - tall * RATIO - points.width - 2 * sheet.em
        line = sheet.fit(country, room)
        if line is None or not flow.fits(pitch):
            continue
        top = flow.y + (pitch - line.height) / 2
        flag_x = flow.box.x1 - tall * RATIO if mirrored else flow.box.x0
        text_x = flow.box.x0 + points.width + sheet.em if mirrored else flow.box.x0 + tall * RATIO + sheet.em * 0.6
        box = _flag(sheet, country, flag_x, flow.y + (pitch - tall) / 2, tall)
        name = sheet.put(line, text_x, top)
        if mirrored:
            number = sheet.put(points, flow.box.x0, top)
        else:
            number = sheet.put(points, flow.box.x0, top, flow.box.width, "right")
        asked = ("Which number does {country} have?", "What stands beside {country}?")
        sheet.ask("field", asked, points.text, number, country=country)
        sheet.ground(f"the row of {country}", Box(flow.box.x0, flow.y, flow.box.x1, flow.y + pitch))
        shown.append((country, box, name))
        flow.skip(pitch)
    _about(sheet, title, shown, "beside")


def _start(sheet: Sheet) -> tuple[Flow, str | None]:
    flow = Flow(sheet, sheet.box.padded(-margin(sheet)))
    written = None
    if sheet.dice.chance(0.6):
        make = sheet.dice.pick((lambda dice: dice.pick(TITLES), content.heading))
        written = flow.write(make, "large", sheet.dice.pick(("left", "centre")), sheet.style.strong)
        flow.skip(sheet.em * 0.3)
    if written is None:
        return flow, None
    sheet.ask("field", ("What is the title?", "Read the heading."), written[0].text, written[1])
    sheet.ground("the title", written[1])
    return flow, written[0].text


def _flag(sheet: Sheet, country: str, x: float, y: float, height: float) -> Box:
    """The flag with a thin edge, so that white parts end somewhere."""
    pixels = flag(country, max(6, round(height)))
    x, y = round(x), round(y)
    box = Box(x, y, x + pixels.shape[1], y + pixels.shape[0])
    target = sheet.page.pixels[max(0, y) : y + pixels.shape[0], max(0, x) : x + pixels.shape[1]]
    target[:] = pixels[: target.shape[0], : target.shape[1]]
    sheet.page.rectangle(box, (120, 120, 120), 1)
    return box


def _mark_box(sheet: Sheet, x: float, y: float, mark: str) -> Box:
    line = sheet.line(mark, "bold")
    return Box(x, y, x + line.width, y + line.height)


def _about(sheet: Sheet, title: str | None, shown: list[tuple[str, Box, Box]], where: str) -> None:
    """shown: (country, flag, name)."""
    if not shown:
        return
    sheet.ask(
        "count", ("How many flags are shown?", "Count the flags.", "How many countries are there?"), str(len(shown))
    )
    for country, box, _ in shown:
        sheet.ground(f"the flag of {country}", box)
    ends = (("first", shown[0]), ("last", shown[-1]))
    for which, (country, _, name) in ends if len(shown) > 1 else ():
        asked = (f"Which country's flag comes {which}?", f"Read the name {where} the {which} flag.")
        sheet.ask("field", asked, country, name)
    for (before, _, _), (country, _, name) in itertools.pairwise(shown):
        sheet.ask("label", ("Which country comes after {before}?",), country, name, before=before)
    if len(shown) <= 4:
        sheet.caption(f"The flags of {', '.join(country for country, _, _ in shown)}.")
    else:
        sheet.caption(f'{len(shown)} flags under the title "{title}".' if title else f"{len(shown)} flags with names.")


SEEN = {"single": single, "gallery": gallery, "listed": listed, "quiz": quiz}
UNSEEN = {"mirrored": mirrored}
