"""What a layout works with: a page, a style, dice, and notes of what was drawn, from which the questions are made."""

from collections.abc import Callable
from dataclasses import dataclass, field

from train.synth import questions
from train.synth.content import Dice, Maker
from train.synth.document import Question
from train.synth.fonts import Glyphs, glyphs
from train.synth.page import Box, Colour, Page
from train.synth.questions import Fact, Series
from train.synth.style import Style

TRIES = 5


@dataclass(frozen=True)
class Line:
    """Text that was measured. width, height: pixels."""

    text: str
    glyphs: Glyphs
    width: int

    @property
    def height(self) -> int:
        return self.glyphs.height


@dataclass
class Sheet:
    """sizes: text sizes allowed on the page, pixels, ascending. asked: questions by what they ask, however phrased.
    printed: every line on the page.
    """

    page: Page
    dice: Dice
    style: Style
    sizes: tuple[int, ...]
    facts: list[Fact] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    asked: dict[tuple, list[Question]] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)

    @property
    def box(self) -> Box:
        return Box(0, 0, self.page.width, self.page.height)

    @property
    def em(self) -> int:
        """The body's text size: the measure for gaps."""
        return self.style.body

    def glyphs(self, role: str = "body", size: int | None = None) -> Glyphs:
        """role: `small`, `body`, or in bold `bold`, `large` and `huge`, the largest that the page may have."""
        style = self.style
        face = style.bold if role in ("bold", "large", "huge") else style.face
        small, body, large = style.small, style.body, style.large
        sizes = {"small": small, "body": body, "bold": body, "large": large, "huge": self.sizes[-1]}
        return glyphs(face, size or sizes[role])

    def height(self, role: str = "body") -> int:
        """Of a line of text, pixels."""
        return self.glyphs(role).height

    def line(self, text: str, role: str = "body") -> Line:
        drawn = self.glyphs(role)
        return Line(text, drawn, drawn.width(text))

    def fit(self, make: Maker | str, width: float, role: str = "body") -> Line | None:
        """A text that is no wider than `width` pixels: what `make` gives, over and over, then in smaller sizes."""
        drawn = self.glyphs(role)
        for size in (drawn.size, *(size for size in reversed(self.sizes) if size < drawn.size)):
            drawn = self.glyphs(role, size)
            for _ in range(1 if isinstance(make, str) else TRIES):
                text = make if isinstance(make, str) else make(self.dice)
                measured = drawn.width(text)
                if measured <= width:
                    return Line(text, drawn, measured)
        return None

    def put(
        self,
        line: Line,
        x: float,
        y: float,
        room: float | None = None,
        align: str = "left",
        colour: Colour | None = None,
    ) -> Box:
        """Draw a line with its top at y, from x or aligned within `room` pixels from x; returns the box of its ink."""
        if room is not None and align != "left":
            x += (room - line.width) / (2 if align == "centre" else 1)
        self.printed.append(line.text)
        return self.page.text(x, y, line.text, line.glyphs, self.style.ink if colour is None else colour)

    def ground(self, phrase: str, box: Box) -> None:
        """Ask where something is."""
        self._note(("ground", phrase), questions.ground(self.dice, phrase, box))

    def fact(
        self, name: str, line: Line, box: Box, label: str = "", label_box: Box | None = None, kind: str = "field"
    ) -> None:
        """Note what a line states, and the label that was printed for it."""
        self.facts.append(Fact(name, line.text, box, label, label_box, kind))

    def ask(self, kind: str, phrasings: tuple[str, ...], answer: str, box: Box | None = None, **names: str) -> None:
        """Ask in one of several phrasings, with `names` filled in."""
        prompt = self.dice.pick(phrasings).format(**names)
        self._note((phrasings, *names.values()), Question(kind, prompt, answer, box))

    def caption(self, text: str) -> None:
        self._note(("caption",), questions.caption(self.dice, text))

    def questions(self, limit: int) -> list[Question]:
        """What can be asked about what was drawn, at most `limit`; boxes to be found are made large enough."""
        everything = [same[0] for same in self.asked.values() if len({(q.answer, q.box) for q in same}) == 1]
        everything += questions.about_facts(self.dice, self.facts, self.printed)
        for series in self.series:
            everything += questions.about_series(self.dice, series)
        chosen = questions.selected(self.dice, everything, limit)
        width, height = self.page.width, self.page.height
        return [
            Question(q.kind, q.prompt, q.answer, questions.reachable(q.box, width, height)) if q.kind == "ground" else q
            for q in chosen
        ]

    def _note(self, about: tuple, question: Question) -> None:
        self.asked.setdefault(about, []).append(question)


class Flow:
    """A column filled from the top: keeps the pen's height and knows when the column is full. Pixels throughout."""

    def __init__(self, sheet: Sheet, box: Box, leading: float = 1.1):
        self.sheet, self.box, self.y, self.leading = sheet, box, box.y0, leading

    def fits(self, height: float) -> bool:
        return self.y + height <= self.box.y1

    @property
    def left(self) -> float:
        """Pixels to the column's end."""
        return self.box.y1 - self.y

    def skip(self, height: float) -> None:
        self.y += height

    def write(
        self, make: Maker | str, role: str = "body", align: str = "left", colour: Colour | None = None
    ) -> tuple[Line, Box] | None:
        """The next line, across the column; None, and nothing drawn, where it does not fit."""
        line = self.sheet.fit(make, self.box.width, role)
        if line is None or not self.fits(line.height):
            return None
        box = self.sheet.put(line, self.box.x0, self.y, self.box.width, align, colour)
        self.y += round(line.height * self.leading)
        return line, box

    def rule(self, colour: Colour | None = None, width: int = 1) -> None:
        """A rule across the column with a little air above and below."""
        air = max(2, self.sheet.em // 4)
        if self.fits(2 * air + width):
            self.sheet.page.horizontal(self.box.x0, self.box.x1, self.y + air, colour or self.sheet.style.muted, width)
            self.y += 2 * air + width


def inset(box: Box, margin: float) -> Box:
    return box.padded(-margin)


Layout = Callable[[Sheet], None]
