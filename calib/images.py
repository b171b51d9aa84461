"""Images to calibrate and to evaluate on, through the runtime's own preprocessing: what the encoder will see when it is
deployed."""

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.image.decode import open_image
from runtime.image.preprocess import ImageRule, preprocess
from runtime.text.template import IMAGE_PLACEHOLDER
from train.data.llava_json import MalformedError, images_of, read_records, turns_of

LEAST = 16  # fewer say too little of the ranges that activations take
HELD_OUT = 12  # at least so many to evaluate on
QUESTIONS_PER_PAGE = 8
DEFAULT_QUESTIONS = 200  # to measure losses on
FEW_PAGES = 8  # that these are about unless a number is asked for
SQNR_PAGES = 4  # that image embeddings alone are compared on
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
SCALES = (1, 2 / 3, 1 / 2)  # of the bundle's resolution: 1536, 1024, 768


@dataclass(frozen=True)
class Question:
    """answer: None where it is not known."""

    prompt: str
    answer: str | None = None


# What is asked about an image that comes without questions
QUESTIONS = (Question("What is written here?"), Question("Describe the picture in one sentence."))


@dataclass(frozen=True)
class Page:
    """An image and what is asked about it."""

    file: Path
    questions: tuple[Question, ...] = QUESTIONS


def find_pages(data: Path) -> list[Page]:
    """The images of a folder, or of a dataset in LLaVA's JSON together with its questions, sorted by name.

    Questions are taken one by one, as if each were the first about its image; a record with several images has none.
    Raises UserError where `data` is neither, and where there are fewer than `LEAST` images.
    """
    if data.is_dir():
        pages = [Page(file) for file in sorted(data.rglob("*")) if file.suffix.lower() in SUFFIXES]
    elif data.is_file():
        pages = _of_dataset(data)
    else:
        raise UserError(f"--data {data}: no such folder or file")
    if len(pages) < LEAST:
        raise UserError(f"--data {data}: {len(pages)} images, at least {LEAST} are needed to calibrate with")
    return pages


def _of_dataset(file: Path) -> list[Page]:
    found: dict[str, list[Question]] = {}
    try:
        records = list(read_records(file))
    except UserError as error:
        raise UserError(f"--data {error}") from error
    for i, record in enumerate(records):
        try:
            names = images_of(record)
            turns = turns_of(record) if len(names) == 1 and record.get("conversations") else []
        except MalformedError as error:
            print(f"skipped: record {i} of {file}: {error}", file=sys.stderr)
            continue
        questions = [Question(asked.replace(IMAGE_PLACEHOLDER, "").strip(), said or None) for asked, said in turns]
        for name in names:
            found.setdefault(str(file.parent / name), []).extend(questions)
    return [Page(Path(name), tuple(questions) or QUESTIONS) for name, questions in sorted(found.items())]


def split(pages: list[Page], samples: int, questions: int) -> tuple[list[Page], list[Page]]:
    """(at most `samples` pages to calibrate on, others with about `questions` questions to evaluate on).

    Both are spread evenly over `pages`; the first does not depend on `questions`. What does not open is named on stderr
    and passed over; copies, blank images and questions asked twice are named there and stay. Where fewer than `LEAST`
    would be left to calibrate on, none is held out.
    Raises UserError where fewer than `LEAST` to calibrate on open, and where these are one blank picture.
    """
    enough = len(pages) >= LEAST + HELD_OUT
    chosen = spread(pages, min(samples, len(pages) - HELD_OUT) if enough else samples)
    pictures = Pictures()
    calibration = [page for page in chosen if pictures.open(page)]
    if len(calibration) < LEAST:
        raise UserError(f"{len(calibration)} of {len(chosen)} images can be opened, at least {LEAST} are needed")
    pictures.check()
    if not enough:
        pictures.warn()
        return calibration, []
    taken = {page.file for page in chosen}
    others = [page for page in pages if page.file not in taken]
    per_page = max(sum(len(page.questions) for page in others) / len(others), 1)
    chosen = spread(others, max(math.ceil(questions / per_page), HELD_OUT))
    held_out = [page for page in chosen if pictures.open(page)]
    pictures.warn()
    return calibration, held_out


