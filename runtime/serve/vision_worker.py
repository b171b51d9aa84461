"""Encodes the images of requests on a thread of its own, beside the one that decodes."""

import math
import queue
import time
from collections.abc import Callable, Hashable

import numpy as np

from runtime.backends.base import Encoder
from runtime.device.cpuinfo import lower_priority
from runtime.device.memory import Array, copied
from runtime.errors import UserError
from runtime.image.embedding_cache import EmbeddingCache
from runtime.serve.images import PreparedImage
from runtime.serve.types import Callbacks, Failed, Request, failure

ENCODER_NICE = 5  # on a CPU, where both need all cores, answers that go on come before pictures of the next ones
Embeddings = dict[Hashable, Array]  # key of an image -> [T, D]


class VisionWorker:
    """Takes requests by `submit` and hands them back to `done`, encoded or failed."""

    def __init__(
        self,
        encoder: Encoder,
        cache: EmbeddingCache,
        done: Callable[[list[Request], Embeddings, dict[int, Failed]], None],
        callbacks: Callbacks,
    ):
        """
        Args:
            encoder, cache: of the model.
            done: called on the worker's thread with the requests, their embeddings (of those that are over perhaps
                none), and what is wrong with each that cannot be encoded, by its id().
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
        """Work until `stop`. Raises what an encoder raises that can encode nothing any more."""
        if not self._encoder.batches:
            lower_priority(ENCODER_NICE)
        while (requests := self._jobs.get()) is not None:
            self._work(requests)

    def _work(self, requests: list[Request]) -> None:
        found: Embeddings = {}
        failed: dict[int, Failed] = {}
        try:
            self._encode(requests, found)
        except Exception:  # of one of them, or too many at once for a GPU's memory
            for request in requests:
                try:
                    self._encode([request], found)
                except Exception as error:
                    failed[id(request)] = failure(error)
                    if not isinstance(error, UserError):
                        self._check_encoder(next(one for one in request.images if one.embeddings is None), error)
        self._done(requests, found, failed)

    def _encode(self, requests: list[Request], found: Embeddings) -> None:
        """Add the embeddings of the requests' images by their keys, encoding those that are not known."""
        missing: dict[Hashable, PreparedImage] = {}
        for image in (image for request in requests if not request.over for image in request.images):
            if image.key in found or image.key in missing:
                continue
            embeddings = self._cache.get(image.key) if image.embeddings is None else image.embeddings
            self._callbacks.cache(embeddings is not None)
            if embeddings is None:
                missing[image.key] = image
            else:
                found[image.key] = embeddings
        images = sorted(missing.values(), key=lambda image: image.shape)
        # One at a time is as fast on a CPU, and who leaves is noticed in between
        at_once = max(len(images), 1) if self._encoder.batches else 1
        for begin in range(0, len(images), at_once):
            if all(request.over for request in requests):
                return
            self._encode_images(images[begin : begin + at_once], found)

    def _encode_images(self, images: list[PreparedImage], found: Embeddings) -> None:
        started = time.monotonic()
        encoded, row = self._encoder([image.pixel_values for image in images]), 0
        self._callbacks.encoded(time.monotonic() - started)
        for image in images:
            rows = encoded[row : row + image.tokens]
            # One that stays in the cache must not keep alive all others that were computed with it
            found[image.key] = copied(rows) if len(images) > 1 else rows
            self._cache.put(image.key, found[image.key])
            row += image.tokens

    def _check_encoder(self, image: PreparedImage, error: Exception) -> None:
        """After `error`: raise it where a black picture of a single visual token cannot be encoded either."""
        height, width = image.shape[:2]
        side = math.isqrt(height * width // image.tokens)
        try:
            self._encoder([np.zeros((3, side, side), np.float32)])
        except UserError:  # an engine for other sizes; it works
            pass
        except Exception:
            raise error from None
