"""What stands on pages: names, goods, dates, amounts, and strings that nobody could guess and a model has to read.

Every function takes a `Dice` and returns printable ASCII, plus the euro and pound signs of a currency.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from train.synth import words

T = TypeVar("T")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O: in a code they cannot be told from 1 and 0
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
SIGNS = "!#$%&()*+,-./:;<=>?@[]^_{}~"


class Dice:
    """Draws from one random stream; `Generator.random` is numpy's only call that is cheap for a single number."""

    def __init__(self, rng: np.random.Generator):
        self._random = rng.random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def whole(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        return low + self._random() * (high - low)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._random() * len(choices))]

    def sample(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different ones in random order, or all where there are fewer."""
        pool = list(choices)
        for place in range(min(count, len(pool))):
            other = self.whole(place, len(pool) - 1)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]


Maker = Callable[[Dice], str]


def noun(dice: Dice) -> str:
    return dice.pick(words.NOUNS)


def first_name(dice: Dice) -> str:
    return dice.pick(words.FIRST_NAMES)


def surname(dice: Dice) -> str:
    """From the list, or made of syllables."""
    return dice.pick(words.SURNAMES) if dice.chance(0.8) else syllables(dice).capitalize()


def person(dice: Dice) -> str:
    first, last = first_name(dice), surname(dice)
    style = dice.whole(0, 5)
    if style == 0:
        return f"{first[0]}. {last}"
    if style == 1:
        return f"{last}, {first}"
    return f"{first} {last}"


def city(dice: Dice) -> str:
    return dice.pick(words.CITIES) if dice.chance(0.8) else syllables(dice).capitalize()


def street(dice: Dice) -> str:
    """A street's name without a number."""
    name = dice.pick(words.STREET_NAMES) if dice.chance(0.7) else surname(dice)
    return f"{name} {dice.pick(words.STREET_KINDS)}"


def address(dice: Dice) -> str:
    if dice.chance(0.5):
        return f"{dice.whole(1, 399)} {street(dice)}"
    return f"{street(dice)} {dice.whole(1, 399)}"


def town(dice: Dice) -> str:
    """Postcode and city."""
    if dice.chance(0.5):
        return f"{dice.whole(10000, 99999)} {city(dice)}"
    return f"{city(dice)} {_letters(dice, 2)}{dice.whole(1, 99)} {dice.whole(1, 9)}{_letters(dice, 2)}"


def company(dice: Dice) -> str:
    style = dice.whole(0, 4)
    if style == 0:
        return f"{surname(dice)} {dice.pick(words.COMPANY_KINDS)}"
    if style == 1:
        return f"{dice.pick(words.ADJECTIVES).capitalize()} {noun(dice).capitalize()} {dice.pick(words.COMPANY_KINDS)}"
    if style == 2:
        return f"{surname(dice)} & {surname(dice)}"
    if style == 3:
        return f"{noun(dice).capitalize()}{dice.pick(('tech', 'soft', 'line', 'works', 'lab', 'mart', 'port'))}"
    return f"{syllables(dice).capitalize()} {dice.pick(words.COMPANY_KINDS)}"


def shop(dice: Dice) -> str:
    style = dice.whole(0, 3)
    kind = dice.pick(words.SHOP_KINDS)
    if style == 0:
        return f"{first_name(dice)}'s {kind}"
    if style == 1:
        return f"{dice.pick(words.ADJECTIVES).capitalize()} {noun(dice).capitalize()} {kind}"
    if style == 2:
        return f"{syllables(dice).capitalize()} {kind}"
    return f"{noun(dice).capitalize()} {kind}"


def goods(dice: Dice) -> str:
    """Something sold: from the list, a noun with an adjective, or an article nobody has heard of."""
    style = dice.whole(0, 9)
    if style < 5:
        return dice.pick(words.GOODS)
    if style < 7:
        return f"{dice.pick(words.ADJECTIVES)} {noun(dice)}"
    if style < 9:
        return f"{noun(dice)} {short_code(dice)}"
    return f"{syllables(dice)} {dice.whole(2, 999)}"


def service(dice: Dice) -> str:
    if dice.chance(0.6):
        return dice.pick(words.SERVICES)
    return f"{dice.pick(words.SERVICES)} {short_code(dice)}"


IRREGULAR = {
    "mouse": "mice",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "wolf": "wolves",
    "scarf": "scarves",
}
IRREGULAR |= {"shelf": "shelves", "sheep": "sheep", "deer": "deer", "salmon": "salmon"}


def plural(word: str) -> str:
    """The plural of a noun of the list."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("y") and word[-2] not in VOWELS:
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


def syllables(dice: Dice) -> str:
    """A word of no language: two or three syllables."""
    parts = [dice.pick(CONSONANTS) + dice.pick(VOWELS) for _ in range(dice.whole(2, 3))]
    return "".join(parts) + (dice.pick("lmnrstx") if dice.chance(0.5) else "")


def short_code(dice: Dice) -> str:
    return f"{_letters(dice, dice.whole(1, 2))}{dice.whole(2, 99)}"


def code(dice: Dice) -> str:
    """An id as printed on papers: `KX-20418`, `7F3-A91`, `RT40518`."""
    style = dice.whole(0, 4)
    if style == 0:
        return f"{_letters(dice, 2)}-{dice.whole(1000, 99999)}"
    if style == 1:
        return f"{_letters(dice, 1)}{dice.whole(10, 99)}-{dice.whole(100, 999)}"
    if style == 2:
        return f"{_letters(dice, dice.whole(2, 3))}{dice.whole(100, 99999)}"
    if style == 3:
        return f"{dice.whole(100, 9999)}/{dice.whole(10, 99)}"
    return str(dice.whole(10000, 99999999))


def number(dice: Dice) -> str:
    return str(dice.whole(0, 10 ** dice.whole(1, 5)))


def quantity(dice: Dice) -> str:
    """A measured value with its unit."""
    value = f"{dice.uniform(0.1, 99):.1f}" if dice.chance(0.5) else str(dice.whole(1, 500))
    return f"{value} {dice.pick(words.UNITS)}"


def percent(dice: Dice) -> str:
    return f"{dice.whole(1, 99)}%" if dice.chance(0.6) else f"{dice.uniform(0, 99):.1f}%"


def time(dice: Dice) -> str:
    hour, minute = dice.whole(0, 23), dice.whole(0, 59)
    if dice.chance(0.7):
        return f"{hour:02d}:{minute:02d}"
    return f"{hour % 12 or 12}:{minute:02d} {'AM' if hour < 12 else 'PM'}"


def date(dice: Dice) -> str:
    return dice.pick(DATES)(dice.whole(1, 28), dice.whole(1, 12), dice.whole(1985, 2035))


DATES: tuple[Callable[[int, int, int], str], ...] = (
    lambda day, month, year: f"{day:02d}.{month:02d}.{year}",
    lambda day, month, year: f"{day:02d}/{month:02d}/{year}",
    lambda day, month, year: f"{year}-{month:02d}-{day:02d}",
    lambda day, month, year: f"{day} {words.MONTHS[month - 1]} {year}",
    lambda day, month, year: f"{words.MONTHS[month - 1]} {day}, {year}",
    lambda day, month, year: f"{day} {words.MONTHS[month - 1][:3]} {year}",
    lambda day, month, year: f"{words.MONTHS[month - 1][:3]} {day}, {year}",
    lambda day, month, year: f"{day:02d}.{month:02d}.{year % 100:02d}",
    lambda day, month, year: f"{month}/{day}/{year}",
)


def phone(dice: Dice) -> str:
    style = dice.whole(0, 3)
    if style == 0:
        return f"+{dice.whole(1, 99)} {dice.whole(100, 999)} {dice.whole(100000, 999999)}"
    if style == 1:
        return f"({dice.whole(200, 999)}) {dice.whole(200, 999)}-{dice.whole(1000, 9999)}"
    if style == 2:
        return f"0{dice.whole(10, 999)} {dice.whole(10000, 9999999)}"
    return f"{dice.whole(200, 999)}-{dice.whole(1000, 9999)}"


def email(dice: Dice) -> str:
    return f"{first_name(dice).lower()}@{noun(dice)}.{dice.pick(('com', 'org', 'net', 'io', 'de', 'co.uk'))}"


def website(dice: Dice) -> str:
    return f"www.{noun(dice)}{noun(dice)}.{dice.pick(('com', 'org', 'net', 'eu'))}"


def token(dice: Dice) -> str:
    """One word of any sort: a noun in some case, a name, a number, a code, or made up."""
    style = dice.whole(0, 11)
    if style < 4:
        return cased(dice, noun(dice))
    if style < 6:
        return cased(dice, syllables(dice))
    if style == 6:
        return number(dice)
    if style == 7:
        return short_code(dice)
    if style == 8:
        return _letters(dice, dice.whole(2, 4))
    if style == 9:
        return first_name(dice)
    if style == 10:
        return dice.pick((date, time, percent, phone))(dice).replace(" ", "")
    return scramble(dice)


def scramble(dice: Dice) -> str:
    """Characters of every sort, in no order: the rare signs are learnt here. None that looks like another."""
    pool = LETTERS + "abcdefghjkmnpqrstuvwxyz" + "23456789" + SIGNS
    return "".join(dice.pick(pool) for _ in range(dice.whole(3, 6)))


def cased(dice: Dice, word: str) -> str:
    style = dice.whole(0, 3)
    return word.upper() if style == 0 else word.capitalize() if style == 1 else word


def heading(dice: Dice) -> str:
    style = dice.whole(0, 3)
    if style == 0:
        return f"{dice.pick(words.ADJECTIVES)} {noun(dice)}".title()
    if style == 1:
        return f"{noun(dice)} {noun(dice)}".title()
    if style == 2:
        return f"{noun(dice).capitalize()} {short_code(dice)}"
    return f"{noun(dice).capitalize()} {dice.pick(('report', 'list', 'plan', 'notes', 'review', 'overview', 'survey'))}"


def sentence(dice: Dice) -> str:
    """A short sentence of the shape "The old miller paints 14 doors."."""
    style = dice.whole(0, 5)
    if style == 0:
        return f"{first_name(dice)} {dice.pick(words.VERBS)} the {dice.pick(words.ADJECTIVES)} {noun(dice)}."
    if style == 1:
        return f"Call {first_name(dice)} at {time(dice)}."
    if style == 2:
        return f"Bring {dice.whole(2, 60)} {plural(noun(dice))} to {city(dice)}."
    if style == 3:
        return f"Room {dice.whole(1, 499)} is for {first_name(dice)}."
    if style == 4:
        return f"The {noun(dice)} {dice.pick(words.VERBS)} the {noun(dice)}."
    return f"Send {short_code(dice)} to {surname(dice)}."


def phrase(dice: Dice) -> str:
    """One or two words for a line of a list."""
    style = dice.whole(0, 3)
    if style == 0:
        return f"{dice.pick(words.ADJECTIVES)} {noun(dice)}"
    if style == 1:
        return f"{noun(dice)} {dice.whole(2, 99)}"
    if style == 2:
        return noun(dice)
    return f"{first_name(dice)} {dice.pick(words.VERBS)} {plural(noun(dice))}"


@dataclass(frozen=True)
class Money:
    """How a page writes amounts. pattern: with `{}` for the digits. comma: decimal comma, as on the Continent."""

    pattern: str
    comma: bool = False

    def __call__(self, cents: int) -> str:
        digits = f"{cents / 100:,.2f}"
        if self.comma:
            digits = digits.translate(str.maketrans(",.", ".,"))
        return self.pattern.format(digits)


CURRENCIES = (
    *(Money("${}"), Money("${}"), Money("£{}"), Money("€{}"), Money("{}"), Money("USD {}"), Money("{} GBP")),
    *(Money("{} €", True), Money("{} EUR", True), Money("CHF {}"), Money("{}", True), Money("€ {}", True)),
)


def money(dice: Dice) -> Money:
    return dice.pick(CURRENCIES)


def cents(dice: Dice, high: int = 100) -> int:
    """A price in cents, up to `high` units of the currency; small ones are commoner, round ones are frequent."""
    value = int(100 * high ** dice.uniform(0.1, 1.0))
    style = dice.whole(0, 3)
    if style == 0:
        return max(100, value // 100 * 100 - 1)
    return max(10, value // 10 * 10) if style == 1 else value


def _letters(dice: Dice, count: int) -> str:
    return "".join(dice.pick(LETTERS) for _ in range(count))
