"""Invoices."""

from collections.abc import Callable

from train.synth import content, fields
from train.synth.content import Money
from train.synth.fields import Field
from train.synth.layouts.grid import GridLook, draw_grid
from train.synth.layouts.parts import around, logo, margin, pair
from train.synth.page import WHITE, Box
from train.synth.questions import Entry, Series
from train.synth.sheet import Flow, Line, Sheet

EMS, MOST_EMS, DARK = 12, 110, 0
MOST = 14  # positions
TITLES = ("INVOICE", "Invoice", "Bill", "Tax invoice", "Statement")
TO = ("Bill to", "To", "Customer", "Sold to", "Client")
TOTAL = ("Total", "TOTAL", "Amount due", "Total due", "Grand total", "Please pay", "Balance due")
NAMES = (
    *(("Description", "Qty", "Price", "Amount"), ("Item", "Quantity", "Unit price", "Total")),
    *(("Article", "Pcs", "Each", "Sum"), ("Service", "Hours", "Rate", "Line total")),
)
LOOKUP = ("What is the amount for {name}?", "How much is charged for {name}?", "Read the amount of {name}.")
MOST_COSTLY = ("Which position has the highest amount?", "Which item costs the most?", "What is the largest position?")
LEAST_COSTLY = (
    "Which position has the lowest amount?",
    "Which item costs the least?",
    "What is the smallest position?",
)


def classic(sheet: Sheet) -> None:
    """Seller at the left, title and numbers at the right."""
    flow = Flow(sheet, sheet.box.padded(-margin(sheet)), 1.15)
    left, right = _beside(sheet, flow, 0.42)
    seller = _seller(sheet, left, "left", sheet.style.strong)
    _title(sheet, right, "right")
    _meta(sheet, right, "right")
    _join(flow, left, right)
    _customer(sheet, flow)
    _positions_and_total(sheet, flow, seller)


def band(sheet: Sheet) -> None:
    """Title and seller in a coloured band across the page."""
    height = min(sheet.page.height * 0.2, sheet.height("large") * 2.4)
    area = Box(0, 0, sheet.page.width, height)
    sheet.page.rectangle(area, sheet.style.accent)
    air = margin(sheet)
    inner = Flow(sheet, Box(air, (height - sheet.height("large")) / 2, sheet.page.width - air, height), 1.1)
    half = inner.box.width / 2
    seller = None
    left = Flow(sheet, Box(air, inner.y, air + half * 1.1, height), 1.1)
    seller = _seller(sheet, left, "left", WHITE, short=True)
    right = Flow(sheet, Box(air + half * 1.15, inner.y, sheet.page.width - air, height), 1.1)
    _title(sheet, right, "right", WHITE)
    flow = Flow(sheet, Box(air, height + sheet.em * 0.5, sheet.page.width - air, sheet.page.height - air), 1.15)
    left, right = _beside(sheet, flow, 0.5)
    _customer(sheet, left)
    _meta(sheet, right, "left")
    _join(flow, left, right)
    _positions_and_total(sheet, flow, seller)


def sidebar(sheet: Sheet) -> None:
    """Numbers in a coloured column at the left, where the page is wide enough."""
    width = sheet.page.width * 0.3
    air = margin(sheet)
    if width < sheet.em * 11:
        classic(sheet)
        return
    sheet.page.rectangle(Box(0, 0, width, sheet.page.height), sheet.style.tint)
    side = Flow(sheet, Box(air / 2, air, width - air / 2, sheet.page.height - air), 1.3)
    if sheet.dice.chance(0.6):
        edge = min(width * 0.4, sheet.em * 4)
        logo(sheet, Box(side.box.x0, side.y, side.box.x0 + edge, side.y + edge))
        side.skip(edge + sheet.em)
    seller = _seller(sheet, side, "left", sheet.style.ink)
    side.skip(sheet.em)
    _meta(sheet, side, "left", stacked=True)
    flow = Flow(sheet, Box(width + air, air, sheet.page.width - air, sheet.page.height - air), 1.15)
    _title(sheet, flow, "left")
    _customer(sheet, flow)
    _positions_and_total(sheet, flow, seller)


def letter(sheet: Sheet) -> None:
    """Centred letterhead, then numbers in one column, the total in a box."""
    flow = Flow(sheet, sheet.box.padded(-margin(sheet)), 1.15)
    head = Flow(sheet, Box(flow.box.x0, flow.y, flow.box.x1, flow.y + flow.left * 0.45), 1.1)
    seller = _seller(sheet, head, "centre", sheet.style.strong)
    head.rule(sheet.style.accent, 2)
    _title(sheet, head, "left")
    _meta(sheet, head, "left")
    flow.y = head.y
    _customer(sheet, flow)
    _positions_and_total(sheet, flow, seller, framed=True)


def total_first(sheet: Sheet) -> None:
    """What is due in large figures at the top, positions below, amounts in the first column."""
    flow = Flow(sheet, sheet.box.padded(-margin(sheet)), 1.15)
    head = Flow(sheet, Box(flow.box.x0, flow.y, flow.box.x1, flow.y + flow.left * 0.5), 1.1)
    _title(sheet, head, "centre")
    money, prices = content.money(sheet.dice), _prices(sheet, 8)
    place = Flow(sheet, Box(flow.box.x0, head.y, flow.box.x1, head.y + sheet.height("large") + sheet.em), 1.1)
    head.skip(place.box.height + sheet.em * 0.2)  # kept free until it is known which positions have fitted
    _meta(sheet, head, "right")
    flow.y = head.y + sheet.em * 0.4
    foot = sheet.height("bold") * 2.4
    body = Flow(sheet, Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1 - foot), flow.leading)
    drawn = _positions(sheet, body, money, prices, amounts_first=True)
    _total(sheet, place, money, sum(drawn) or content.cents(sheet.dice, 1000), framed=True)
    flow.y = max(body.y, flow.box.y1 - foot)
    seller = _seller(sheet, flow, "centre", sheet.style.strong)
    sheet.caption(f"An invoice from {seller}." if seller else "An invoice.")


def _beside(sheet: Sheet, flow: Flow, share: float) -> tuple[Flow, Flow]:
    """The upper part of the page as two columns, or twice as one where the page is narrow."""
    bottom = flow.y + flow.left * 0.42
    if flow.box.width < 26 * sheet.em:
        one = Flow(sheet, Box(flow.box.x0, flow.y, flow.box.x1, bottom), flow.leading)
        return one, one
    middle = flow.box.x0 + flow.box.width * share
    gap = sheet.em * 0.8
    return (
        Flow(sheet, Box(flow.box.x0, flow.y, middle - gap, bottom), flow.leading),
        Flow(sheet, Box(middle + gap, flow.y, flow.box.x1, bottom), flow.leading),
    )


def _join(flow: Flow, left: Flow, right: Flow) -> None:
    flow.y = max(left.y, right.y) + flow.sheet.em * 0.5


def _seller(sheet: Sheet, flow: Flow, align: str, colour, short: bool = False) -> str | None:
    written = flow.write(content.company, "large", align, colour)
    if written is None:
        return None
    line, box = written
    sheet.ask(
        "field", ("Who issued the invoice?", "Which company sent the invoice?", "Who is the seller?"), line.text, box
    )
    sheet.ground("the seller's name", box)
    if not short and flow.left > 6 * sheet.height():
        for make in (content.address, content.town, content.website)[: sheet.dice.whole(0, 3)]:
            flow.write(make, "small", align)
    return line.text


def _title(sheet: Sheet, flow: Flow, align: str, colour=None) -> None:
    written = flow.write(lambda dice: dice.pick(TITLES), "large", align, colour)
    if written is not None:
        sheet.ground("the title", written[1])


def _meta(sheet: Sheet, flow: Flow, align: str, stacked: bool = False) -> None:
    """Number, dates and references: labels and values in lines, or one below the other."""
    dice, row = sheet.dice, sheet.height() * flow.leading
    most = int(flow.left / row / (2 if stacked else 1))
    first = fields.INVOICE[0]
    others = [
        field for field in fields.drawn(dice, fields.INVOICE[1:], dice.whole(1, 6), 0.1) if field.name != first.name
    ]
    start = flow.box.x0 + flow.box.width * 0.5
    colon = dice.pick((":", ""))
    for field in [first, *others][: max(1, most)]:
        area = Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1)
        if stacked:
            _stacked_pair(sheet, flow, field)
        elif pair(sheet, field, area, start if align == "left" else None, align, colon=colon):
            flow.skip(round(row))


def _stacked_pair(sheet: Sheet, flow: Flow, field: Field) -> None:
    label = sheet.fit(sheet.dice.pick(field.labels), flow.box.width, "small")
    value = sheet.fit(field.make, flow.box.width, "bold")
    if label is None or value is None or not flow.fits(label.height + value.height):
        return
    label_box = sheet.put(label, flow.box.x0, flow.y)
    value_box = sheet.put(value, flow.box.x0, flow.y + label.height)
    sheet.fact(field.name, value, value_box, label.text, label_box, field.kind)
    flow.skip(label.height + value.height + sheet.em * 0.4)


def _customer(sheet: Sheet, flow: Flow) -> None:
    """Who has to pay; left out where little room is left for the positions."""
    if flow.left < 9 * sheet.height():
        return
    top = flow.y
    width = min(flow.box.width, 24 * sheet.em)
    column = Flow(sheet, Box(flow.box.x0, top, flow.box.x0 + width, flow.box.y1), flow.leading)
    head = column.write(sheet.dice.pick(TO), sheet.dice.pick(("bold", "small")))
    name = column.write(sheet.dice.pick((content.person, content.company)))
    if head is None or name is None:
        return
    sheet.ask("field", ("Who is the invoice for?", "Who is the customer?", "Who has to pay?"), name[0].text, name[1])
    lines: list[tuple[Line, Box]] = [head, name]
    for make, prompt in ((content.address, "What is the customer's street address?"), (content.town, "")):
        written = column.write(make)
        if written is not None:
            lines.append(written)
            if prompt:
                sheet.ask("field", (prompt, "Where does the customer live?"), written[0].text, written[1])
    sheet.ground("the customer's address", around([box for _, box in lines]))
    flow.y = column.y + sheet.em * 0.5