def asked_pages(pages: list[Page], questions: int | None) -> tuple[list[Page], int]:
    """(pages to measure losses on, at most how many questions about them).

    Args:
        questions: 0 takes SQNR_PAGES pages without questions; None takes as many as FEW_PAGES pages have, up to
            DEFAULT_QUESTIONS: minutes of a large model.
    """
    if questions == 0:
        return spread(pages, SQNR_PAGES), 0
    if questions is None:
        return spread(fewer_pages(pages, DEFAULT_QUESTIONS), FEW_PAGES), DEFAULT_QUESTIONS
    return fewer_pages(pages, questions), questions


def fewer_pages(pages: list[Page], questions: int) -> list[Page]:
    """Pages for so many questions: QUESTIONS_PER_PAGE about each image where it has them, since encoding an image costs
    far more than a question about it."""
    mean = sum(len(page.questions) for page in pages) / len(pages)
    return spread(pages, math.ceil(questions / min(QUESTIONS_PER_PAGE, mean)))


def spread(items: list, count: int) -> list:
    """At most `count` of them, evenly, in order."""
    if count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int).tolist()]


class Pictures:
    """Images as they are opened one after the other, and which of them add nothing to the others."""

    def __init__(self):
        self._known: set[bytes] = set()  # hashes of pixels
        self._copies: list[Path] = []
        self._blank: list[Path] = []
        self._asked_twice: list[tuple[Path, str]] = []
        self._opened = self._questions = 0

    def open(self, page: Page) -> bool:
        """Whether the page's image opens; one that does not is named on stderr."""
        try:
            image = open_image(page.file)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            return False
        self._opened += 1
        pixels = hashlib.sha256(str(image.size).encode() + image.tobytes()).digest()
        if image.getcolors(1):  # not more than one
            self._blank.append(page.file)
        if pixels in self._known:
            self._copies.append(page.file)
        self._known.add(pixels)
        prompts = [question.prompt for question in page.questions]
        self._questions += len(prompts)
        self._asked_twice += [(page.file, prompt) for i, prompt in enumerate(prompts) if prompt in prompts[:i]]
        return True

    def check(self) -> None:
        """Raises UserError where all are one blank picture."""
        if len(self._known) == 1 and self._blank:
            raise UserError(
                f"{self._blank[0]}: all {self._opened} images to calibrate with are this one blank picture, whose "
                "activations say nothing of a deployment's; give images like those that the model will be asked about"
            )

    def warn(self) -> None:
        """A line on stderr for each kind of what adds nothing: how many there are, and the first."""
        for found, what in ((self._copies, "copies of others"), (self._blank, "blank")):
            if found:
                print(f"warning: {len(found)} of {self._opened} images are {what}, first {found[0]}", file=sys.stderr)
        if self._asked_twice:
            file, prompt = self._asked_twice[0]
            count = f"{len(self._asked_twice)} of {self._questions}"
            print(
                f"warning: {count} questions repeat one about the same image, first {prompt!r} of {file}",
                file=sys.stderr,
            )


def calibration_pixels(pages: list[Page], rule: ImageRule) -> Iterator[tuple[str, np.ndarray]]:
    """(file, float32 [1, 3, H, W]) of each image in turn, at the bundle's resolution, two thirds and half of it; every
    third round keeps the aspect ratio, so that oblong sizes come too."""
    sides = [max(round(rule.resolution * scale / rule.multiple), 1) * rule.multiple for scale in SCALES]
    for i, page in enumerate(pages):
        aspect = "any" if i // len(sides) % 3 == 2 else rule.aspect
        yield str(page.file), preprocess(open_image(page.file), rule, sides[i % len(sides)], aspect)[None]


def pixels_of(page: Page, rule: ImageRule) -> np.ndarray:
    """float32 [3, H, W] at the bundle's resolution, as an image comes to the encoder by default."""
    return preprocess(open_image(page.file), rule)
