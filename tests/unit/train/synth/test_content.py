"""Contents: enough of them, in characters that every typeface has, and mostly not to be guessed."""

import string

import numpy as np
import pytest

from train.synth import content, words
from train.synth.content import Dice
from train.synth.flags import FLAGS, flag
from train.synth.fonts import SPLITS, faces, glyphs

ALLOWED = set(string.printable[:95]) | set("€£")
MAKERS = [
    *(content.noun, content.person, content.city, content.street, content.address, content.town, content.company),
    *(content.shop, content.goods, content.service, content.code, content.number, content.quantity, content.percent),
    *(content.time, content.date, content.phone, content.email, content.website, content.token, content.scramble),
    *(content.heading, content.sentence, content.phrase),
]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_texts_are_printable_and_various(make):
    dice = Dice(np.random.default_rng(0))
    made = [make(dice) for _ in range(300)]
    assert all(text and text == text.strip() and set(text) <= ALLOWED for text in made)
    assert len(set(made)) > 60


def test_word_lists_are_long_and_without_repetition():
    for listed, least in ((words.NOUNS, 400), (words.FIRST_NAMES, 150), (words.SURNAMES, 150), (words.CITIES, 100)):
        assert len(set(listed)) == len(listed) >= least


@pytest.mark.parametrize("split", SPLITS)
def test_every_typeface_has_every_character(split: str):
    for face in faces(split):
        for weight in (face, face.bold()):
            drawn = glyphs(weight, 32)
            missing = drawn["\uffff"].bitmap  # what is drawn for a character that the font lacks
            for character in sorted(ALLOWED - {" "}):
                bitmap = drawn[character].bitmap
                assert bitmap.size and not np.array_equal(bitmap, missing), (weight.family, weight.weight, character)


def test_dice_are_fair_and_stay_in_their_range():
    dice = Dice(np.random.default_rng(0))
    assert {dice.whole(2, 5) for _ in range(200)} == {2, 3, 4, 5}
    assert sorted(dice.sample(range(9), 9)) == list(range(9)) and len(dice.sample(range(9), 20)) == 9
    assert 0.2 < np.mean([dice.chance(0.3) for _ in range(2000)]) < 0.4


def test_amounts_are_printed_as_their_currency_is():
    assert content.Money("${}")(123456) == "$1,234.56"
    assert content.Money("{} €", True)(123456) == "1.234,56 €"


def test_flags_look_different_from_one_another():
    drawn = {country: flag(country, 24) for country in FLAGS}
    assert len(drawn) >= 30
    names = list(drawn)
    for at, first in enumerate(names):
        for second in names[:at]:
            apart = np.abs(drawn[first].astype(int) - drawn[second]).max(axis=2) > 40
            assert apart.mean() > 0.05, (first, second)
