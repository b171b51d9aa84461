"""Screens: settings, windows, dialogs, phones."""

from dataclasses import dataclass

from train.synth import content, words
from train.synth.layouts.grid import GridLook, draw_grid
from train.synth.layouts.parts import around, disc
from train.synth.page import WHITE, Box, Colour
from train.synth.sheet import Flow, Line, Sheet
from train.synth.style import mix

EMS, MOST_EMS, DARK = 11, 100, 0.3
SETTINGS = (
    *("Wi-Fi", "Bluetooth", "Dark mode", "Location", "Backup", "Airplane mode", "Sound", "Vibration", "Auto update"),
    *("Hotspot", "Notifications", "Night light", "Battery saver", "Sync", "Screen lock", "Cookies", "Spell check"),
    *("Remote access", "Subtitles", "Roaming", "Camera", "Microphone", "Private mode", "Grid view", "Hints"),
)
SECTIONS = ("Settings", "Preferences", "Options", "Privacy", "Display", "Network", "System", "Accounts", "General")
APPS = (
    "Mail",
    "Notes",
    "Calendar",
    "Files",
    "Photos",
    "Music",
    "Editor",
    "Browser",
    "Contacts",
    "Tasks",
    "Maps",
    "Chat",
)
MENUS = ("File", "Edit", "View", "Insert", "Format", "Tools", "Window", "Help")
BUTTONS = (
    "OK",
    "Cancel",
    "Save",
    "Delete",
    "Apply",
    "Close",
    "Retry",
    "Next",
    "Back",
    "Send",
    "Yes",
    "No",
    "Open",
    "Print",
)
MESSAGES = ("Save changes to", "Do you want to delete", "Cannot open", "Replace", "Download finished:", "No access to")
ENDINGS = ("txt", "pdf", "csv", "jpg", "docx", "zip", "png", "mp3", "html", "xlsx")
ERROR = "Error code "
ON, OFF = (30, 140, 70), (150, 150, 150)


@dataclass(frozen=True)
class Window:
    """inner: what the title bar leaves, pixels."""

    frame: Box
    inner: Box
    title: str | None


def settings(sheet: Sheet) -> None:
    """A list of switches."""
    window = _window(sheet, lambda dice: dice.pick(SECTIONS), share=(0.8, 1.0))
    flow = Flow(sheet, window.inner.padded(-sheet.em * 0.5))
    _switches(sheet, flow, sheet.dice.whole(2, 12))
    sheet.caption(f"A settings window titled {window.title}." if window.title else "A settings window.")


def application(sheet: Sheet) -> None:
    """A window with menus, a table, and a status line."""
    dice = sheet.dice
    window = _window(sheet, lambda dice: f"{_file(dice)} - {dice.pick(APPS)}", share=(0.85, 1.0))
    flow = Flow(sheet, window.inner.padded(-sheet.em * 0.3))
    _menu(sheet, flow)
    foot = sheet.height("small") * 1.3
    body = Flow(sheet, Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1 - foot), dice.uniform(1.05, 1.4))
    rows = min(14, int(body.left / sheet.height() / body.leading) - 1)
    if rows >= 1:
        _files(sheet, body, dice.whole(min(2, rows), rows))
    status = sheet.fit(
        lambda dice: f"{dice.whole(2, 999)} {content.plural(content.noun(dice))}", flow.box.width, "small"
    )
    if status is not None and body.y + status.height < window.frame.y1:
        box = sheet.put(status, flow.box.x0, window.frame.y1 - foot - 1)
        asked = ("What does the status line say?", "What is written at the bottom of the window?")
        sheet.ask("field", asked, status.text, box)
    sheet.caption(f'A window titled "{window.title}".' if window.title else "A window with files.")


def dialog(sheet: Sheet) -> None:
    """A message with buttons, over a page."""
    dice = sheet.dice
    sheet.page.rectangle(sheet.box, mix(sheet.style.accent, (128, 128, 128), dice.uniform(0.3, 0.8)))
    window = _window(
        sheet, lambda dice: dice.pick((*SECTIONS, *APPS, "Warning", "Error", "Question")), (0.6, 0.95), False
    )
    flow = Flow(sheet, window.inner.padded(-sheet.em * 0.8))
    lines = []
    for make in (_message, _file, _error, content.sentence):
        if flow.left > sheet.height() * 3.2 and (len(lines) < 2 or dice.chance(0.5)):
            written = flow.write(make)
            if written is not None:
                lines.append(written)
                _about_line(sheet, make, *written)
    if lines:
        first, box = lines[0]
        sheet.ask("transcribe", ("Read the first line of the message.", "How does the message begin?"), first.text, box)
        sheet.ground("the message", around([box for _, box in lines]))
    _buttons(sheet, flow, min(3, max(1, int(flow.box.width / sheet.em / 5))))
    sheet.caption(f'A dialog titled "{window.title}".' if window.title else "A dialog.")


