"""What a bundle's answers lose with another encoder or decoder, through the runtime.

- SQNR of the image embeds, dB: the energy of the signal over that of the error.
- next tokens that differ, %: the known answer to a question, or the float32 model's own where none is known, is fed
  token by token, and at each position the greedy next one is compared.
- perplexity of the answers that are fed.
- points of ANLS and of grounding accuracy (boxes that meet the true one by half) lost, where answers are known and the
  float32 model gives them.
"""

import copy
import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from calib.images import Page, Question, pixels_of
from calib.metrics import anls, iou
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_encoder import OnnxEncoder
from runtime.backends.ort_slots import Slots
from runtime.backends.select import Backends
from runtime.bundle.manifest import Bundle
from runtime.errors import UserError
from runtime.model import Model
from runtime.text.boxes import read_boxes
from runtime.text.template import first_turn, with_answer
from runtime.types import Options

SOURCE = "encoder/fp32.onnx"  # of a bundle, which encoders are compared with
ANSWER_TOKENS = 16  # of an answer, whose next tokens are compared
AT_ONCE = 8  # questions about an image
MAX_NEW_TOKENS = 48  # of an answer that is scored; a box takes about 26
LEAST_SCORE = 0.1  # with less the float32 model does not answer at all, and nothing can be lost


@dataclass(frozen=True)
class Score:
    """anls, iou50: means over the questions whose answer is text or a box, 0 to 1; None where there is none."""

    anls: float | None
    iou50: float | None


@dataclass(frozen=True)
class Loss:
    """What is lost against float32. sqnr_db: None where the encoder is float32's own. differing: next tokens, %; None
    without questions. perplexity: of the answers; float32's own to compare with is `Evaluation.perplexity`. anls,
    grounding: points of a hundred; None where no answers are known, or the float32 model does not know them."""

    sqnr_db: float | None
    differing: float | None
    perplexity: float | None
    anls: float | None = None
    grounding: float | None = None

    @property
    def budgeted(self) -> float:
        """What a budget limits: points of ANLS where they can be told, else next tokens."""
        value = self.differing if self.anls is None else self.anls
        assert value is not None  # a budget wants questions
        return value


@dataclass(frozen=True)
class _Case:
    """ids: of the prompt. fed: the answer's tokens."""

    question: Question
    ids: list[int]
    fed: list[int]


@dataclass(frozen=True)
class _Reading:
    """What a model says at each position of a page's cases. next: the greedy token after each prompt and after each
    token fed. log_probs: of the tokens fed."""

    next: np.ndarray
    log_probs: np.ndarray


