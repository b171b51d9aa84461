"""The generation core: prompt -> longest common prefix -> prefill -> decode. It knows nothing of text.

The library and the command line drive it through `Session`, one sequence at a time; the server's scheduler drives one
`Generation` in each slot of a batch.
"""

import itertools
from collections.abc import Callable, Hashable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from runtime.backends.base import Decoder, Sequence
from runtime.device.memory import Array, concatenate
from runtime.generate.sampler import Sampler

# What chooses the token after some token IDs: `Sampler.after`, or the same with its logits observed
NextToken = Callable[[Sequence, list[int], Array | None], int]


@dataclass(frozen=True)
class Prompt:
    """Token IDs and the image embeddings that some of them stand for.

    Attributes:
        token_ids: [S]; -1 - k stands for row k of `image_embeddings`.
        image_embeddings: [N, D], of all images one after the other; None where there are none.
        keys: [S]; prefixes with equal keys have equal keys and values in the KV cache.
    """

    token_ids: list[int] = field(default_factory=list[int])
    image_embeddings: Array | None = None
    keys: list[Hashable] = field(default_factory=list[Hashable])

    @classmethod
    def of(cls, token_ids: list[int], images: Iterable[tuple[Hashable, Array]] = ()) -> "Prompt":
        """A prompt of token IDs and of (key, embeddings [T, D]) for each image, in the order of their rows."""
        images = list(images)
        rows = [(key, row) for key, embeddings in images for row in range(len(embeddings))]
        keys: list[Hashable] = [token if token >= 0 else rows[-1 - token] for token in token_ids]
        return cls(token_ids, concatenate([rows for _, rows in images]) if images else None, keys)

    def followed_by(self, answer: list[int], prompt: "Prompt") -> "Prompt":
        """This prompt, an answer to it and the next prompt of the same conversation."""
        before = 0 if self.image_embeddings is None else len(self.image_embeddings)
        shifted = [token if token >= 0 else token - before for token in prompt.token_ids]
        embeddings = [rows for rows in (self.image_embeddings, prompt.image_embeddings) if rows is not None]
        return Prompt(
            [*self.token_ids, *answer, *shifted],
            concatenate(embeddings) if embeddings else None,
            [*self.keys, *answer, *prompt.keys],
        )

    def part(self, begin: int, end: int | None = None) -> tuple[list[int], Array | None]:
        """Positions `begin` to `end`, as `Sequence.forward` takes them."""
        token_ids = self.token_ids[begin:end]
        return token_ids, self.image_embeddings if min(token_ids) < 0 else None


class Generation:
    """One answer being generated: its tokens so far and where it ends.

    Attributes:
        token_ids: the new tokens, the end-of-sequence token included.
        finish_reason: `stop` (end of sequence), `length`, or None while it goes on.
    """

    def __init__(self, sampler: Sampler, max_new_tokens: int, eos_token_ids: frozenset[int]):
        self.sampler = sampler
        self._max_new_tokens, self._eos_token_ids = max_new_tokens, eos_token_ids
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None

    def push(self, token: int) -> None:
        """Append the token that was chosen."""
        self.token_ids.append(token)
        if token in self._eos_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self._max_new_tokens:
            self.finish_reason = "length"


class Session:
    """One sequence that successive prompts share: of each only what the KV cache does not hold is prefilled."""

    def __init__(self, decoder: Decoder, capacity: int):
        """
        Args:
            decoder: runs the sequence.
            capacity: positions of its KV cache.
        """
        self._sequence = decoder.start(capacity)
        self._held: list[Hashable] = []  # keys of the positions in the KV cache

    def cached(self, prompt: Prompt) -> int:
        """How many positions of a prompt need no prefill; its last one does, for its logits."""
        return common_prefix_length(self._held, prompt.keys[:-1])

    def prefill(self, prompt: Prompt, next_token: NextToken) -> int:
        """Make the KV cache hold the prompt; returns the first new token.

        Where this fails or is interrupted, the cache holds what the prompt shares with what it held before.
        """
        begin = self.cached(prompt)
        self._held = self._held[:begin]
        self._sequence.rewind(begin)
        try:
            token = next_token(self._sequence, *prompt.part(begin))
        except BaseException:  # an interrupt may come once the cache is longer
            self._sequence.rewind(begin)
            raise
        self._held = list(prompt.keys)
        return token

    def step(self, token: int, next_token: NextToken) -> int:
        """Feed one token; returns the next one."""
        chosen = next_token(self._sequence, [token], None)
        self._held.append(token)
        return chosen


def common_prefix_length(one: Items[Hashable], other: Items[Hashable]) -> int:
    """Length of the longest common prefix."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)
