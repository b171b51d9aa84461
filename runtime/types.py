"""What the runtime takes and returns: options, timings, results."""

from dataclasses import dataclass, field
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from runtime.errors import UserError

# A path, the content of a file, a file opened for reading bytes, uint8 [H, W, 3] red first, or a Pillow image
ImageSource = str | PathLike[str] | bytes | bytearray | memoryview | BinaryIO | np.ndarray | Image.Image


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the most probable token; otherwise the filters apply in transformers' order.

    temperature: logits are divided by it. top_k: the k most probable remain (0: all). top_p: the smallest set of most
    probable tokens whose probabilities reach p remains (1: all). min_p (arXiv 2407.01082): tokens with at least this
    fraction of the most probable one's remain (0: all). repetition_penalty (CTRL, arXiv 1909.05858): logits of tokens
    generated before are divided by it where positive and multiplied where negative, at temperature 0 too. seed: of the
    draw; None takes fresh entropy. Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always the one."""
        return self.temperature == 0 and self.repetition_penalty == 1

    @property
    def history_independent(self) -> bool:
        """Whether a graph can sample: without regard to the tokens chosen before, by the filters that it has."""
        return self.temperature > 0 and self.repetition_penalty == 1 and self.min_p == 0

    def __post_init__(self):
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")


@dataclass(frozen=True)
class Options:
    """How to answer.

    max_new_tokens: at most so many tokens, the end-of-sequence token included; fewer where the context ends.
    sampling: how the next token is chosen; greedy by default.
    stop: strings that end the answer and do not appear in it, beside the template's own; those do not end JSON that
    follows a schema.
    resolution: side of the square images are fitted to (or, with `any`, whose area they are fitted to), pixels; None
    takes the bundle's. aspect: `pad`, `crop` or `any`; None takes the bundle's. system: system text; None takes the
    template's. json_schema: that the answer follows; with it every token is chosen from the logits, and an answer that
    max_new_tokens cuts short does not parse.
    Raises UserError for a value out of range.
    """

    max_new_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    resolution: int | None = None
    aspect: str | None = None
    system: str | None = None
    json_schema: dict[str, Any] | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}, expected 1 or more")
        if isinstance(self.stop, str) or "" in self.stop:
            raise UserError(f"stop is {self.stop!r}, expected a sequence of strings that are not empty")


@dataclass(frozen=True)
class Timings:
    """preprocess_ms: files to pixel values; encode_ms: those to image embeds; prefill_ms: the prompt through the
    decoder; ttft_ms: from the call to the first token; decode_tokens_per_s: over the tokens after the first, None if
    there is none."""

    preprocess_ms: float
    encode_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class Result:
    """A finished answer. token_ids: the new ids, the end-of-sequence id included. finish_reason: `stop` (end of
    sequence or a stop string) or `length`. prompt_tokens: positions prefilled, the visual tokens among them."""

    text: str
    token_ids: list[int]
    finish_reason: str
    visual_tokens: int
    prompt_tokens: int
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """What one new token added. text: the text that became certain, often "". elapsed_ms: since the call. result: on
    the last piece."""

    text: str
    token_id: int
    elapsed_ms: float
    result: Result | None = None


@dataclass
class Trace:
    """Intermediate values of a turn, for comparison. pixel_values: float32 [3, H, W] of each image that the turn
    encodes: a traced turn encodes all of its own, whatever the cache has. image_embeds: [sum of T, D]. first_logits:
    float32 [V], the first new token was chosen from."""

    pixel_values: list[np.ndarray] = field(default_factory=list[np.ndarray])
    image_embeds: np.ndarray | None = None
    first_logits: np.ndarray | None = None