def _about_line(sheet: Sheet, make, line: Line, box: Box) -> None:
    if make is _file:
        asked = ("Which file is named in the message?", "What is the name of the file?")
        sheet.ask("field", asked, line.text, box)
    elif make is _error:
        asked = ("What is the error code?", "Which error code is shown?")
        sheet.ask("field", asked, line.text.removeprefix(ERROR), box)


def phone(sheet: Sheet) -> None:
    """A phone: time and battery at the top, a list of people and what they say."""
    dice, page = sheet.dice, sheet.page
    width = min(page.width, max(page.height * dice.uniform(0.5, 0.65), sheet.em * 14))
    x = (page.width - width) / 2
    if width < page.width:
        page.rectangle(sheet.box, mix(sheet.style.accent, sheet.style.paper, 0.6))
        page.rectangle(Box(x, 0, x + width, page.height), (25, 25, 28))
        page.rectangle(Box(x + 4, 4, x + width - 4, page.height - 4), sheet.style.paper)
    flow = Flow(
        sheet, Box(x + sheet.em * 0.5, sheet.em * 0.3, x + width - sheet.em * 0.5, page.height - sheet.em * 0.4)
    )
    _status_bar(sheet, flow)
    head = flow.write(lambda dice: dice.pick(APPS), "large", colour=sheet.style.strong)
    if head is not None:
        sheet.ask("field", ("Which app is open?", "What is the heading?"), head[0].text, head[1])
        sheet.ground("the heading", head[1])
    _messages(sheet, flow)
    sheet.caption(f"A phone with the app {head[0].text} open." if head else "A phone's screen.")


def sidebar(sheet: Sheet) -> None:
    """A dark column of sections, one of them chosen, beside fields or switches."""
    dice, page = sheet.dice, sheet.page
    width = max(sheet.em * 6.5, page.width * 0.28)
    side = Box(0, 0, width, page.height)
    page.rectangle(side, (38, 42, 52))
    flow = Flow(sheet, Box(sheet.em * 0.4, sheet.em * 0.6, width - sheet.em * 0.3, page.height), 1.5)
    chosen, names = None, dice.sample(SECTIONS, dice.whole(2, 7))
    at = dice.whole(0, len(names) - 1)
    for number, name in enumerate(names):
        top = flow.y
        if number == at:
            page.rectangle(Box(0, top, width, top + sheet.height() * 1.1), sheet.style.accent)
        written = flow.write(name, colour=WHITE)
        if written is None:
            break
        sheet.ground(f'the section "{name}"', Box(0, top, width, top + sheet.height() * 1.1))
        if number == at:
            chosen = name
            sheet.ask("field", ("Which section is selected?", "Which section is highlighted?"), name, written[1])
    sheet.ground("the sidebar", side)
    content_flow = Flow(sheet, Box(width + sheet.em * 0.6, sheet.em * 0.5, page.width - sheet.em * 0.5, page.height))
    _switches(sheet, content_flow, dice.whole(2, 10))
    sheet.caption(f"Settings with the section {chosen} selected." if chosen else "Settings.")


def _window(sheet: Sheet, make, share: tuple[float, float], full: bool = True) -> Window:
    """A frame with a title bar. full: as high as it is wide of its page, else only as high as a message needs."""
    dice, page = sheet.dice, sheet.page
    width = min(page.width, max(page.width * dice.uniform(*share), sheet.em * 11))
    height = page.height * dice.uniform(*share) if full else min(page.height, sheet.height() * dice.uniform(8, 10))
    height = max(height, min(page.height, sheet.height() * 8))
    x, y = dice.uniform(0, page.width - width), dice.uniform(0, page.height - height)
    frame = Box(x, y, x + width, y + height)
    if full:
        page.rectangle(sheet.box, mix(sheet.style.accent, (140, 140, 140), 0.5))
    page.rectangle(frame, sheet.style.paper)
    bar = Box(x, y, x + width, y + sheet.height("bold") * 1.25)
    colour, ink = (sheet.style.accent, WHITE) if dice.chance(0.6) else (sheet.style.tint, sheet.style.ink)
    page.rectangle(bar, colour)
    page.rectangle(frame, sheet.style.muted, 1)
    _corner_buttons(sheet, bar, ink)
    line = sheet.fit(make, width - bar.height * 3.2, "bold")
    if line is not None:
        box = sheet.put(line, x + sheet.em * 0.4, y + (bar.height - line.height) / 2, colour=ink)
        asked = ("What is the title of the window?", "What does the title bar say?", "Which window is open?")
        sheet.ask("field", asked, line.text, box)
    sheet.ground("the title bar", bar)
    sheet.ground("the window", frame)
    return Window(frame, Box(x, bar.y1, x + width, y + height), line.text if line else None)


