"""The next token: a pure function of the logits, and the sampler that applies it to an answer."""

from typing import Protocol

import numpy as np

from runtime.backends.base import Sequence
from runtime.device.memory import Array
from runtime.errors import InvalidLogitsError
from runtime.types import Sampling


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
    """Probabilities [V] in float64 after temperature, top-k, top-p and min-p; they sum to 1."""
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
    if sampling.min_p > 0:
        probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
        probabilities /= probabilities.sum()
    return probabilities


class TokenConstraint(Protocol):
    """Restricts which tokens may come next, as a grammar does."""

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits [V] with minus infinity where a token may not come."""
        ...

    def push(self, token: int) -> None:
        """Advance by a token that was allowed."""
        ...


class Sampler:
    """Chooses the tokens of one answer, one after the other: the one place where tokens are chosen."""

    def __init__(self, sampling: Sampling, constraint: TokenConstraint | None = None):
        self._sampling, self._constraint = sampling, constraint
        self._random = np.random.default_rng(sampling.seed)
        self._chosen: list[int] = []

    @property
    def needs_logits(self) -> bool:
        """Whether the argmax alone is not enough."""
        return not self._sampling.greedy or self._constraint is not None

    def after(self, sequence: Sequence, token_ids: list[int], image_embeddings: Array | None = None) -> int:
        """Feed `token_ids` [S] and choose the token after them. Where a device can choose, the logits stay there."""
        if self._constraint is None and self._sampling.greedy:
            return sequence.forward_greedy(token_ids, image_embeddings)
        if self._constraint is None and self._sampling.history_independent:
            return sequence.forward_sampled(token_ids, image_embeddings, self._sampling, self._random)
        return self.choose(sequence.forward(token_ids, image_embeddings))

    def choose(self, logits: np.ndarray) -> int:
        """The next token from logits [V] float32.

        Raises:
            InvalidLogitsError: the largest logit is NaN or Inf.
            UserError: the constraint gave up.
        """
        if self._constraint is not None:
            logits = self._constraint.allow(logits)
        token = next_token(logits, self._chosen, self._sampling, self._random)
        self._chosen.append(token)
        if self._constraint is not None:
            self._constraint.push(token)
        return token
