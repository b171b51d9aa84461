"""Fields of papers: what they are called in a question, what is printed for them, and what they hold."""

from dataclasses import dataclass

from train.synth import content
from train.synth.content import Dice, Maker


@dataclass(frozen=True)
class Field:
    """name: as a question says it. labels: as papers print it. kind: of the question that reads it."""

    name: str
    labels: tuple[str, ...]
    make: Maker
    kind: str = "field"


def _choice(*choices: str) -> Maker:
    return lambda dice: dice.pick(choices)


def _digits(low: int, high: int) -> Maker:
    return lambda dice: str(dice.whole(low, high))


INVOICE = (
    Field("invoice number", ("Invoice No.", "Invoice #", "Invoice number", "Inv. no.", "Number"), content.code),
    Field("invoice date", ("Invoice date", "Date", "Issued", "Date of issue"), content.date, "date"),
    Field("due date", ("Due date", "Due", "Pay by", "Payable until"), content.date, "date"),
    Field("customer number", ("Customer No.", "Customer ID", "Client no.", "Account"), content.code),
    Field("order number", ("Order No.", "Order", "Your order", "PO number"), content.code),
    Field("contact person", ("Contact", "Contact person", "Clerk", "Your contact"), content.person),
    Field("payment terms", ("Terms", "Payment terms"), _choice("Net 14", "Net 30", "Net 60", "10 days", "Prepaid")),
    Field("delivery date", ("Delivered", "Delivery date", "Ship date"), content.date, "date"),
    Field("phone number", ("Phone", "Tel.", "Telephone"), content.phone),
    Field("reference", ("Reference", "Ref.", "Our ref."), content.code),
)
RECEIPT = (
    Field("receipt number", ("Receipt", "Receipt no.", "Bon", "No."), content.code),
    Field("date", ("Date",), content.date, "date"),
    Field("time", ("Time",), content.time),
    Field("cashier", ("Cashier", "Served by", "Clerk"), content.first_name),
    Field("table number", ("Table",), _digits(1, 60)),
    Field("till", ("Till", "Register", "POS"), _digits(1, 40)),
)
FORM = (
    Field("first name", ("First name", "Given name", "Forename"), content.first_name),
    Field("surname", ("Surname", "Last name", "Family name"), content.surname),
    Field("date of birth", ("Date of birth", "Born", "Birth date"), content.date, "date"),
    Field("place of birth", ("Place of birth", "Birthplace"), content.city),
    Field("street", ("Street", "Address", "Street and number"), content.address),
    Field("city", ("City", "Town", "Residence"), content.city),
    Field("postcode", ("Postcode", "ZIP code", "Postal code"), _digits(10000, 99999)),
    Field("phone number", ("Phone", "Telephone", "Mobile"), content.phone),
    Field("email address", ("Email", "E-mail"), content.email),
    Field("occupation", ("Occupation", "Profession"), _choice("Baker", "Nurse", "Pilot", "Clerk", "Tailor", "Teacher")),
    Field("employer", ("Employer", "Company"), content.company),
    Field("passport number", ("Passport No.", "Document no.", "ID number"), content.code),
    Field("member number", ("Member no.", "Membership", "Member ID"), content.code),
    Field("department", ("Department", "Dept.", "Unit"), content.noun),
    Field("room", ("Room", "Room no."), content.short_code),
    Field("height", ("Height",), lambda dice: f"{dice.whole(140, 205)} cm"),
    Field("weight", ("Weight",), lambda dice: f"{dice.whole(45, 120)} kg"),
    Field("arrival date", ("Arrival", "Date of arrival"), content.date, "date"),
    Field("departure date", ("Departure", "Leaving on"), content.date, "date"),
    Field("licence plate", ("Licence plate", "Car registration"), content.code),
    Field("emergency contact", ("Emergency contact", "In case of emergency"), content.person),
    Field("bank account", ("Account", "Account no."), _digits(10000000, 999999999)),
    Field("reference", ("Reference", "Ref.", "File no."), content.code),
    Field("blood group", ("Blood group",), _choice("A+", "A-", "B+", "B-", "AB+", "0+", "0-")),
)


def unknown(dice: Dice) -> Field:
    """A field nobody has heard of: its label is a word, its value anything."""
    word = dice.pick((content.noun, content.syllables))(dice)
    make = dice.pick((content.code, content.number, content.quantity, content.token, content.time, content.percent))
    return Field(word, (word.capitalize(),), make)


def drawn(dice: Dice, fields: tuple[Field, ...], count: int, share_unknown: float = 0.25) -> list[Field]:
    """`count` fields with different names, some of them unknown ones, in random order."""
    known = dice.sample(fields, count)
    strange = [unknown(dice) for _ in range(count)]
    picked: dict[str, Field] = {}
    while len(picked) < count and (known or strange):
        use = strange if strange and (not known or dice.chance(share_unknown)) else known
        field = use.pop()
        picked.setdefault(field.name, field)
    return list(picked.values())
