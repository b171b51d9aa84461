"""Till receipts."""

from dataclasses import dataclass

from train.synth import content, fields
from train.synth.content import Money
from train.synth.fields import Field
from train.synth.layouts.parts import around, pair, strip
from train.synth.page import Box
from train.synth.questions import Entry, Series
from train.synth.sheet import Flow, Line, Sheet

EMS, MOST_EMS, DARK = 12, 64, 0
MOST = 18  # items
TOTAL = ("Total", "TOTAL", "Amount due", "To pay", "Sum", "Grand total", "Balance")
TAX = ("VAT", "Tax", "Sales tax", "VAT 20%", "incl. VAT")
PAID = ("Card", "Cash", "Visa", "Debit")
THANKS = ("Thank you!", "Please come again", "Have a nice day", "Goodbye!", "Keep this receipt")
LOOKUP = ("How much is the {name}?", "What does the {name} cost?", "What is the price of {name}?", "Price of {name}?")
MOST_COSTLY = ("Which item costs the most?", "What is the most expensive item?", "Name the dearest item.")
LEAST_COSTLY = ("Which item costs the least?", "What is the cheapest item?", "Name the item with the lowest price.")


@dataclass(frozen=True)
class Look:
    """align: of the shop's name. rule: between blocks, `line`, `dots` or none. columns: a heading over the items.
    counted: items have quantities. first: prices stand left of the names."""

    align: str = "centre"
    rule: str = "line"
    columns: bool = False
    counted: bool = False
    first: bool = False
    band: bool = False


def centred(sheet: Sheet) -> None:
    """Everything about the middle, dashed rules."""
    _receipt(sheet, Look(rule="dashes"))


def left(sheet: Sheet) -> None:
    """Head at the left, plain rules, quantities before the names."""
    _receipt(sheet, Look(align="left", counted=True))


def columns(sheet: Sheet) -> None:
    """Headed columns between rules."""
    _receipt(sheet, Look(columns=True, align=sheet.dice.pick(("left", "centre"))))


def band(sheet: Sheet) -> None:
    """The shop's name in a coloured band."""
    _receipt(sheet, Look(band=True, rule=""))


def prices_first(sheet: Sheet) -> None:
    """Prices at the left, names behind them, the total above the items."""
    _receipt(sheet, Look(align="right", first=True))


def _receipt(sheet: Sheet, look: Look) -> None:
    dice = sheet.dice
    flow = Flow(sheet, strip(sheet, (16, 34)), dice.uniform(1.0, 1.25))
    money, row = content.money(dice), sheet.height() * flow.leading
    shop = _head(sheet, flow, look)
    # Head and foot take what is left beyond three items and the total
    spare = int(flow.left / row) - 5
    details = _details(sheet, flow, min(spare, dice.whole(0, 5)))
    spare -= details
    address = spare > 2 and dice.chance(0.5)
    foot = dice.whole(0, 3) if spare > 3 else 0
    if address:
        spare -= 1 if flow.write(content.address, "small", look.align) else 0
    prices = _prices(dice, min(MOST, spare + 3 - foot - (1 if look.columns else 0)))
    total_area = Flow(sheet, flow.box, flow.leading)
    total_area.y = flow.y
    if look.first:  # its place is kept free until it is known which items have fitted
        flow.skip(round(sheet.height("large") * flow.leading))
    _rule(sheet, flow, look)
    prices = _items(sheet, flow, look, money, prices)
    if not look.first:
        _rule(sheet, flow, look)
        total_area = flow
    total = sum(prices) or content.cents(dice)  # on the smallest pages no item fits
    _sum(sheet, total_area, money, total)
    _foot(sheet, flow, money, total, foot, look)
    sheet.caption(f"A receipt from {shop}." if shop else "A receipt.")


def _head(sheet: Sheet, flow: Flow, look: Look) -> str | None:
    """The shop's name, where it fits."""
    make = sheet.dice.pick((content.shop, content.shop, content.company))
    if not look.band:
        written = flow.write(make, "large", look.align, sheet.style.strong)
    else:
        height = sheet.height("large")
        area = Box(flow.box.x0, flow.y, flow.box.x1, flow.y + height * 1.3)
        line = sheet.fit(make, area.width - sheet.em, "large")
        if line is None:
            return None
        sheet.page.rectangle(area, sheet.style.accent)
        y = area.y0 + (area.height - line.height) / 2
        written = line, sheet.put(line, area.x0, y, area.width, "centre", (255, 255, 255))
        flow.skip(area.height + sheet.em * 0.4)
    if written is None:
        return None
    line, box = written
    phrasings = ("What is the name of the shop?", "Which shop is the receipt from?", "Who issued the receipt?")
    sheet.ask("field", phrasings, line.text, box)
    sheet.ground("the shop's name", box)
    return line.text


def _details(sheet: Sheet, flow: Flow, count: int) -> int:
    """Date, time, cashier and the like; returns how many lines were written."""
    done = 0
    align = sheet.dice.pick(("left", "right"))
    for field in fields.drawn(sheet.dice, fields.RECEIPT, max(0, count), 0.1):
        area = Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1)
        box = pair(sheet, field, area, align=align, colon=sheet.dice.pick((":", "")))
        if box is not None:
            flow.skip(round(sheet.height() * flow.leading))
            done += 1
    return done