def _corner_buttons(sheet: Sheet, bar: Box, ink: Colour) -> None:
    """Small squares or coloured discs at the bar's right end."""
    side, discs = bar.height * 0.36, sheet.dice.chance(0.4)
    for at, colour in enumerate(((235, 90, 80), (240, 190, 60), (90, 190, 80))):
        x = bar.x1 - (at + 1) * bar.height * 0.85
        spot = Box(x, bar.y0 + (bar.height - side) / 2, x + side, bar.y0 + (bar.height + side) / 2)
        if discs:
            disc(sheet, spot, colour)
        else:
            sheet.page.rectangle(spot, ink, max(1, round(side / 8)))


def _switches(sheet: Sheet, flow: Flow, count: int) -> None:
    """Rows of a name and a switch that is on or off, or a value."""
    dice, pitch = sheet.dice, round(sheet.height() * sheet.dice.uniform(1.25, 1.8))
    drawn, on = 0, 0
    for name in dice.sample(SETTINGS, count):
        high = sheet.height() * 0.62
        line = sheet.fit(name, flow.box.width - high * 2.6)
        if line is None or not flow.fits(pitch):
            continue
        box = sheet.put(line, flow.box.x0, flow.y + (pitch - line.height) / 2)
        row = Box(flow.box.x0, flow.y, flow.box.x1, flow.y + pitch)
        flow.skip(pitch)
        state = dice.chance(0.5)
        switch = _switch(sheet, row, high, state)
        drawn, on = drawn + 1, on + state
        asked = ("Is {name} on or off?", "Is {name} switched on or off?")
        sheet.ask("compare", asked, "On" if state else "Off", switch, name=name)
        sheet.ground(f"the switch of {name}", switch)
        sheet.ground(f"the row of {name}", row | box)
    if drawn:
        sheet.ask("count", ("How many switches are there?", "How many settings are listed?"), str(drawn))
        sheet.ask("count", ("How many settings are on?", "How many switches are on?"), str(on))


def _switch(sheet: Sheet, row: Box, high: float, on: bool) -> Box:
    """A rounded switch at the row's end: coloured, with its knob at the right, when on."""
    y0 = (row.y0 + row.y1 - high) / 2
    box = Box(row.x1 - high * 1.9, y0, row.x1, y0 + high)
    colour = ON if on else OFF
    sheet.page.rectangle(Box(box.x0 + high / 2, box.y0, box.x1 - high / 2, box.y1), colour)
    ends = Box(box.x0, box.y0, box.x0 + high, box.y1), Box(box.x1 - high, box.y0, box.x1, box.y1)
    for end in ends:
        disc(sheet, end, colour)
    disc(sheet, ends[on].padded(-high * 0.12), WHITE)
    return box


def _menu(sheet: Sheet, flow: Flow) -> None:
    x, shown = flow.box.x0, []
    for name in sheet.dice.sample(MENUS, sheet.dice.whole(3, 7)):
        line = sheet.line(name, "small")
        if x + line.width > flow.box.x1:
            break
        box = sheet.put(line, x, flow.y)
        shown.append((name, box))
        sheet.ground(f'the menu "{name}"', box)
        x += line.width + sheet.em * 0.9
    if shown:
        flow.skip(sheet.height("small") * 1.1)
        flow.rule()
        sheet.ask("field", ("What is the first menu called?", "Which menu comes first?"), *shown[0])
        sheet.ask("field", ("What is the last menu called?", "Which menu comes last?"), *shown[-1])


def _files(sheet: Sheet, flow: Flow, count: int) -> None:
    """A table of files; their sizes and dates can be asked for."""
    dice = sheet.dice
    names = list(dict.fromkeys(_file(dice) for _ in range(count)))
    unit = dice.pick(("KB", "MB"))
    rows = [[name, f"{dice.whole(1, 999)} {unit}", content.date(dice)] for name in names]
    heads = ["Name", "Size", dice.pick(("Changed", "Date", "Modified"))]
    look = GridLook(dice.pick(("none", "zebra", "rows")), dice.pick(("tint", "rule", "bold")))
    grid = draw_grid(sheet, flow, heads, rows, "lrl", look, [2, 1])
    if grid is None:
        return
    sheet.ask("count", ("How many files are listed?", "Count the files."), str(len(grid.rows)))
    asked = {
        1: ("How large is {name}?", "What is the size of {name}?"),
        2: ("When was {name} changed?", "Date of {name}?"),
    }
    for number, row in enumerate(grid.rows):
        sheet.ground(f"the row of {row[0].text}", grid.row_box(number))
        for column, cell in zip(grid.columns[1:], row[1:], strict=True):
            sheet.ask("date" if column == 2 else "field", asked[column], cell.text, cell.box, name=row[0].text)
    asked = ("Which file is listed first?", "Read the name of the first file.")
    sheet.ask("field", asked, grid.rows[0][0].text, grid.rows[0][0].box)
    sheet.ground("the list of files", grid.box)