def sqnr_db(found: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> float:
    """Signal to quantisation noise of all arrays together, dB; infinite where they are equal."""
    signal = noise = 0.0
    for one, other in zip(found, expected, strict=True):
        signal += float(np.sum(np.square(other, dtype=np.float64)))
        noise += float(np.sum(np.square(np.subtract(one, other, dtype=np.float64))))
    return float(10 * np.log10(signal / noise)) if noise else float("inf")


class Evaluation:
    """Compares encoders and decoders with the bundle's float32 encoder and its decoder.

    One encoder is open at a time, and none beside the decoder, since a large one takes gigabytes.

    Args:
        questions: at most so many, over all pages alike; those that do not fit the context are named on stderr and
            passed over. 0 compares image embeddings alone, and opens no decoder.
        scored: compare answers as well, where they are known.
        model: of another evaluation of the same bundle.

    Raises:
        UserError: no question fits.
    """

    def __init__(
        self, bundle: Bundle, pages: Sequence[Page], questions: int, scored: bool = True, model: Model | None = None
    ):
        self.bundle = bundle
        self.model = model
        self._pages = _dealt(pages, questions) if questions else list(pages)
        self._embeds = self._encode(bundle.path(SOURCE))
        self._cases: list[list[_Case]] = []
        self._readings: list[_Reading] = []  # of float32
        self.score: Score | None = None  # of float32
        if questions:
            if model is None:
                self.model = Model(bundle, Backends(encoder="onnx", encoder_precision="fp32"), cache_bytes=0)
                del self.model.encoder
            self._read_pages()
            known = scored and any(case.question.answer is not None for cases in self._cases for case in cases)
            self.score = self._score(self.decoding, self._embeds) if known else None

    def _read_pages(self) -> None:
        """Float32's answers; pages without a question that fits are given up."""
        fitting = []
        pages = tqdm(self._pages, "float32", unit="page", leave=False, disable=None)
        for page, rows in zip(pages, self._embeds, strict=True):
            if cases := self._cases_of(page, rows):
                fitting.append((page, rows))
                self._cases.append(cases)
                self._readings.append(_read(self.decoding.decoder, cases, rows))
        if not fitting:
            raise UserError("no question about the images fits the model's context")
        self._pages, self._embeds = ([pair[i] for pair in fitting] for i in (0, 1))

    @property
    def decoding(self) -> Model:
        """The bundle's model, without its encoder."""
        assert self.model is not None  # there are questions
        return self.model

    @property
    def answers(self) -> bool:
        """Whether points of ANLS or of grounding can be lost."""
        return self.score is not None and max(self.score.anls or 0, self.score.iou50 or 0) >= LEAST_SCORE

    @property
    def questions(self) -> int:
        return sum(len(cases) for cases in self._cases)

    @property
    def tokens(self) -> int:
        """Next tokens that are compared."""
        return sum(len(reading.next) for reading in self._readings)

    @property
    def perplexity(self) -> float | None:
        """Of the answers to the float32 model; None where they are empty."""
        return _perplexity(self._readings)

    def warnings(self) -> list[str]:
        if self.score is None or self.answers:
            return []
        return ["the float32 model does not give the known answers either; next tokens are compared instead"]

    def about(self) -> dict[str, Any]:
        """What a report says of the questions, and of float32's answers to them."""
        return {
            "decoder_compared_with": self.bundle.decoder.precision,
            "images": len(self._pages),
            "questions": self.questions,
            "next_tokens": self.tokens,
            "float32": {"perplexity": self.perplexity} | ({} if self.score is None else vars(self.score)),
        }

    def sqnr_db(self, encoder: Path) -> float:
        """Of the image embeds that the encoder graph `encoder` gives."""
        return sqnr_db(self._encode(encoder), self._embeds)

    def loss(self, encoder: Path | None = None, decoder: OnnxDecoder | None = None) -> Loss:
        """With the encoder graph `encoder`, and `decoder`, in place of float32 and the bundle's; None keeps them."""
        embeds = self._embeds if encoder is None else self._encode(encoder)
        sqnr = None if encoder is None else sqnr_db(embeds, self._embeds)
        if not self._cases:
            return Loss(sqnr, None, None)
        model = self.decoding
        if decoder is not None:
            model = copy.copy(model)
            model.decoder = decoder
        pages = tqdm(self._cases, "asking", unit="page", leave=False, disable=None)
        readings = [_read(model.decoder, cases, rows) for cases, rows in zip(pages, embeds, strict=True)]
        differing = sum(np.sum(a.next != b.next) for a, b in zip(readings, self._readings, strict=True))
        score = self._score(model, embeds) if self.answers else None
        return Loss(
            sqnr,
            float(100 * differing / self.tokens),
            _perplexity(readings),
            _points_lost(self.score.anls, score.anls) if self.score and score else None,
            _points_lost(self.score.iou50, score.iou50) if self.score and score else None,
        )

    def _encode(self, file: Path) -> list[np.ndarray]:
        encoder = OnnxEncoder(file, self.bundle.encoder.stride)
        pages = tqdm(self._pages, "encoding", unit="page", leave=False, disable=None)
        return [np.asarray(encoder([pixels_of(page, self.bundle.image)])) for page in pages]

    def _cases_of(self, page: Page, embeds: np.ndarray) -> list[_Case]:
        tokenizer, template = self.decoding.tokenizer, self.bundle.prompt
        cases = []
        for question in page.questions:
            prompt = first_turn(template, question.prompt, 1)
            ids = tokenizer.encode_prompt(prompt, [len(embeds)])
            if len(ids) + ANSWER_TOKENS > self.decoding.decoder.capacity:
                print(f"skipped: {page.file}: a question of {len(ids)} tokens with its image", file=sys.stderr)
            elif question.answer is None:
                cases.append(_Case(question, ids, self._answer(ids, embeds)))
            else:
                whole = tokenizer.encode_prompt(with_answer(prompt, question.answer), [len(embeds)])
                fed = whole[len(ids) :] if whole[: len(ids)] == ids else []  # its first token joins the prompt's last
                cases.append(_Case(question, ids, fed[:ANSWER_TOKENS]))
        return cases

    def _answer(self, ids: list[int], embeds: np.ndarray) -> list[int]:
        """The float32 model's own, greedily, without its end."""
        sequence = self.decoding.decoder.start(len(ids) + ANSWER_TOKENS)
        answer, token = [], sequence.forward_greedy(ids, embeds)
        while token not in self.decoding.tokenizer.eos_token_ids and len(answer) < ANSWER_TOKENS:
            answer.append(token)
            token = sequence.forward_greedy([token])
        return answer

    def _score(self, model: Model, embeds: list[np.ndarray]) -> Score:
        """Of the model's answers to the questions whose own is known. embeds: of each page."""
        texts, boxes = [], []
        pages = tqdm(self._pages, "answering", unit="page", leave=False, disable=None)
        for _, cases, rows in zip(pages, self._cases, embeds, strict=True):
            about = model.about([], Options(MAX_NEW_TOKENS), image_embeddings=[rows])
            for question in (case.question for case in cases):
                if question.answer is None:
                    continue
                *_, last = about.ask(question.prompt)
                assert last.result is not None
                expected, found = read_boxes(question.answer), read_boxes(last.result.text)
                if expected:
                    boxes.append(bool(found) and iou(found[0], expected[0]) >= 0.5)
                else:
                    texts.append(anls(last.result.text, question.answer))
        return Score(*(statistics.fmean(values) if values else None for values in (texts, boxes)))


def _read(decoder: OnnxDecoder, cases: list[_Case], embeds: np.ndarray) -> _Reading:
    """What comes before the end of the image is the same in all cases and computed once; answers are fed AT_ONCE at
    a time, a token of each in a step."""
    image_end = max(i for i, token in enumerate(cases[0].ids) if token < 0) + 1
    capacity = max(len(case.ids) + len(case.fed) for case in cases)
    slots = Slots(decoder, min(AT_ONCE, len(cases)), capacity)
    slots[0].forward(cases[0].ids[:image_end], embeds)
    longest_first = sorted(range(len(cases)), key=lambda i: -len(cases[i].fed))
    greedy, log_probs = [[] for _ in cases], [[] for _ in cases]

    def note(i: int, answered: int, logits: np.ndarray) -> None:
        greedy[i].append(int(logits.argmax()))
        if answered < len(cases[i].fed):
            most = logits.max()
            exponents = np.sum(np.exp(logits - most), dtype=np.float64)
            log_probs[i].append(logits[cases[i].fed[answered]] - most - np.log(exponents))

    for start in range(0, len(cases), AT_ONCE):
        taking = longest_first[start : start + AT_ONCE]  # those that end first are in the last slots
        slots[0].rewind(image_end)
        for slot in range(1, len(taking)):
            slots.copy(0, slot)
        for slot, i in enumerate(taking):
            note(i, 0, slots[slot].forward(cases[i].ids[image_end:]))
        for answered in range(len(cases[taking[0]].fed)):
            taking = [i for i in taking if answered < len(cases[i].fed)]
            slots.step([cases[i].fed[answered] for i in taking])
            for i, logits in zip(taking, slots.logits(len(taking)), strict=True):
                note(i, answered + 1, logits)
    return _Reading(*(np.array(list(itertools.chain(*lists))) for lists in (greedy, log_probs)))


def _perplexity(readings: list[_Reading]) -> float | None:
    log_probs = np.concatenate([np.empty(0), *(reading.log_probs for reading in readings)])
    return float(np.exp(-np.mean(log_probs))) if len(log_probs) else None


def _points_lost(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None or before < LEAST_SCORE else 100 * (before - after)


def _dealt(pages: Sequence[Page], questions: int) -> list[Page]:
    """The pages with at most `questions` questions in all: the first of each, then the second of each, and so on."""
    dealt: list[list[Question]] = [[] for _ in pages]
    rounds = range(max((len(page.questions) for page in pages), default=0))
    turns = ((i, page.questions[k]) for k in rounds for i, page in enumerate(pages) if k < len(page.questions))
    for i, question in itertools.islice(turns, questions):
        dealt[i].append(question)
    return [Page(page.file, tuple(taken)) for page, taken in zip(pages, dealt, strict=True) if taken]
