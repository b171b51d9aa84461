"""Answers many requests at once: one thread that prefills and decodes, one beside it that encodes images.

Between two steps of the decode batch requests come and go. A prompt is prefilled in chunks of CHUNK ids, one between
two steps, and always in the same chunks, so that an answer does not depend on who else is there. An image is encoded
only while no prompt is being prefilled: on a CPU both use all cores, and the answer that could begin is not to wait for
an image that comes after it. On a CPU images are encoded one request at a time, in their order: a batch of them takes
as long as one after the other, and the first would wait for the last. On a GPU those that wait are encoded together,
equal sizes in a batch. A request whose images are known, or that has none, does not wait for those.

A slot keeps its keys and values after its request has gone. A new request takes over what it has in common with any
slot, image embeds and tokens alike, up to the first position that differs.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import numpy as np

from runtime.backends.base import Sequence
from runtime.backends.ort_slots import Slots
from runtime.device.memory import Array, Cpu, concatenate, copied
from runtime.errors import InvalidLogitsError, UserError
from runtime.generate.sampler import next_token
from runtime.image.input import Picture
from runtime.model import Model, common_length
from runtime.text.grammar import JsonGrammar
from runtime.text.stop import Answer
from runtime.types import Options

CHUNK = 48  # ids; with 4-bit weights and AVX2 alone a quarter of a second
IDLE = 0.2  # seconds until an idle thread looks around again
TOGETHER = 8  # requests whose images are encoded together on a GPU


class Busy(Exception):
    """The queue is full, or the server is about to stop."""


class Failed(Exception):
    """A request that cannot be answered any more. reason: `request` (the message says what is wrong with it),
    `deadline`, `stopping`, `numbers` (the model computed none for it) or `crash`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Logprob:
    """Natural logarithms of the model's probabilities. top: (id, logprob) of the likeliest, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Token:
    """One new token of an answer and the text that became certain. finish_reason: on the last one."""

    token_id: int
    text: str
    logprob: Logprob | None
    finish_reason: str | None


@dataclass
class Request:
    """ids: of the prompt, below 0 for each image embed. pictures: of the images, in their order. limit: of new tokens.
    logprobs: how many of the likeliest to report, None for none. deadline: of time.monotonic. sink: called with each
    Token, or once with a Failed, on a thread of the engine; it may not block. cancelled: set by whoever waits no
    longer."""

    ids: list[int]
    pictures: list[Picture]
    limit: int
    options: Options
    sink: Callable[["Token | Failed"], None]
    deadline: float = float("inf")
    logprobs: int | None = None
    grammar: JsonGrammar | None = None
    ignore_eos: bool = False
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0  # of the prompt, that were taken over from a slot


class Observer:
    """Is told what happens, for metrics; this one does nothing. Times are seconds."""

    def first_token(self, seconds: float) -> None: ...

    def next_token(self, seconds: float) -> None: ...

    def step(self, occupancy: int) -> None: ...

    def encoded(self, seconds: float) -> None: ...

    def cache(self, hit: bool) -> None: ...

    def prefilled(self, fed: int, taken_over: int) -> None: ...

    def finished(self, reason: str) -> None: ...


class _Running:
    """A request in a slot. names: of the positions of its prompt, equal where keys and values are. answer: from its
    first token on."""

    def __init__(self, request: Request, names: list[Hashable], embeds: Array | None, answer: Answer):
        self.request, self.names, self.embeds, self.answer = request, names, embeds, answer
        self.random = np.random.default_rng(request.options.sampling.seed)
        self.last_token = request.submitted


@dataclass
class _Held:
    """What a slot holds. names: of its positions. used: when it last was, monotonic seconds."""

    names: list[Hashable] = field(default_factory=list)
    used: float = 0.0


class Engine:
    """Call `submit` from any thread. slots: sequences that are decoded together; queue_size: requests that may wait.
    batch_invariant: on a CPU, greedy answers are the same alone and in a crowd, which costs a lone one up to a third of
    its speed where ONNX Runtime's own operators multiply weights of 4 or 8 bits (`Slots`)."""

    def __init__(
        self,
        model: Model,
        slots: int = 8,
        queue_size: int = 64,
        observer: Observer | None = None,
        batch_invariant: bool = True,
    ):
        self.model = model
        # One id alone goes through attention another way than among several; rows of 4 and 8 bits may do so too
        self._least_fed = 2 if batch_invariant else 1  # ids of a prompt's last piece, at least
        rows = 2 if batch_invariant and not model.decoder.row_invariant else 1  # of a step
        self.crashed: BaseException | None = None
        self.queue_size = queue_size
        self._observer = observer or Observer()
        self._slots = Slots(model.decoder, slots, model.decoder.capacity, rows)
        self._held = [_Held() for _ in range(slots)]
        self._active: list[_Running] = []  # decoding, in the slots 0, 1, ...
        self._prefilling: tuple[int, _Running] | None = None  # and its slot
        self._waiting: deque[Request] = deque()  # until their images are encoded
        self._ready: deque[tuple[Request, list[Hashable], Array | None]] = deque()
        self._lock = threading.Lock()  # held where a request goes from one place to another
        self._stop_lock = threading.Lock()
        self._wake = threading.Event()
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()  # for the encoder
        self._encoding: list[Request] = []
        self._together = 1 if isinstance(model.encoder.device, Cpu) else TOGETHER
        self._stopping = False
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=work.__name__.strip("_"), daemon=True)
            for work in (self._decode_forever, self._encode_forever)
        ]
        for thread in self._threads:
            thread.start()

    # Called from other threads

    def submit(self, *requests: Request) -> None:
        """Take all of the requests, or raise as `check_room`."""
        with self._lock:
            self._check_room(len(requests))
            self._waiting.extend(requests)
        self._wake.set()

    def check_room(self, count: int) -> None:
        """Raises Busy where the queue has no room for so many requests or the engine stops, Failed where it has
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

    @property
    def places(self) -> int:
        """Requests that there is room for when there are none."""
        return self.queue_size + len(self._slots)

    @property
    def waiting(self) -> int:
        """Requests that no slot has been given to."""
        return len(self._waiting) + len(self._encoding) + len(self._ready)

    @property
    def running(self) -> int:
        """Requests in a slot."""
        return len(self._active) + (self._prefilling is not None)

    def _under_way(self) -> int:
        with self._lock:
            return self.waiting + self.running

    @property
    def _free(self) -> int:
        return len(self._slots) - self.running

    @property
    def accepting(self) -> bool:
        return self.crashed is None and not self._stopping

    def stop(self, seconds: float) -> None:
        """Refuse new requests, finish those there are within so many seconds, and fail the rest. A second call waits
        for the first, and does nothing more."""
        with self._stop_lock:
            if not self._ended.is_set():
                self._stop(seconds)

    def _stop(self, seconds: float) -> None:
        with self._lock:
            self._stopping = True
        end = time.monotonic() + seconds
        while self.crashed is None and self._under_way() and time.monotonic() < end:
            time.sleep(0.02)
        self._ended.set()
        self._wake.set()
        self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=30)
        self._fail_all(Failed("stopping", "the server stops"))

    # The decoder's thread

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # whatever it is, nobody may wait for an answer that cannot come
            with self._lock:
                self.crashed = self.crashed or error  # the first one is the cause
            self._ended.set()
            self._wake.set()
            self._jobs.put(None)
            raise
        finally:
            if self.crashed is not None:  # here or in the other thread, which may have missed a request on its way
                self._fail_all(Failed("crash", f"the engine has crashed: {self.crashed}"))

    def _fail_all(self, failed: Failed) -> None:
        with self._lock:
            requests = [running.request for running in self._active]
            requests += [self._prefilling[1].request] if self._prefilling else []
            requests += [*self._encoding, *self._waiting, *(request for request, *_ in self._ready)]
            self._active, self._prefilling, self._encoding = [], None, []
            self._waiting.clear()
            self._ready.clear()
        for request in {id(request): request for request in requests}.values():
            self._observer.finished(failed.reason)
            request.sink(failed)

    def _decode_forever(self) -> None:
        while not self._ended.is_set():
            self._drop_the_gone()
            self._pass_the_encoder_by()
            self._hand_to_encoder()
            self._admit()
            if self._active:
                self._step()
            if self._prefilling:
                self._prefill_chunk()
            if not self._active and not self._prefilling:
                self._wake.wait(IDLE)
                self._wake.clear()

    def _drop_the_gone(self) -> None:
        now = time.monotonic()
        with self._lock:
            gone = [request for request in self._waiting if self._is_gone(request, now)]
            gone += [entry[0] for entry in self._ready if self._is_gone(entry[0], now)]
            names = {id(request) for request in gone}
            self._waiting = deque(request for request in self._waiting if id(request) not in names)
            self._ready = deque(entry for entry in self._ready if id(entry[0]) not in names)
        for request in gone:
            self._say_gone(request)
        if self._prefilling and self._is_gone(self._prefilling[1].request, now):
            self._say_gone(self._prefilling[1].request)
            self._prefilling = None
        for running in [running for running in self._active if self._is_gone(running.request, now)]:
            self._say_gone(running.request)
            self._leave(running)

    @staticmethod
    def _is_gone(request: Request, now: float) -> bool:
        return request.cancelled or now > request.deadline

    def _say_gone(self, request: Request) -> None:
        self._observer.finished("cancelled" if request.cancelled else "deadline")
        if not request.cancelled:
            request.sink(Failed("deadline", "the request has reached its deadline"))

    def _pass_the_encoder_by(self) -> None:
        """Requests without an image that is to be encoded do not wait for those with one."""
        with self._lock:
            known = [r for r in self._waiting if all(picture.embeds is not None for picture in r.pictures)]
            if not known:
                return
            names = {id(request) for request in known}
            self._waiting = deque(request for request in self._waiting if id(request) not in names)
            for request in known:
                embeds = {picture.key: picture.embeds for picture in request.pictures}
                self._ready.append((request, *_named(request, embeds)))
                request.pictures = []
                for _ in embeds:
                    self._observer.cache(True)

    def _hand_to_encoder(self) -> None:
        """The next requests go to the encoder's thread, unless that has some, or a prompt would wait for it."""
        with self._lock:
            if self._encoding or not self._waiting or self._prefilling or (self._ready and self._free):
                return
            self._encoding = [self._waiting.popleft() for _ in range(min(self._together, len(self._waiting)))]
        self._jobs.put(self._encoding)

    def _admit(self) -> None:
        """Begin with the next request whose images are encoded, in the slot that has most of it where that is most of
        what the slot holds, or else in the one that was used least recently."""
        with self._lock:
            if self._prefilling or not self._ready or not self._free:
                return
            entry = self._ready[0]
        request, names, embeds = entry
        known = names[: -self._least_fed]  # the last one is fed for its logits, and not alone if that matters
        kept = [
            min(common_length(held.names, known), slot.cache.length)
            for held, slot in zip(self._held, self._slots, strict=True)
        ]
        idle = range(len(self._active), len(self._slots))
        best = max(range(len(self._slots)), key=lambda i: (kept[i], i in idle))
        if best in idle and 2 * kept[best] >= len(self._held[best].names):
            slot = best
            self._slots[slot].rewind(kept[slot])
        else:  # what all prompts begin with is no reason to give up an image
            slot = min(idle, key=lambda i: self._held[i].used)
            self._slots.copy(best, slot, kept[best])
        request.cached_tokens = kept[best]
        self._held[slot].names = names[: request.cached_tokens]
        self._observer.prefilled(len(names) - request.cached_tokens, request.cached_tokens)
        stop = (*self.model.bundle.prompt.stop, *request.options.stop)
        answer = Answer(self.model.tokenizer, stop, request.limit, request.ignore_eos)
        with self._lock:
            if self._ready and self._ready[0] is entry:  # or all were failed meanwhile
                self._ready.popleft()
                self._prefilling = slot, _Running(request, names, embeds, answer)

    def _prefill_chunk(self) -> None:
        slot, running = self._prefilling
        sequence, ids = self._slots[slot], running.request.ids
        begin = sequence.cache.length
        chunk = ids[begin : begin + CHUNK - (begin + CHUNK + 1 == len(ids))]  # no last one is left alone
        end, logits, token = begin + len(chunk), None, None
        if end == len(ids) and self._wants_logits(running.request):
            logits = sequence.forward(chunk, running.embeds)
        elif (token := _likeliest(sequence, chunk, running.embeds)) is None:
            self._held[slot].names = []  # nobody is to take over what it holds
            with self._lock:
                self._prefilling = None
            self._fail(running.request, InvalidLogitsError())
            return
        self._held[slot].names = running.names[:end]
        if end < len(ids):
            return
        running.embeds = None
        self._move(slot, len(self._active))
        with self._lock:
            self._prefilling = None
            self._active.append(running)
        self._take(running, token, logits)

    def _step(self) -> None:
        running = list(self._active)
        fed = [one.answer.token_ids[-1] for one in running]
        likeliest = self._slots.step(fed)
        for index, token in enumerate(fed):
            self._held[index].names.append(token)
        self._observer.step(len(running))
        wanted = any(self._wants_logits(one.request) for one in running)
        logits = self._slots.logits(len(running)) if wanted else None
        for index, one in enumerate(running):
            row = logits[index] if self._wants_logits(one.request) else None
            self._take(one, likeliest[index], row)

    @staticmethod
    def _wants_logits(request: Request) -> bool:
        return not request.options.sampling.greedy or request.logprobs is not None or request.grammar is not None

    def _take(self, running: _Running, token: int | None, logits: np.ndarray | None) -> None:
        """The next token of an answer, chosen from `logits` where they are given; None where the likeliest is no
        number."""
        request, answer = running.request, running.answer
        try:
            if logits is not None:
                token = _chosen(running, logits)
            elif token is None:
                raise InvalidLogitsError
        except UserError as error:  # a schema that grew too large; logits that are no numbers
            if isinstance(error, InvalidLogitsError):
                self._held[self._active.index(running)].names = []
            self._leave(running)
            self._fail(request, error)
            return
        logprob = None
        if logits is not None and request.logprobs is not None:
            logprob = logprob_of(logits, token, request.logprobs)
        text = answer.push(token)
        now = time.monotonic()
        tell = self._observer.next_token if len(answer.token_ids) > 1 else self._observer.first_token
        tell(now - running.last_token)
        running.last_token = now
        if answer.finish_reason:
            self._leave(running)
            self._observer.finished(answer.finish_reason)
        request.sink(Token(token, text, logprob, answer.finish_reason))

    def _fail(self, request: Request, error: UserError) -> None:
        reason = "numbers" if isinstance(error, InvalidLogitsError) else "request"
        self._observer.finished(reason)
        request.sink(Failed(reason, str(error)))

    def _leave(self, running: _Running) -> None:
        """Its slot becomes the first idle one, so that those that decode stay together."""
        index, last = self._active.index(running), len(self._active) - 1
        self._move(index, last)
        self._active[index] = self._active[last]
        self._active.pop()

    def _move(self, slot: int, place: int) -> None:
        """What is in a slot, used just now, changes places with what is in another."""
        self._slots.swap(slot, place)
        self._held[slot], self._held[place] = self._held[place], self._held[slot]
        self._held[place].used = time.monotonic()

    # The encoder's thread

    def _encode_forever(self) -> None:
        while (requests := self._jobs.get()) is not None and not self._ended.is_set():
            found, failed = {}, {}
            try:
                self._embeds([picture for request in requests for picture in request.pictures], found)
            except Exception:  # of one of them, or too many at once for a GPU's memory
                failed = self._try_alone(requests, found)
            entries = [(request, *_named(request, found)) for request in requests if id(request) not in failed]
            with self._lock:
                ours, self._encoding = bool(self._encoding), []  # or all were failed meanwhile
                if ours:
                    self._ready.extend(entries)
            for request in requests if ours else ():
                request.pictures = []  # large, and not needed any more
                if id(request) in failed:
                    self._observer.finished("request")
                    request.sink(Failed("request", str(failed[id(request)])))
            self._wake.set()

    def _try_alone(self, requests: list[Request], found: dict[Hashable, Array]) -> dict[int, UserError]:
        """What is wrong with each request that cannot be encoded, by its id."""
        failed = {}
        for request in requests:
            try:
                self._embeds(request.pictures, found)
            except UserError as error:
                failed[id(request)] = error
        return failed

    def _embeds(self, pictures: list[Picture], found: dict[Hashable, Array]) -> None:
        """Add the image embeds of the pictures by their keys, encoding those that are not known."""
        missing: dict[Hashable, Picture] = {}
        for picture in pictures:
            if picture.key in found or picture.key in missing:
                continue
            embeds = self.model.cache.get(picture.key) if picture.embeds is None else picture.embeds
            self._observer.cache(embeds is not None)
            if embeds is None:
                missing[picture.key] = picture
            else:
                found[picture.key] = embeds
        if not missing:
            return
        by_size, started = sorted(missing.values(), key=lambda one: one.pixel_values.shape), time.monotonic()
        embeds, row = self.model.encoder([picture.pixel_values for picture in by_size]), 0
        self._observer.encoded(time.monotonic() - started)
        for picture in by_size:
            rows = embeds[row : row + picture.tokens]
            # One that stays in the cache is not to hold all others that were computed with it
            found[picture.key] = copied(rows) if len(by_size) > 1 else rows
            self.model.cache.put(picture.key, found[picture.key])
            row += picture.tokens