def _message(dice) -> str:
    return dice.pick(MESSAGES)


def _error(dice) -> str:
    return ERROR + content.code(dice)


def _file(dice) -> str:
    name = dice.pick((content.noun, content.syllables, content.short_code))(dice)
    return f"{name}{dice.pick(('', '', f'_{dice.whole(1, 99)}'))}.{dice.pick(ENDINGS)}"


def _buttons(sheet: Sheet, flow: Flow, most: int) -> None:
    """Buttons in a row at the window's bottom right."""
    x, names = flow.box.x1, []
    for at, name in enumerate(sheet.dice.sample(BUTTONS, sheet.dice.whole(1, most))):
        line = sheet.fit(name, flow.box.width * 0.45)
        if line is None:
            continue
        width = line.width + sheet.em * 1.2
        top = flow.box.y1 - line.height * 1.35
        if x - width < flow.box.x0 or top < flow.y:
            break
        button = Box(x - width, top, x, flow.box.y1)
        _button(sheet, line, button, filled=not at)
        names.append(name)
        x -= width + sheet.em * 0.4
    if names:
        sheet.ask("count", ("How many buttons does the dialog have?", "How many buttons are there?"), str(len(names)))


def _button(sheet: Sheet, line: Line, button: Box, filled: bool) -> None:
    ink = WHITE if filled else sheet.style.ink
    sheet.page.rectangle(button, sheet.style.accent if filled else sheet.style.tint)
    if not filled:
        sheet.page.rectangle(button, sheet.style.muted, 1)
    box = sheet.put(line, button.x0, button.y0 + (button.height - line.height) / 2, button.width, "centre", ink)
    sheet.ground(f'the button "{line.text}"', button)
    if filled:
        sheet.ask("field", ("Which button is highlighted?", "What does the coloured button say?"), line.text, box)


def _status_bar(sheet: Sheet, flow: Flow) -> None:
    time = sheet.fit(content.time, flow.box.width * 0.45, "small")
    level = sheet.fit(lambda dice: f"{dice.whole(3, 100)}%", flow.box.width * 0.3, "small")
    if time is None or level is None:
        return
    box = sheet.put(time, flow.box.x0, flow.y)
    sheet.ask("field", ("What time is it?", "Which time does the phone show?", "Read the clock."), time.text, box)
    charge = sheet.put(level, flow.box.x0, flow.y, flow.box.width, "right")
    sheet.ask("field", ("How full is the battery?", "What is the battery level?"), level.text, charge)
    flow.skip(time.height * 1.2)


def _messages(sheet: Sheet, flow: Flow) -> None:
    """People, each with a picture of coloured shapes, a line of text and a time."""
    dice, names = sheet.dice, []
    pitch = sheet.height("bold") + sheet.height() + sheet.em * 0.5
    for name in dice.sample(words.FIRST_NAMES, dice.whole(1, 9)):
        if not flow.fits(pitch):
            break
        face = Box(flow.box.x0, flow.y, flow.box.x0 + sheet.em * 1.8, flow.y + sheet.em * 1.8)
        x = face.x1 + sheet.em * 0.5
        when = sheet.fit(content.time, flow.box.width * 0.3, "small")
        line = sheet.fit(name, flow.box.x1 - x - (when.width if when else 0) - sheet.em * 0.5, "bold")
        said = sheet.fit(dice.pick((content.sentence, content.phrase)), flow.box.x1 - x)
        if line is None or said is None:
            continue
        disc(sheet, face, tuple(dice.whole(60, 200) for _ in range(3)))
        name_box = sheet.put(line, x, flow.y)
        said_box = sheet.put(said, x, flow.y + line.height)
        asked = ("What does {name} write?", "Read the message from {name}.", "What is the message of {name}?")
        sheet.ask("transcribe", asked, said.text, said_box, name=name)
        sheet.ask("label", ("Who wrote {said}?", "Who sent the message {said}?"), name, name_box, said=f'"{said.text}"')
        if when is not None:
            box = sheet.put(when, x, flow.y, flow.box.x1 - x, "right")
            sheet.ask("field", ("When did {name} write?", "At what time did {name} write?"), when.text, box, name=name)
        sheet.ground(f"the message from {name}", Box(flow.box.x0, flow.y, flow.box.x1, flow.y + pitch))
        names.append(name)
        flow.skip(pitch)
    if names:
        sheet.ask("count", ("How many messages are shown?", "How many people have written?"), str(len(names)))


SEEN = {"settings": settings, "application": application, "dialog": dialog, "phone": phone}
UNSEEN = {"sidebar": sidebar}