def _positions_and_total(sheet: Sheet, flow: Flow, seller: str | None, framed: bool = False) -> None:
    money = content.money(sheet.dice)
    row = sheet.height() * flow.leading
    foot = sheet.height("large") * 1.6 + (2.2 * row if flow.left > 10 * row else 0)
    body = Flow(sheet, Box(flow.box.x0, flow.y, flow.box.x1, flow.box.y1 - foot), flow.leading)
    rows = min(MOST, int(body.left / row) - 1)
    drawn = _positions(sheet, body, money, _prices(sheet, rows))
    flow.y = body.y + sheet.em * 0.4
    if drawn and flow.left > sheet.height("large") + 3 * row:
        tax = round(sum(drawn) * sheet.dice.pick((0.05, 0.07, 0.1, 0.19, 0.2)))
        for name, labels, value in (("subtotal", ("Subtotal", "Net", "Sum"), sum(drawn)), ("tax", ("VAT", "Tax"), tax)):
            area = _right_part(sheet, flow)
            if pair(sheet, Field(name, labels, content.number), area, align="right", value=money(value)):
                flow.skip(round(row))
        drawn.append(tax)
    amount = sum(drawn) if drawn else content.cents(sheet.dice, 1000)
    _total(sheet, flow, money, amount, framed)
    if flow.left > 2 * row and sheet.dice.chance(0.6):
        account = Field("bank account", ("Account", "IBAN", "Bank account"), lambda dice: f"{content.code(dice)}")
        if pair(sheet, account, Box(flow.box.x0, flow.y + row * 0.5, flow.box.x1, flow.box.y1), role="small"):
            flow.skip(row * 1.5)
    sheet.caption(f"An invoice from {seller}." if seller else "An invoice.")


def _prices(sheet: Sheet, most: int) -> list[int]:
    """Different amounts in cents."""
    count = sheet.dice.whole(min(2, max(1, most)), max(1, most))
    return list({content.cents(sheet.dice, 2000): None for _ in range(count)})


def _positions(sheet: Sheet, flow: Flow, money: Money, prices: list[int], amounts_first: bool = False) -> list[int]:
    """The table of what is charged; returns the amounts of the rows that fitted."""
    dice = sheet.dice
    heads = dice.pick(NAMES)
    make: Callable = content.service if heads[0] == "Service" else content.goods
    rows = []
    for price in prices:
        count = dice.whole(1, 9)
        rows.append([make(dice), str(count), money(max(1, price // count)), money(price)])
    amount_at, order = (0, [3, 0, 1, 2]) if amounts_first else (3, [0, 1, 2, 3])
    name_at = 1 if amounts_first else 0
    aligns = "".join("lrrr"[at] for at in order)
    look = GridLook(dice.pick(("rows", "zebra", "grid", "none")), dice.pick(("band", "tint", "rule")))
    spare = [order.index(2), order.index(1)]
    rows = [[row[at] for at in order] for row in rows]
    grid = draw_grid(sheet, flow, [heads[at] for at in order], rows, aligns, look, spare)
    if grid is None:
        return []
    name_at, amount_at = grid.columns.index(name_at), grid.columns.index(amount_at)
    entries = [
        Entry(row[name_at].text, row[amount_at].text, price, grid.row_box(number), row[name_at].box, row[amount_at].box)
        for number, (row, price) in enumerate(zip(grid.rows, prices, strict=False))
    ]
    sheet.series.append(Series("positions", LOOKUP, MOST_COSTLY, LEAST_COSTLY, 'the row of "{name}"', tuple(entries)))
    sheet.ground("the table of positions", grid.box)
    return prices[: len(entries)]


def _right_part(sheet: Sheet, flow: Flow) -> Box:
    width = min(flow.box.width, max(flow.box.width * 0.45, 16 * sheet.em))
    return Box(flow.box.x1 - width, flow.y, flow.box.x1, flow.box.y1)


def _total(sheet: Sheet, flow: Flow, money: Money, amount: int, framed: bool) -> None:
    """The amount due, in bold or in a frame."""
    field = Field("total", TOTAL, content.number, "total")
    area = _right_part(sheet, flow)
    air = max(2, sheet.em * 0.25) if framed else 0
    for role in ("large", "bold", "body"):
        height = sheet.height(role) + 2 * air
        if not flow.fits(height):
            continue
        inner = Box(area.x0 + air, area.y0 + air, area.x1 - air, area.y1 - air)
        box = pair(sheet, field, inner, align="right", role=role, colon=sheet.dice.pick((":", "")), value=money(amount))
        if box is not None:
            if framed:
                sheet.page.rectangle(box.padded(air), sheet.style.muted, 1)
            flow.skip(round(height * 1.1))
            return


SEEN = {"classic": classic, "band": band, "sidebar": sidebar, "letter": letter}
UNSEEN = {"total_first": total_first}
