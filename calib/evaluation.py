"""What a bundle's answers lose with another encoder or decoder, through the runtime.

- SQNR of the image embeds, dB: the energy of the signal over that of the error.
- next tokens that differ, %: the known answer to a question, or the float32 model's own where none is known, is fed
  token by token, and at each position the likeliest next one is compared.
- perplexity of the answers that are fed.
- points of ANLS and of grounding accuracy (boxes that meet the true one by half) lost, where answers are known and the
  float32 model gives them.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from calib.images import Page, pixels_of
from calib.metrics import anls, iou
from runtime.backends import Backends
from runtime.bundle import Bundle
from runtime.decoder import Decoder
from runtime.encoder import OnnxEncoder
from runtime.grounding import read_boxes
from runtime.image import open_image
from runtime.model import Model, Options
from runtime.prompt import first_turn

ANSWER_TOKENS = 16  # of an answer, whose next tokens are compared
MAX_NEW_TOKENS = 48  # of an answer that is scored; a box takes about 26
LEAST_ANLS = 0.1  # with less the float32 model does not answer at all, and nothing can be lost


@dataclass(frozen=True)
class Score:
    """anls, iou50: means over the questions whose answer is text or a box, 0 to 1; None where there is none."""

    anls: float | None
    iou50: float | None


@dataclass(frozen=True)
class Loss:
    """What is lost against float32. sqnr_db: None where the encoder is float32's own. differing: next tokens, %.
    perplexity: of the answers; float32's own to compare with is `Evaluation.perplexity`. anls, grounding: points of a
    hundred; None where no answers are known, or the float32 model does not know them."""

    sqnr_db: float | None
    differing: float
    perplexity: float | None
    anls: float | None = None
    grounding: float | None = None

    @property
    def budgeted(self) -> float:
        """What a budget limits: points of ANLS where they can be told, else next tokens."""
        return self.differing if self.anls is None else self.anls


@dataclass(frozen=True)
class _Case:
    """A question. ids: of the prompt. fed: the answer's tokens."""

    ids: list[int]
    fed: list[int]


