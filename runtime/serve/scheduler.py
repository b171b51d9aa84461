"""Continuous batching: one thread prefills and decodes, one beside it encodes images. It knows nothing of text.

Between two steps of the decode batch requests come and go. Prompts are prefilled in chunks of CHUNK tokens, one chunk
after every other step, and each always in the same chunks, so that an answer does not depend on who else is there. An
image is encoded only while no prompt is being prefilled: on a CPU both use all cores, and the answer that could begin
must not wait for an image that comes after it. On a CPU images are encoded one request at a time, in their order: a
batch of them takes as long as one after the other, and the first would wait for the last. On a GPU those that wait are
encoded together, equal sizes in a batch. A request whose images are known, or that has none, does not wait for those.

A slot keeps its keys and values after its request has gone; a new request takes what it has in common with any slot.

What goes wrong while a request is computed fails that request alone. Afterwards the engine is tried with a token of its
own: where that fails too, what all share is broken, and the scheduler ends.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from runtime.backends.base import Decoder, Encoder
from runtime.errors import InvalidLogitsError, UserError
from runtime.generate.session import Generation, Prompt
from runtime.image.embedding_cache import EmbeddingCache
from runtime.serve.logprobs import logprob_of
from runtime.serve.pace import Pace
from runtime.serve.prefix_cache import PrefixCache
from runtime.serve.types import Busy, Callbacks, Failed, Request, TokenEvent, failure
from runtime.serve.vision_worker import Embeddings, VisionWorker

logger = logging.getLogger("convllava.serve")

CHUNK = 48  # tokens; with 4-bit weights and AVX2 alone a quarter of a second
STEPS_A_CHUNK = 2  # decode steps for each chunk, which takes longer than a step
POLL_INTERVAL_S = 0.2  # after which an idle thread looks for deadlines
DRAIN_POLL_S = 0.02
MAX_ENCODE_REQUESTS = 8  # whose images are encoded together on a GPU


@dataclass(eq=False)
class _Running:
    """A request in a slot."""

    request: Request
    prompt: Prompt
    slot: int  # while it is prefilled
    last_token: float  # when it came, monotonic seconds

    @property
    def generation(self) -> Generation:
        return self.request.generation


class Scheduler:
    """Answers many requests at once. Call `submit` from any thread."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        cache: EmbeddingCache,
        slots: int = 8,
        queue_size: int = 64,
        callbacks: Callbacks | None = None,
        batch_invariant: bool = True,
    ):
        """
        Args:
            encoder, decoder, cache: of the model; nobody else may run the decoder meanwhile.
            slots: sequences that are decoded together.
            queue_size: requests that may wait.
            callbacks: for metrics.
            batch_invariant: on a CPU, greedy answers are the same at batch size 1 and batched. It costs a lone one up
                to a third of its speed where ONNX Runtime's own operators multiply weights of 4 or 8 bits.
        """
        self.crashed: BaseException | None = None
        self.queue_size = queue_size
        self._callbacks, self._pace = callbacks or Callbacks(), Pace()
        # A single token takes another way through attention than several
        self._min_fed = 2 if batch_invariant else 1  # tokens of a prompt's last chunk
        self._slots, self._capacity = decoder.start_batch(slots, batch_invariant), decoder.capacity
        self._prefixes = PrefixCache(self._slots)
        self._active: list[_Running] = []  # decoding, in the slots 0, 1, ...
        self._prefilling: list[_Running] = []  # in slots after those, the oldest first
        self._oldest_first = False  # whose turn it is to be prefilled
        self._steps = 0  # that were decoded
        self._waiting: deque[Request] = deque()  # until their images are encoded
        self._encoding: list[Request] = []  # handed to the encoder's thread, which may be with one that was dropped
        self._encoder_busy = False
        self._ready: deque[tuple[Request, Prompt]] = deque()
        self._lock = threading.Lock()  # held where a request goes from one place to another
        self._stop_lock = threading.Lock()
        self._wake = threading.Event()
        self._max_encode_requests = MAX_ENCODE_REQUESTS if encoder.batches else 1
        self._vision = VisionWorker(encoder, cache, self._encoded, self._callbacks)
        self._stopping = False
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("decode", self._decode_forever), ("encode", self._vision.run))
        ]

    # Called from other threads

    def start(self) -> None:
        """Begin to work; until then requests wait."""
        for thread in self._threads:
            thread.start()

    def warm_up(self) -> None:
        """Run the decoder before `start`: what its first run allocates and reads no request waits for then."""
        if self._capacity > CHUNK:
            self._slots[0].forward([0] * CHUNK)
            self._slots.step([0])
            self._slots[0].rewind(0)

    def submit(self, *requests: Request) -> None:
        """Take all of the requests, or raise as `check_room`."""
        with self._lock:
            self._check_room(len(requests))
            if not self.waiting and not self.running:
                self._pace.begin()
            self._waiting.extend(requests)
        self._wake.set()

    def check_room(self, count: int) -> None:
        """Raises Busy where the queue has no room for so many requests or the scheduler stops, Failed where it has
        crashed."""
        with self._lock:
            self._check_room(count)

    def _check_room(self, count: int) -> None:
        if self.crashed is not None:
            raise Failed("crash", f"the engine has crashed: {self.crashed}")
        if self._stopping:
            raise Busy("the server is about to stop")
        if self.waiting + count > self.queue_size + self._free:
            raise Busy(f"{self.waiting} requests are waiting already")

    def retry_after(self, count: int = 1) -> int | None:
        """Seconds until there is likely to be room for so many requests; None where nothing tells."""
        return self._pace.seconds(count)

    @property
    def places(self) -> int:
        """Requests that there is room for when there are none."""
        return self.queue_size + len(self._slots)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting) + len(self._encoding) + len(self._ready)

    @property
    def waiting_images(self) -> int:
        """Images that wait to be encoded or are being encoded, each counted once."""
        with self._lock:
            requests = [*self._waiting, *self._encoding]
            return len({id(image) for request in requests for image in request.images})

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return len(self._active) + len(self._prefilling)

    @property
    def accepting(self) -> bool:
        return self.crashed is None and not self._stopping

    @property
    def _free(self) -> int:
        return len(self._slots) - self.running

    def _unfinished(self) -> int:
        with self._lock:
            return self.waiting + self.running

    def stop(self, seconds: float) -> None:
        """Refuse new requests, finish those there are within so many seconds, and fail the rest. A second call waits
        for the first, and does nothing more."""
        with self._stop_lock:
            if self._ended.is_set():
                return
            with self._lock:
                self._stopping = True
            end = time.monotonic() + seconds
            while self.crashed is None and self._unfinished() and time.monotonic() < end:
                time.sleep(DRAIN_POLL_S)
            logger.info("stopping with %d requests unfinished", self._unfinished())
            self._end()
            for thread in self._threads:
                if thread.is_alive():
                    thread.join(timeout=30)
            self._fail_all(Failed("stopping", "the server stops"))

    def _end(self) -> None:
        """Let both threads end."""
        self._ended.set()
        self._wake.set()
        self._vision.stop()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, nobody may wait for an answer that cannot come
            with self._lock:
                self.crashed = self.crashed or error  # the first one is the cause
            logger.critical("the engine has crashed", exc_info=error)
            self._end()
        finally:
            if self.crashed is not None:  # here or in the other thread, which may have missed a request on its way
                self._fail_all(Failed("crash", f"the engine has crashed: {self.crashed}"))

    def _fail_all(self, failed: Failed) -> None:
        with self._lock:
            requests = [running.request for running in (*self._active, *self._prefilling)]
            requests += [*self._encoding, *self._waiting, *(request for request, _ in self._ready)]
            self._active, self._prefilling, self._encoding = [], [], []
            self._waiting.clear()
            self._ready.clear()
        for request in {id(request): request for request in requests}.values():
            self._fail(request, failed)

    def _fail(self, request: Request, failed: Failed) -> None:
        self._finished(failed.reason)
        self._send(request, failed)

    def _finished(self, reason: str) -> None:
        self._pace.end()
        self._callbacks.finished(reason)

    def _send(self, request: Request, event: TokenEvent | Failed) -> None:
        try:
            request.sink(event)
        except Exception:
            logger.exception("a receiver of tokens has failed")
            request.end()

    # The decoder's thread

    def _decode_forever(self) -> None:
        while not self._ended.is_set():
            self._advance()
            if not self._active and not self._prefilling:
                self._wake.wait(POLL_INTERVAL_S)
                self._wake.clear()

    def _advance(self) -> None:
        """Let requests come and go, then one decode step and, after every other, one prefill chunk."""
        self._drop_ended()
        self._skip_encoder()
        self._hand_to_encoder()
        self._admit()
        if self._active:
            self._step()
            self._steps += 1
        if self._prefilling and (not self._active or self._steps % STEPS_A_CHUNK == 0):
            self._prefill_chunk(self._next_to_prefill())

    def _drop_ended(self) -> None:
        """Let go of requests whose receiver needs no more, or whose deadline has come."""
        with self._lock:
            ready = [request for request, _ in self._ready]
            dropped = [one for one in (*self._waiting, *self._encoding, *ready) if one.over]
            self._waiting = deque(request for request in self._waiting if request not in dropped)
            self._encoding = [request for request in self._encoding if request not in dropped]
            self._ready = deque(entry for entry in self._ready if entry[0] not in dropped)
            dropped += [running.request for running in self._prefilling if running.request.over]
            self._prefilling = [running for running in self._prefilling if running.request not in dropped]
        for running in [running for running in self._active if running.request.over]:
            dropped.append(running.request)
            self._leave(running)
        for request in dropped:
            if request.ended is not None:
                self._finished(request.ended)
            else:
                self._fail(request, Failed("deadline", "the request has reached its deadline"))

    def _skip_encoder(self) -> None:
        """Requests without an image that is to be encoded do not wait for those with one."""
        with self._lock:
            known = [one for one in self._waiting if all(image.embeddings is not None for image in one.images)]
            self._waiting = deque(one for one in self._waiting if one not in known)
            self._encoding += known  # until their prompts are made
        for request in known:
            found: Embeddings = {
                image.key: image.embeddings for image in request.images if image.embeddings is not None
            }
            for _ in found:
                self._callbacks.cache(True)
            self._make_ready(request, found)

    def _hand_to_encoder(self) -> None:
        """The next requests go to the encoder's thread, unless that has some, or a prompt would wait for it."""
        with self._lock:
            if self._encoder_busy or not self._waiting or self._prefilling or (self._ready and self._free):
                return
            count = min(self._max_encode_requests, len(self._waiting))
            requests = [self._waiting.popleft() for _ in range(count)]
            self._encoding += requests
            self._encoder_busy = True
            self._vision.submit(requests)

    def _encoded(self, requests: list[Request], found: Embeddings, failed: dict[int, Failed]) -> None:
        """Called on the encoder's thread."""
        for request in requests:
            if id(request) in failed:
                self._drop(request, failed[id(request)])
            elif not request.over:  # else the other thread lets go of it
                self._make_ready(request, found)
        with self._lock:
            self._encoder_busy = False
        self._wake.set()

    def _make_ready(self, request: Request, found: Embeddings) -> None:
        """Let it wait for a slot. found: its images' embeddings; the images themselves, which are large, are let go."""
        try:
            prompt = Prompt.of(request.token_ids, [(image.key, found[image.key]) for image in request.images])
        except Exception as error:  # of memory, for one
            self._drop(request, failure(error))
            return
        request.images = []
        with self._lock:
            if request in self._encoding:  # it may have been dropped meanwhile
                self._encoding.remove(request)
                self._ready.append((request, prompt))

    def _drop(self, request: Request, failed: Failed) -> None:
        """Fail one that is being encoded, unless it was dropped meanwhile."""
        with self._lock:
            if request not in self._encoding:
                return
            self._encoding.remove(request)
        self._fail(request, failed)

    def _admit(self) -> None:
        """Give a slot to the next request whose images are encoded; while others are prefilled, only to one that has
        less to prefill than they have left."""
        with self._lock:
            shortest = min(map(self._left, self._prefilling), default=float("inf"))
            found = next((entry for entry in self._ready if len(entry[1].keys) < shortest), None)
            if found is None or not self._free:
                return
            request, prompt = found
            taken = {running.slot for running in self._prefilling}
            idle = [slot for slot in range(len(self._active), len(self._slots)) if slot not in taken]
            try:
                slot, cached = self._prefixes.place(prompt.keys[: -self._min_fed], idle)
            except Exception as error:
                slot, cached, failed = idle[0], 0, error
            else:
                failed = None
                self._ready.remove(found)
                self._prefilling.append(_Running(request, prompt, slot, request.arrived))
        if failed is not None:
            self._forget(slot, failed)
            with self._lock:
                self._ready.remove(found)
            self._fail(request, failure(failed))
            return
        request.cached_tokens = cached
        self._callbacks.prefilled(len(prompt.keys) - cached, cached)

    def _left(self, running: _Running) -> int:
        """Positions of its prompt that are to be prefilled."""
        return len(running.prompt.keys) - self._slots[running.slot].length

    def _next_to_prefill(self) -> _Running:
        """The oldest and the one that has least left take turns: a short prompt does not wait for a long one."""
        self._oldest_first = not self._oldest_first
        return self._prefilling[0] if self._oldest_first else min(self._prefilling, key=self._left)

    def _prefill_chunk(self, running: _Running) -> None:
        request, sequence, length = running.request, self._slots[running.slot], len(running.prompt.keys)
        end = min(sequence.length + CHUNK, length)
        end -= length - end == 1  # the last token is not left alone
        chunk = running.prompt.part(sequence.length, end)
        token, logits = None, None
        try:
            if end == length and request.needs_logits:
                logits = sequence.forward(*chunk)
            else:
                token = sequence.forward_greedy(*chunk)
        except Exception as error:
            self._forget(running.slot, error)
            with self._lock:
                self._prefilling.remove(running)
            self._fail(request, failure(error))
            return
        self._prefixes.record(running.slot, running.prompt.keys[:end])
        if end < length:
            return
        place = len(self._active)
        self._prefixes.move(running.slot, place)
        for other in self._prefilling:
            if other.slot == place:
                other.slot = running.slot
        with self._lock:
            self._prefilling.remove(running)
            self._active.append(running)
        self._take(running, token, logits)

    def _step(self) -> None:
        """One token of each running request."""
        tokens = [running.generation.token_ids[-1] for running in self._active]
        greedy = self._fed(tokens)
        if greedy is None:
            return
        batch = list(self._active)
        for slot, token in enumerate(tokens):
            self._prefixes.append(slot, token)
        self._callbacks.step(len(batch))
        needing = [running for running in batch if running.request.needs_logits]
        logits = None
        try:
            logits = self._slots.logits(len(batch)) if needing else None
        except Exception as error:
            self._fail_running([(running, error) for running in needing])
        for slot, running in enumerate(batch):
            if running not in needing:
                self._take(running, greedy[slot], None)
            elif logits is not None:
                self._take(running, greedy[slot], logits[slot])

    def _fed(self, tokens: list[int]) -> list[int | None] | None:
        """Feed a token to each running request; returns the argmax of each. Where that raises, fail those whose token
        cannot be fed alone either; None: that some failed and the others are as before."""
        try:
            return self._slots.step(tokens)
        except Exception as error:
            failed = self._failing_alone(tokens)
            if not failed:
                try:
                    return self._slots.step(tokens)  # memory may have been short for a moment
                except Exception:
                    failed = [(running, error) for running in self._active]
            self._fail_running(failed)
            return None

    def _fail_running(self, failed: list[tuple[_Running, Exception]]) -> None:
        for running, error in failed:
            self._forget(self._active.index(running), error)
        for running, error in failed:
            self._leave(running)
            self._fail(running.request, failure(error))

    def _failing_alone(self, tokens: list[int]) -> list[tuple[_Running, Exception]]:
        failed: list[tuple[_Running, Exception]] = []
        for slot, (running, token) in enumerate(zip(self._active, tokens, strict=True)):
            sequence, length = self._slots[slot], self._slots[slot].length
            try:
                sequence.forward([token])
            except Exception as error:
                failed.append((running, error))
            else:
                sequence.rewind(length)
        return failed

    def _forget(self, slot: int, error: Exception) -> None:
        """What a slot holds is not to be used again. Raises `error`, unless it is a request's, where the decoder cannot
        run a token of our own in the slot either, tried twice."""
        self._prefixes.record(slot, [])
        if isinstance(error, UserError):
            return
        sequence = self._slots[slot]
        for _ in range(2):
            with suppress(Exception):
                sequence.rewind(0)
                sequence.forward([0])
                return
        raise error

    def _take(self, running: _Running, greedy: int | None, logits: np.ndarray | None) -> None:
        """The next token of an answer, chosen from `logits` where they are given; greedy None: its logit is NaN."""
        request, generation = running.request, running.generation
        logprob = None
        try:
            if logits is not None:
                token = generation.sampler.choose(logits)
                if request.logprobs is not None:
                    logprob = logprob_of(logits, token, request.logprobs)
            elif greedy is None:
                raise InvalidLogitsError
            else:
                token = greedy
        except Exception as error:  # invalid logits, a grammar that grew too large
            if isinstance(error, InvalidLogitsError):
                self._forget(self._active.index(running), error)
            self._leave(running)
            self._fail(request, failure(error))
            return
        generation.push(token)
        now = time.monotonic()
        observe = self._callbacks.next_token if len(generation.token_ids) > 1 else self._callbacks.first_token
        observe(now - running.last_token)
        running.last_token = now
        if generation.finish_reason:
            self._leave(running)
            self._finished(generation.finish_reason)
        self._send(request, TokenEvent(token, logprob, generation.finish_reason))

    def _leave(self, running: _Running) -> None:
        """Its slot becomes the first idle one, so that those that decode stay together."""
        slot, last = self._active.index(running), len(self._active) - 1
        self._prefixes.move(slot, last)
        self._active[slot] = self._active[last]
        self._active.pop()
