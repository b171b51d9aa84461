"""What the slots' KV caches hold, and which slot a new prompt takes."""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field

from runtime.backends.base import SequenceBatch
from runtime.generate.session import common_prefix_length


@dataclass
class CachedPrefix:
    """What one slot holds: keys of its positions (see `Prompt`), and when it was last used, monotonic seconds."""

    keys: list[Hashable] = field(default_factory=list[Hashable])
    used: float = 0.0


class PrefixCache:
    """The slots of a batch and the prefixes that they hold after their requests have gone."""

    def __init__(self, slots: SequenceBatch):
        self._slots = slots
        self._prefixes = [CachedPrefix() for _ in range(len(slots))]

    def place(self, keys: list[Hashable], idle: list[int]) -> tuple[int, int]:
        """Choose a slot for a prompt and make it hold as much of it as any slot does.

        A slot that holds mostly this prompt is taken as it is. Otherwise the one used least recently gets a copy: a
        shared system prompt alone does not justify evicting another image's cached prefix.

        Args:
            keys: of the prompt's positions that need no prefill if they are cached.
            idle: slots that are free.

        Returns:
            The slot, and how many positions of the prompt it holds now.

        Raises whatever the slots raise; what is held by others stays as it was.
        """
        held = [
            min(common_prefix_length(prefix.keys, keys), self._slots[slot].length)
            for slot, prefix in enumerate(self._prefixes)
        ]
        best = max(range(len(self._slots)), key=lambda slot: (held[slot], slot in idle))
        if best in idle and 2 * held[best] >= len(self._prefixes[best].keys):
            slot = best
            self._slots[slot].rewind(held[slot])
        else:
            slot = min(idle, key=lambda slot: self._prefixes[slot].used)
            self._prefixes[slot].keys = []  # until it is whole
            self._slots.copy(best, slot, held[best])
        self._prefixes[slot].keys = keys[: held[best]]
        return slot, held[best]

    def record(self, slot: int, keys: list[Hashable]) -> None:
        """The slot holds these positions now; none of them where they are not to be used again."""
        self._prefixes[slot].keys = keys

    def append(self, slot: int, token: int) -> None:
        """The slot holds one token more."""
        self._prefixes[slot].keys.append(token)

    def move(self, slot: int, place: int) -> None:
        """What is in a slot, used just now, trades places with what is in another."""
        self._slots.swap(slot, place)
        self._prefixes[slot], self._prefixes[place] = self._prefixes[place], self._prefixes[slot]
        self._prefixes[place].used = time.monotonic()