def _prices(dice, count: int) -> list[int]:
    """Different prices in cents."""
    prices: dict[int, None] = {}
    for _ in range(dice.whole(1 if count < 3 else 2, max(1, count))):
        prices[content.cents(dice, dice.pick((20, 100)))] = None
    return list(prices)


def _items(sheet: Sheet, flow: Flow, look: Look, money: Money, prices: list[int]) -> list[int]:
    """Draw the rows; returns the prices of those that fitted."""
    entries, drawn = [], []
    heads = _column_heads(sheet, flow) if look.columns else None
    for price in prices:
        amount = sheet.fit(money(price), flow.box.width * 0.6)
        if amount is None or not flow.fits(amount.height):
            continue
        room = flow.box.width - amount.width - sheet.em
        lead = sheet.line(f"{sheet.dice.whole(1, 9)} x ") if look.counted and room > 9 * sheet.em else None
        name = sheet.fit(content.goods, room - (lead.width if lead else 0))
        if name is None or any(entry.name == name.text for entry in entries):
            continue
        entries.append(_row(sheet, flow, look, lead, name, amount, price))
        drawn.append(price)
    if not entries:
        return drawn
    sheet.series.append(Series("items", LOOKUP, MOST_COSTLY, LEAST_COSTLY, 'the row of "{name}"', tuple(entries)))
    if heads is None:
        sheet.ground("the list of items", around([entry.box for entry in entries]))
    return drawn


def _row(sheet: Sheet, flow: Flow, look: Look, lead: Line | None, name: Line, amount: Line, price: int) -> Entry:
    x0, x1 = flow.box.x0, flow.box.x1
    if look.first:
        text_box = sheet.put(amount, x0, flow.y)
        name_box = sheet.put(name, x0, flow.y, flow.box.width, "right")
    else:
        text_box = sheet.put(amount, x0, flow.y, flow.box.width, "right")
        if lead is not None:
            sheet.put(lead, x0, flow.y)
        name_box = sheet.put(name, x0 + (lead.width if lead else 0), flow.y)
    box = Box(x0, flow.y, x1, flow.y + name.height)
    flow.skip(round(sheet.height() * flow.leading))
    return Entry(name.text, amount.text, price, box, name_box, text_box)


def _column_heads(sheet: Sheet, flow: Flow) -> bool | None:
    left_head, right_head = sheet.dice.pick((("Item", "Price"), ("Article", "Amount"), ("Description", "Total")))
    heads = sheet.fit(left_head, flow.box.width / 2, "bold"), sheet.fit(right_head, flow.box.width / 2, "bold")
    if None in heads or sum(head.width for head in heads) > flow.box.width or not flow.fits(heads[0].height):
        return None
    sheet.put(heads[0], flow.box.x0, flow.y)
    sheet.put(heads[1], flow.box.x0, flow.y, flow.box.width, "right")
    flow.skip(round(sheet.height("bold") * flow.leading))
    flow.rule()
    return True


def _sum(sheet: Sheet, flow: Flow, money: Money, total: int) -> None:
    field = Field("total", TOTAL, content.number, "total")
    area = Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1)
    for role in (sheet.dice.pick(("bold", "large")), "body"):
        if pair(sheet, field, area, align="right", role=role, colon=sheet.dice.pick(("", ":")), value=money(total)):
            flow.skip(round(sheet.height(role) * flow.leading))
            return


def _foot(sheet: Sheet, flow: Flow, money: Money, total: int, count: int, look: Look) -> None:
    """Tax, how it was paid, thanks."""
    area = flow.box
    for field, value in (
        (Field("tax", TAX, content.number), money(max(1, total // 6))),
        (Field("amount paid", PAID, content.number), money((total // 500 + 1) * 500)),
    )[: max(0, count - 1)]:
        if flow.fits(sheet.height()):
            below = Box(area.x0, flow.y, area.x1, area.y1)
            if pair(sheet, field, below, align="right", colon="", value=value):
                flow.skip(round(sheet.height() * flow.leading))
    if count:
        flow.skip(sheet.em * 0.5)
        flow.write(sheet.dice.pick(THANKS), "small", look.align)


def _rule(sheet: Sheet, flow: Flow, look: Look) -> None:
    if look.rule == "line":
        flow.rule()
    elif look.rule == "dashes":
        line = sheet.line("-", "small")
        count = int(flow.box.width // line.width)
        if flow.fits(sheet.em * 0.5):
            y, dash = flow.y + sheet.em * 0.25, max(2, line.width)
            for at in range(0, max(0, count - 1), 2):
                x = flow.box.x0 + at * dash
                sheet.page.horizontal(x, x + dash, y, sheet.style.muted)
            flow.skip(round(sheet.em * 0.5))
    else:
        flow.skip(round(sheet.em * 0.3))


SEEN = {"centred": centred, "left": left, "columns": columns, "band": band}
UNSEEN = {"prices_first": prices_first}
