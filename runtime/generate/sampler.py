"""The next token as a pure function of the logits."""

from dataclasses import dataclass

import numpy as np

from runtime.errors import InvalidLogitsError, UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; otherwise the filters apply in transformers' order.

    temperature: logits are divided by it. top_k: the k likeliest remain (0: all). top_p: the smallest set of likeliest
    tokens whose probabilities reach p remains (1: all). repetition_penalty (CTRL, arXiv 1909.05858): logits of tokens
    generated before are divided by it where positive and multiplied where negative, at temperature 0 too. seed: of the
    draw; None takes fresh entropy. Raises UserError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always the one."""
        return self.temperature == 0 and self.repetition_penalty == 1

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn, independently of those chosen before."""
        return self.temperature > 0 and self.repetition_penalty == 1

    def __post_init__(self):
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "0.01 to 100"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}, expected {expected}")


def next_token(logits: np.ndarray, generated: list[int], sampling: Sampling, random: np.random.Generator) -> int:
    """logits: [V] float32; generated: ids chosen so far in this answer. Does not change either.

    Raises InvalidLogitsError where the largest logit is none.
    """
    if not np.isfinite(logits.max()):
        raise InvalidLogitsError
    if sampling.repetition_penalty != 1 and generated:
        logits = _penalise(logits, generated, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = _filtered(logits, sampling)
    return int(random.choice(len(probabilities), p=probabilities))


def _penalise(logits: np.ndarray, generated: list[int], penalty: float) -> np.ndarray:
    logits = logits.copy()
    seen = np.unique(generated)
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def _filtered(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities [V] in float64 after temperature, top-k and top-p; they sum to 1."""
    scaled = logits.astype(np.float64)
    scaled = (scaled - scaled.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -sampling.top_k)[-sampling.top_k]] = -np.inf
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= sampling.top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities
