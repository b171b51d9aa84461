"""What sequences that run one graph have in common: how logits become a token."""

from abc import ABC, abstractmethod

import numpy as np

from runtime.device.memory import Array, to_numpy
from runtime.errors import InvalidLogitsError
from runtime.generate.kv_cache import KVCache
from runtime.generate.sampler import next_token
from runtime.types import Sampling


class GraphSequence(ABC):
    """One sequence, see `runtime.backends.base.Sequence`."""

    def __init__(self, cache: KVCache, logits: Array, argmax: Array | None):
        """
        Args:
            cache: keys and values.
            logits: [1, 1, V], written by each run.
            argmax: [1, 1, 1] int64, written by each run; None for a graph without that output.
        """
        self.cache = cache
        self._logits, self._argmax = logits, argmax

    @property
    def length(self) -> int:
        return self.cache.length

    def rewind(self, length: int) -> None:
        self.cache.rewind(length)

    def forward(self, token_ids: list[int], image_embeddings: Array | None = None) -> np.ndarray:
        self._run(token_ids, image_embeddings)
        return to_numpy(self._logits)[0, 0].astype(np.float32, copy=False)

    def forward_greedy(self, token_ids: list[int], image_embeddings: Array | None = None) -> int:
        self._run(token_ids, image_embeddings)
        if self._argmax is None:
            token = int(to_numpy(self._logits)[0, 0].argmax())
        else:
            token = int(to_numpy(self._argmax)[0, 0, 0])
        # On a GPU the logits stay there, and are not looked at
        if isinstance(self._logits, np.ndarray) and not np.isfinite(self._logits[0, 0, token]):
            raise InvalidLogitsError
        return token

    def forward_sampled(
        self, token_ids: list[int], image_embeddings: Array | None, sampling: Sampling, random: np.random.Generator
    ) -> int:
        return next_token(self.forward(token_ids, image_embeddings), [], sampling, random)

    @abstractmethod
    def _run(self, token_ids: list[int], image_embeddings: Array | None) -> None:
        """Write logits and argmax of the last of `token_ids`, and the KV cache. Raises ValueError as `forward`."""
