"""Encodes the images of requests on a thread of its own, beside the one that decodes."""

import queue
import time
from collections.abc import Callable, Hashable

from runtime.backends.base import Encoder
from runtime.device.memory import Array, copied
from runtime.errors import UserError
from runtime.image.embedding_cache import EmbeddingCache
from runtime.image.input import ImageInput
from runtime.serve.types import Callbacks, Request

Embeddings = dict[Hashable, Array]  # key of an image -> [T, D]


class VisionWorker:
    """Takes requests by `submit` and hands them back to `done`, encoded or failed."""

    def __init__(
        self,
        encoder: Encoder,
        cache: EmbeddingCache,
        done: Callable[[list[Request], Embeddings, dict[int, UserError]], None],
        callbacks: Callbacks,
    ):
        """
        Args:
            encoder, cache: of the model.
            done: called on the worker's thread with the requests, their embeddings, and what is wrong with each that
                cannot be encoded, by its id().
            callbacks: told of encodings and of cache hits.
        """
        self._encoder, self._cache, self._done, self._callbacks = encoder, cache, done, callbacks
        self._jobs: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()

    def submit(self, requests: list[Request]) -> None:
        self._jobs.put(requests)

    def stop(self) -> None:
        """End `run` once the job at hand is done."""
        self._jobs.put(None)

    def run(self) -> None:
        """Work until `stop`. An exception that is no request's fault ends it."""
        while (requests := self._jobs.get()) is not None:
            self._work(requests)

    def _work(self, requests: list[Request]) -> None:
        found: Embeddings = {}
        failed: dict[int, UserError] = {}
        try:
            self._encode([image for request in requests for image in request.images], found)
        except Exception:  # of one of them, or too many at once for a GPU's memory
            failed = self._encode_each(requests, found)
        self._done(requests, found, failed)

    def _encode_each(self, requests: list[Request], found: Embeddings) -> dict[int, UserError]:
        failed: dict[int, UserError] = {}
        for request in requests:
            try:
                self._encode(request.images, found)
            except UserError as error:
                failed[id(request)] = error
        return failed

    def _encode(self, images: list[ImageInput], found: Embeddings) -> None:
        """Add the embeddings of the images by their keys, encoding those that are not known."""
        missing: dict[Hashable, ImageInput] = {}
        for image in images:
            if image.key in found or image.key in missing:
                continue
            embeddings = self._cache.get(image.key) if image.embeddings is None else image.embeddings
            self._callbacks.cache(embeddings is not None)
            if embeddings is None:
                missing[image.key] = image
            else:
                found[image.key] = embeddings
        if not missing:
            return
        by_size, started = sorted(missing.values(), key=lambda image: image.pixel_values.shape), time.monotonic()
        encoded, row = self._encoder([image.pixel_values for image in by_size]), 0
        self._callbacks.encoded(time.monotonic() - started)
        for image in by_size:
            rows = encoded[row : row + image.tokens]
            # One that stays in the cache must not keep alive all others that were computed with it
            found[image.key] = copied(rows) if len(by_size) > 1 else rows
            self._cache.put(image.key, found[image.key])
            row += image.tokens
