"""Images of requests: those that were seen before from a cache, others opened and sized in a sandbox."""

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import asdict, dataclass

import numpy as np

from runtime.device.memory import Array
from runtime.image.embedding_cache import EmbeddingCache
from runtime.image.limits import SERVED_FORMATS
from runtime.image.preprocess import ImageRule, normalised
from runtime.serve.sandbox import Sandbox
from runtime.serve.sizing import Sizing

IMAGE_JOB = "runtime.serve.sandbox_worker:image_job"
MAX_SEEN = 1 << 16  # files whose picture is remembered, some hundred bytes each
BASE_BYTES, BYTES_A_PIXEL = 256 << 20, 24  # of a sandbox's memory: itself, and what decoding takes at most


@dataclass(eq=False)
class PreparedImage:
    """One image of a request, sized for the encoder.

    Attributes:
        key: equal for the same pixels at the same size.
        tokens: visual tokens that it becomes.
        pixels: uint8 [H, W, 3]; None where there are embeddings.
        embeddings: [T, D], None until they are computed.
    """

    key: Hashable
    tokens: int
    rule: ImageRule
    pixels: np.ndarray | None = None
    embeddings: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of `pixels`."""
        assert self.pixels is not None, "only where the embeddings are known"
        return self.pixels.shape

    @property
    def pixel_values(self) -> np.ndarray:
        """float32 [3, H, W], made anew each time."""
        assert self.pixels is not None, "only where the embeddings are known"
        return normalised(self.pixels, self.rule)


class ImageOpener:
    """Files to prepared images, within limits. For the thread of an event loop."""

    def __init__(self, rule: ImageRule, cache: EmbeddingCache, max_pixels: int, cpu_seconds: int, processes: int):
        """
        Args:
            rule: of the bundle.
            cache: of the model.
            max_pixels: of one image.
            cpu_seconds: processor time for opening one.
            processes: that open images at once.
        """
        settings = {"rule": rule.to_dict(), "max_pixels": max_pixels, "formats": SERVED_FORMATS}
        memory = BASE_BYTES + BYTES_A_PIXEL * max_pixels
        self._sandbox = Sandbox("image data", IMAGE_JOB, settings, processes, memory, cpu_seconds)
        self._rule, self._cache = rule, cache
        self._seen: OrderedDict[tuple[bytes, Sizing], tuple[Hashable, int]] = OrderedDict()  # -> key, tokens

    def start(self) -> None:
        self._sandbox.start()

    def close(self) -> None:
        self._sandbox.close()

    async def open(self, content: bytes, digest: bytes, sizing: Sizing) -> PreparedImage:
        """An image that was seen before and whose embeddings are in the cache waits for no other.

        Args:
            content: of the file.
            digest: of `content`.
            sizing: what it is sized to.

        Raises:
            UserError: it cannot be opened or sized, or takes more than it may.
        """
        file = digest, sizing
        if (seen := self._seen.get(file)) is not None:
            self._seen.move_to_end(file)
            key, tokens = seen
            if (embeddings := self._cache.get(key)) is not None:
                return PreparedImage(key, tokens, self._rule, embeddings=embeddings)
        head, pixels = await self._sandbox.run(content, asdict(sizing))
        height, width, _ = head["shape"]
        key, tokens = (height, width, head["digest"]), self._rule.tokens(height, width)
        self._seen[file] = key, tokens
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        if (embeddings := self._cache.get(key)) is not None:  # from another file
            return PreparedImage(key, tokens, self._rule, embeddings=embeddings)
        return PreparedImage(key, tokens, self._rule, np.frombuffer(pixels, np.uint8).reshape(height, width, 3))


def digest_of(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
