"""Image embeddings that were computed before: the least recently used go where a limit in bytes is reached."""

import threading
from collections import OrderedDict
from collections.abc import Hashable

from runtime.device.memory import Array

DEFAULT_BYTES = 256 << 20


class EmbeddingCache:
    """Key -> image embeddings [T, D] on their device. max_bytes: of all of them together; 0 keeps none.

    May be used by several threads.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, Array] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Array | None:
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                self._entries.move_to_end(key)
            return found

    def put(self, key: Hashable, embeddings: Array) -> None:
        """`embeddings` may not be written to from now on. One that is larger than all the room there is is not kept."""
        with self._lock:
            if embeddings.nbytes > self.max_bytes:
                return
            if (old := self._entries.pop(key, None)) is not None:
                self.bytes -= old.nbytes
            self._entries[key] = embeddings
            self.bytes += embeddings.nbytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._entries.popitem(last=False)[1].nbytes
