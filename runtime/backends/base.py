"""What every backend implements: encoder, decoder and the sequences that a decoder runs."""

from typing import Protocol

import numpy as np

from runtime.device.memory import Array
from runtime.types import Sampling


class Encoder(Protocol):
    """Images to image embeddings: ConvNeXt, fifth stage and projector."""

    batches: bool  # whether several images together are faster than one after the other

    def __call__(self, images: list[np.ndarray]) -> Array:
        """Encode images.

        Args:
            images: pixel values, float32 [3, H, W] each.

        Returns:
            Image embeddings [sum of T, D], the images one after the other, on the encoder's device.
        """
        ...


class Sequence(Protocol):
    """One sequence and its KV cache."""

    @property
    def length(self) -> int:
        """Positions that the KV cache holds."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions. Raises ValueError where there are fewer."""
        ...

    def forward(self, token_ids: list[int], image_embeddings: Array | None = None) -> np.ndarray:
        """Run `token_ids` [S] after what the cache holds.

        Args:
            token_ids: token IDs; -1 - k stands for row k of `image_embeddings`.
            image_embeddings: [N, D].

        Returns:
            Logits [V] float32 of the last position, valid until the next call.

        Raises:
            ValueError: S more positions do not fit.
        """
        ...

    def forward_greedy(self, token_ids: list[int], image_embeddings: Array | None = None) -> int:
        """As `forward`, but returns the argmax, all that leaves the device.

        Raises:
            InvalidLogitsError: its logit is NaN or Inf.
        """
        ...

    def forward_sampled(
        self,
        token_ids: list[int],
        image_embeddings: Array | None,
        sampling: Sampling,
        random: np.random.Generator,
    ) -> int:
        """As `forward`, but returns a token sampled with the next number of `random`."""
        ...


class SequenceBatch(Protocol):
    """Several sequences that decode together, each in a slot."""

    def __len__(self) -> int: ...

    def __getitem__(self, slot: int) -> Sequence: ...

    def step(self, tokens: list[int]) -> list[int | None]:
        """Feed token i to slot i.

        Returns:
            The argmax of each slot, None where its logit is NaN or Inf.
        """
        ...

    def logits(self, count: int) -> np.ndarray:
        """[count, V] float32 of the first `count` slots in the last `step`, valid until the next."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Slot `target` becomes the first `length` positions of slot `source`."""
        ...

    def swap(self, one: int, other: int) -> None:
        """The two slots trade places."""
        ...


class Decoder(Protocol):
    """Token IDs and image embeddings to logits."""

    @property
    def capacity(self) -> int:
        """Positions of the longest sequence."""
        ...

    def start(self, capacity: int) -> Sequence:
        """A new sequence with room for `capacity` positions."""
        ...

    def start_batch(self, count: int, batch_invariant: bool) -> SequenceBatch:
        """Slots for `count` sequences of the full capacity.

        Args:
            count: number of slots.
            batch_invariant: what a slot gets must not depend on how many others take part, to the bit.

        Raises:
            UserError: the backend runs one sequence at a time.
        """
        ...
