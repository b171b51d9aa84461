"""Questions about what a layout noted while it drew; only what has one answer on the page is asked."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from train.synth.content import Dice
from train.synth.document import Question
from train.synth.page import Box

FIELD = (
    *("What is the {name}?", "Read the {name}.", "Which {name} is given?", "What {name} is printed here?"),
    *("Tell me the {name}.", "What does the page give as the {name}?", "{name}?"),
)
LABEL = (
    *('What is written for "{label}"?', 'What is the value of "{label}"?', 'Find "{label}" and read its value.'),
    *('What stands with the label "{label}"?', 'Read the entry "{label}".'),
)
LABEL_OF = (
    *('Which label has the value "{value}"?', 'Under which label stands "{value}"?'),
    *('What is "{value}" labelled as?', 'Which entry reads "{value}"?'),
)
GROUND = (
    *("Where is {phrase}? Answer with a box.", "Locate {phrase}. Answer with a box.", "Give the box of {phrase}."),
    *("Draw a box around {phrase}.", "Find {phrase} and answer with its box."),
    "Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",
)
COUNT = ("How many {plural} are listed?", "How many {plural} are there?", "Count the {plural}.", "Number of {plural}?")
CAPTION = ("What is this?", "Describe the page in one sentence.", "Write a short caption.", "What does the page show?")
SMALLEST_SIDE = 0.03  # of the page: thinner boxes cannot be hit with an IoU of 0.5


@dataclass(frozen=True)
class Fact:
    """A value with a meaning. name: what it is, as asked for ("invoice number"); value: as printed, in `box`.

    label, label_box: what is printed for the name, where something is. kind: `field`, `total` or `date`.
    """

    name: str
    value: str
    box: Box
    label: str = ""
    label_box: Box | None = None
    kind: str = "field"


@dataclass(frozen=True)
class Entry:
    """One of a series: name and value as printed (`text` empty where it is only drawn), and the value as a number.

    box: the whole row or bar. name_box, text_box: of the texts.
    """

    name: str
    text: str
    number: float
    box: Box
    name_box: Box
    text_box: Box | None = None


@dataclass(frozen=True)
class Series:
    """Things of one sort with numbers. lookup: phrasings with {name}, asking for the value; most, least: for a name.

    ground: what an entry is called when its box is asked for, with {name}. counted, compared: ask how many there are,
    and which is the most.
    """

    plural: str
    lookup: tuple[str, ...]
    most: tuple[str, ...]
    least: tuple[str, ...]
    ground: str
    entries: tuple[Entry, ...]
    counted: bool = True
    compared: bool = True


def about_facts(dice: Dice, facts: list[Fact], printed: list[str]) -> Iterable[Question]:
    """By name, by label, by value, and where it is. printed: every line of the page, to know what occurs twice."""
    names = Counter(fact.name.lower() for fact in facts)
    lines = Counter(line.rstrip(":").lower() for line in printed)
    for fact in facts:
        if names[fact.name.lower()] > 1:
            continue
        prompt = dice.pick(FIELD).format(name=fact.name)
        yield Question(fact.kind, prompt[0].upper() + prompt[1:], fact.value, fact.box)
        if fact.label and lines[fact.label.lower()] == 1:
            yield Question("label", dice.pick(LABEL).format(label=fact.label), fact.value, fact.box)
            if lines[fact.value.lower()] == 1:
                yield Question("label", dice.pick(LABEL_OF).format(value=fact.value), fact.label, fact.label_box)
        box = fact.box | fact.label_box if fact.label_box else fact.box
        yield ground(dice, f"the {fact.name}", box)


def about_series(dice: Dice, series: Series) -> Iterable[Question]:
    """How many, which is the most and the least, each one's value and place."""
    entries = series.entries
    names = Counter(entry.name for entry in entries)
    known = [entry for entry in entries if names[entry.name] == 1]
    for entry in dice.sample(known, 3):
        if entry.text:
            yield Question("field", dice.pick(series.lookup).format(name=entry.name), entry.text, entry.text_box)
    for entry in dice.sample(known, 2):
        yield ground(dice, series.ground.format(name=entry.name), entry.box)
    if len(entries) < 2:
        return
    if series.counted:
        yield Question("count", dice.pick(COUNT).format(plural=series.plural), str(len(entries)))
    for entry, phrasings in ((_only(entries, max), series.most), (_only(entries, min), series.least)):
        if series.compared and entry is not None and names[entry.name] == 1:
            yield Question("compare", dice.pick(phrasings), entry.name, entry.name_box)


def ground(dice: Dice, phrase: str, box: Box) -> Question:
    """Asks for a box; its answer is written when the box lies where the finished picture has it."""
    return Question("ground", dice.pick(GROUND).format(phrase=phrase), "", box)


def caption(dice: Dice, text: str) -> Question:
    return Question("caption", dice.pick(CAPTION), text)


def fractions(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom as fractions of a page of width x height pixels; beyond its edges, the edges."""
    sides = (box.x0 / width, box.y0 / height, box.x1 / width, box.y1 / height)
    return tuple(min(1.0, max(0.0, side)) for side in sides)


def grounded(box: Box, width: int, height: int) -> str:
    """RefCOCO's answer as LLaVA writes it: the box's `fractions`, to a hundredth."""
    return "[" + ",".join(f"{side:.2f}" for side in fractions(box, width, height)) + "]"


def reachable(box: Box, width: int, height: int) -> Box:
    """The box with a little air around it, at least `SMALLEST_SIDE` of the page high and wide, and on the page."""
    air = 0.004 * max(width, height)
    x = max(air, (SMALLEST_SIDE * width - box.width) / 2)
    y = max(air, (SMALLEST_SIDE * height - box.height) / 2)
    return Box(max(0, box.x0 - x), max(0, box.y0 - y), min(width, box.x1 + x), min(height, box.y1 + y))


def selected(dice: Dice, questions: list[Question], limit: int) -> list[Question]:
    """At most `limit` of them in random order, kinds in turn, so that common kinds do not crowd out rare ones.

    Of questions with the same words none is kept but where they also have the same answer.
    """
    answers: dict[str, set[tuple[str, Box | None]]] = {}
    for question in questions:
        answers.setdefault(question.prompt, set()).add((question.answer, question.box))
    kinds: dict[str, list[Question]] = {}
    for question in dice.sample(questions, len(questions)):
        if len(answers[question.prompt]) == 1:
            kinds.setdefault(question.kind, []).append(question)
    chosen: dict[str, Question] = {}
    queues = list(kinds.values())
    while queues and len(chosen) < limit:
        queues = [queue for queue in queues if queue]
        for queue in queues[: limit - len(chosen)]:
            question = queue.pop()
            chosen.setdefault(question.prompt, question)
    return dice.sample(list(chosen.values()), len(chosen))


def _only(entries: tuple[Entry, ...], extreme) -> Entry | None:
    """The entry with the largest or smallest number, if no other comes near it."""
    best = extreme(entries, key=lambda entry: entry.number)
    span = max(entry.number for entry in entries) - min(entry.number for entry in entries)
    near = [entry for entry in entries if entry is not best and abs(entry.number - best.number) <= 0.02 * span]
    return None if near else best
