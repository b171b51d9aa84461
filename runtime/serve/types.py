"""What the scheduler takes and what it answers."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from runtime.errors import InvalidLogitsError, UserError
from runtime.generate.session import Generation
from runtime.serve.images import PreparedImage
from runtime.text.grammar import SchemaError

logger = logging.getLogger("convllava.serve")


class Busy(Exception):
    """The queue is full, or the server is about to stop."""


# HTTP's status for each reason to fail
FAILURE_STATUS = {
    "request": 400,
    "deadline": 504,
    "stopping": 503,
    "numbers": 500,
    "internal": 500,
    "crash": 500,
}


class Failed(Exception):
    """A request that cannot be answered any more.

    Attributes:
        reason: `request` (the message says what is wrong with it), `deadline`, `stopping`, `numbers` (the model
            returned NaN or Inf for it), `internal` (something of ours failed for it alone) or `crash`.
        param: the field of a `request` that is wrong.
    """

    def __init__(self, reason: str, message: str, param: str = "messages"):
        super().__init__(message)
        self.reason, self.param = reason, param


def failure(error: Exception) -> Failed:
    """What a request is told that `error` has ended; an unexpected one is logged."""
    if isinstance(error, InvalidLogitsError):
        return Failed("numbers", str(error))
    if isinstance(error, UserError):
        return Failed("request", str(error), "response_format" if isinstance(error, SchemaError) else "messages")
    logger.error("a request has failed", exc_info=error)
    return Failed("internal", f"the engine failed on this request: {type(error).__name__}")


@dataclass(frozen=True)
class Logprob:
    """Natural logarithms of the model's probabilities. top: (token ID, logprob), most probable first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenEvent:
    """One new token of an answer. finish_reason: on the last one, `stop` (end of sequence) or `length`."""

    token_id: int
    logprob: Logprob | None
    finish_reason: str | None


@dataclass(eq=False)
class Request:
    """One answer that is wanted.

    Attributes:
        token_ids: of the prompt [S]; -1 - k stands for row k of the images' embeddings.
        images: in their order.
        generation: chooses the new tokens and says where they end.
        sink: called with each TokenEvent, or once with a Failed, on a thread of the scheduler; it may not block.
        deadline: of time.monotonic, seconds.
        logprobs: how many of the most probable tokens to report, None for no log-probabilities.
        arrived: when the client's request came, of time.monotonic, seconds.
        cached_tokens: positions of the prompt that were in a slot's KV cache.
        ended: why the receiver needs no more tokens: `cancelled` or `stop` (a stop string); None while it does.
    """

    token_ids: list[int]
    images: list[PreparedImage]
    generation: Generation
    sink: Callable[["TokenEvent | Failed"], None]
    deadline: float = float("inf")
    logprobs: int | None = None
    arrived: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0
    ended: str | None = None

    def end(self, reason: str = "cancelled") -> None:
        """No more tokens are needed. The first reason counts."""
        self.ended = self.ended or reason

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.ended is not None or time.monotonic() > self.deadline

    @property
    def needs_logits(self) -> bool:
        return self.generation.sampler.needs_logits or self.logprobs is not None


class Callbacks:
    """What happens in the scheduler, for metrics; the default does nothing. Times are seconds."""

    def first_token(self, seconds: float) -> None: ...

    def next_token(self, seconds: float) -> None: ...

    def step(self, occupancy: int) -> None: ...

    def encoded(self, seconds: float) -> None: ...

    def cache(self, hit: bool) -> None: ...

    def prefilled(self, fed: int, cached: int) -> None: ...

    def finished(self, reason: str) -> None: ...