@dataclass(frozen=True)
class _Reading:
    """What a model says at each position of a page's cases. next: the likeliest token after each prompt and after each
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

    questions: at most so many, over all pages alike. scored: compare answers as well, where they are known.
    """

    def __init__(self, bundle: Bundle, pages: Sequence[Page], questions: int, scored: bool = True):
        self._bundle = bundle
        self._model = Model(bundle, Backends(encoder="onnx", encoder_precision="fp32"))
        self._reference = self._model.encoder
        self._pages = _limited(pages, questions)
        self._embeds: list[np.ndarray] = []
        self._cases: list[list[_Case]] = []
        self._readings: list[_Reading] = []  # of float32
        for page in tqdm(self._pages, "float32", unit="page", leave=False, disable=None):
            rows = self._reference([pixels_of(page, bundle.image)])
            self._embeds.append(rows)
            self._cases.append(self._cases_of(page, rows))
            self._readings.append(self._read(self._cases[-1], rows))
        known = scored and any(q.answer is not None for page in self._pages for q in page.questions)
        self.score = self._score() if known else None  # of float32

    @property
    def answers(self) -> bool:
        """Whether points of ANLS can be lost."""
        return self.score is not None and (self.score.anls or 0) >= LEAST_ANLS

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

    def sqnr_db(self, file: Path) -> float:
        """Of the image embeds of the encoder graph `file`, without asking the decoder."""
        return sqnr_db(self._encode(file), self._embeds)

    def loss(self, encoder: Path | None = None, decoder: Decoder | None = None) -> Loss:
        """With the encoder graph `encoder`, and `decoder`, in place of float32 and the bundle's; None keeps them."""
        embeds = self._embeds if encoder is None else self._encode(encoder)
        kept, self._model.decoder = self._model.decoder, decoder or self._model.decoder
        try:
            pages = tqdm(self._cases, "asking", unit="page", leave=False, disable=None)
            readings = [self._read(cases, rows) for cases, rows in zip(pages, embeds, strict=True)]
            differing = sum(np.sum(a.next != b.next) for a, b in zip(readings, self._readings, strict=True))
            score = self._score(embeds) if self.answers else None
        finally:
            self._model.decoder = kept
        return Loss(
            None if encoder is None else sqnr_db(embeds, self._embeds),
            float(100 * differing / self.tokens),
            _perplexity(readings),
            _points_lost(self.score.anls, score.anls) if score else None,
            _points_lost(self.score.iou50, score.iou50) if score else None,
        )

    def _encode(self, file: Path) -> list[np.ndarray]:
        encoder = OnnxEncoder(file, self._bundle.encoder.stride)
        pages = tqdm(self._pages, "encoding", unit="page", leave=False, disable=None)
        return [encoder([pixels_of(page, self._bundle.image)]) for page in pages]

    def _cases_of(self, page: Page, embeds: np.ndarray) -> list[_Case]:
        tokenizer, template = self._model.tokenizer, self._bundle.prompt
        prompts = [first_turn(template, question.prompt, 1) for question in page.questions]
        ids = [tokenizer.encode_prompt(prompt, [len(embeds)]) for prompt in prompts]
        cases = []
        for question, prompt, start in zip(page.questions, prompts, ids, strict=True):
            if question.answer is None:
                cases.append(_Case(start, self._answer(start, embeds)))
            else:
                whole = tokenizer.encode_prompt(prompt + question.answer, [len(embeds)])
                cases.append(_Case(start, whole[len(start) :][:ANSWER_TOKENS]))
        return cases

    def _answer(self, ids: list[int], embeds: np.ndarray) -> list[int]:
        """The float32 model's own, greedily, without its end."""
        sequence = self._model.decoder.start(len(ids) + ANSWER_TOKENS)
        answer, token = [], sequence.forward_greedy(ids, embeds)
        while token not in self._model.tokenizer.eos_token_ids and len(answer) < ANSWER_TOKENS:
            answer.append(token)
            token = sequence.forward_greedy([token])
        return answer

    def _read(self, cases: list[_Case], embeds: np.ndarray) -> _Reading:
        """What comes before the end of the image is the same in all cases and computed once."""
        image_end = max(i for i, token in enumerate(cases[0].ids) if token < 0) + 1
        sequence = self._model.decoder.start(max(len(case.ids) + len(case.fed) for case in cases))
        sequence.forward(cases[0].ids[:image_end], embeds)
        likeliest, log_probs = [], []
        for case in cases:
            sequence.rewind(image_end)
            logits = sequence.forward(case.ids[image_end:])
            likeliest.append(int(logits.argmax()))
            for token in case.fed:
                most = logits.max()
                log_probs.append(logits[token] - most - np.log(np.sum(np.exp(logits - most), dtype=np.float64)))
                logits = sequence.forward([token])
                likeliest.append(int(logits.argmax()))
        return _Reading(np.array(likeliest), np.array(log_probs))

    def _score(self, embeds: list[np.ndarray] | None = None) -> Score:
        """Of the answers to the questions whose own is known. embeds: of each page; None takes float32's."""
        texts, boxes = [], []
        pages = tqdm(self._pages, "answering", unit="page", leave=False, disable=None)
        for page, rows in zip(pages, embeds or self._embeds, strict=True):
            self._model.encoder = lambda pixels, rows=rows: rows  # it has been encoded
            about = self._model.about([open_image(page.file)], Options(MAX_NEW_TOKENS))
            for question in page.questions:
                if question.answer is None:
                    continue
                *_, last = about.ask(question.prompt)
                wanted, said = read_boxes(question.answer), read_boxes(last.result.text)
                if wanted:
                    boxes.append(bool(said) and iou(said[0], wanted[0]) >= 0.5)
                else:
                    texts.append(anls(last.result.text, question.answer))
        self._model.encoder = self._reference
        return Score(*(statistics.fmean(values) if values else None for values in (texts, boxes)))


def _perplexity(readings: list[_Reading]) -> float | None:
    log_probs = np.concatenate([reading.log_probs for reading in readings])
    return float(np.exp(-np.mean(log_probs))) if len(log_probs) else None


def _points_lost(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else 100 * (before - after)


def _limited(pages: Sequence[Page], questions: int) -> list[Page]:
    """The pages with at most `questions` questions in all: of each the first few, the same number but for the rest."""
    share, left, limited = max(questions // max(len(pages), 1), 1), questions, []
    for page in pages:
        taken = page.questions[: min(share, left)]
        if taken:
            limited.append(Page(page.file, taken))
            left -= len(taken)
    return limited