def _likeliest(sequence: Sequence, ids: list[int], embeds: Array | None) -> int | None:
    """The likeliest token after `ids`; None where its logit is no number."""
    try:
        return sequence.forward_greedy(ids, embeds)
    except InvalidLogitsError:
        return None


def _chosen(running: _Running, logits: np.ndarray) -> int:
    request = running.request
    allowed = request.grammar.allow(logits) if request.grammar else logits
    token = next_token(allowed, running.answer.token_ids, request.options.sampling, running.random)
    if request.grammar:
        request.grammar.push(token)
    return token


def _named(request: Request, embeds: dict[Hashable, Array]) -> tuple[list[Hashable], Array | None]:
    """(names of the prompt's positions, its image embeds)."""
    rows = [(picture.key, row) for picture in request.pictures for row in range(picture.tokens)]
    names = [token if token >= 0 else rows[-1 - token] for token in request.ids]
    return names, concatenate([embeds[picture.key] for picture in request.pictures]) if request.pictures else None


def logprob_of(logits: np.ndarray, token: int, top: int) -> Logprob:
    """Of the token among logits [V], and of the `top` likeliest."""
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = np.argpartition(-logprobs, top)[:top] if top else []
    ordered = sorted(((int(i), float(logprobs[i])) for i in best), key=lambda pair: (-pair[1], pair[0]))
    return Logprob(token, float(logprobs[token]), tuple(ordered))
