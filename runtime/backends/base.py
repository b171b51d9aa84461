"""What every backend implements."""

from abc import ABC, abstractmethod

import numpy as np

from runtime.device.memory import Array, to_numpy
from runtime.errors import InvalidLogitsError
from runtime.generate.kv_cache import KVCache
from runtime.generate.sampler import Sampling, next_token


class Sequence(ABC):
    """One sequence being decoded. logits: [1, 1, V]; likeliest: [1, 1, 1] int64, or None where the graph does not say;
    both are written by each run."""

    def __init__(self, cache: KVCache, logits: Array, likeliest: Array | None):
        self.cache = cache
        self._logits, self._likeliest = logits, likeliest

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions. Raises ValueError if there are not so many."""
        self.cache.rewind(length)

    def forward(self, ids: list[int], image_embeds: Array | None = None) -> np.ndarray:
        """Take `ids` [S] after what the cache holds.

        image_embeds: [N, D], the rows that ids below 0 name.
        Returns logits [V] float32 of the last position; valid until the next call.
        Raises ValueError if S more positions do not fit.
        """
        self._run(ids, image_embeds)
        return to_numpy(self._logits)[0, 0].astype(np.float32, copy=False)

    def forward_greedy(self, ids: list[int], image_embeds: Array | None = None) -> int:
        """As `forward`, but returns the likeliest next token, all that leaves the device.

        Raises InvalidLogitsError where that one's logit is none, which is seen on the CPU alone.
        """
        self._run(ids, image_embeds)
        if self._likeliest is None:
            token = int(to_numpy(self._logits)[0, 0].argmax())
        else:
            token = int(to_numpy(self._likeliest)[0, 0, 0])
        if isinstance(self._logits, np.ndarray) and not np.isfinite(self._logits[0, 0, token]):
            raise InvalidLogitsError
        return token

    def forward_sampled(
        self, ids: list[int], image_embeds: Array | None, sampling: Sampling, random: np.random.Generator
    ) -> int:
        """As `forward`, but returns a token drawn by `sampling`, a plain one, with the next number of `random`."""
        return next_token(self.forward(ids, image_embeds), [], sampling, random)

    @abstractmethod
    def _run(self, ids: list[int], image_embeds: Array | None) -> None:
        """Write logits and likeliest of the last of `ids`, and the KV cache. Raises ValueError as `forward`."""
