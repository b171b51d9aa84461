"""Where an answer ends: stop strings, end-of-sequence tokens, token limits."""

import math

from runtime.text.tokenizer import Tokenizer


class StopStrings:
    """Cuts streamed text at the first stop string; of several, at the one that is complete first.

    Text that may turn out to be the beginning of one is held back until it is certain not to be. Where the text is
    cut does not depend on how it was split into pieces.
    """

    def __init__(self, stop: tuple[str, ...]):
        """stop: non-empty strings."""
        self._stop = stop
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop string has been met; after that all text is dropped."""
        if self._stopped:
            return "", True
        text = self._held + piece
        matches = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if matches:
            self._stopped, self._held = True, ""
            return text[: min(matches)[1]], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """The text still held back, once the answer has ended."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Answer:
    """One answer under way.

    stop: strings that end it and do not appear in it. limit: of its tokens, the end-of-sequence token among them.
    ignore_eos: the end-of-sequence token does not end it, as load tests want it.
    Attributes: token_ids, so far; text, what is certain of it; finish_reason: `stop`, `length`, or None while it goes
    on; unfed: tokens of it that the KV cache must still be given if the conversation goes on; before_stop: how many of
    its tokens stand before the stop string that ended it, None where none did.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], limit: int, ignore_eos: bool = False):
        self._limit, self._ends = limit, frozenset() if ignore_eos else tokenizer.eos_token_ids
        self._detokenizer, self._stops = tokenizer.detokenizer(), StopStrings(stop)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.unfed: list[int] = []
        self.before_stop: int | None = None
        self._texts: list[str] = []
        self._said = 0  # characters so far, those of a stop string among them
        self._said_at = [0]  # of them, up to each token and it

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def push(self, token: int) -> str:
        """Returns the text that became certain."""
        self.token_ids.append(token)
        at_end = token in self._ends
        piece = self._detokenizer.flush() if at_end else self._detokenizer.push(token)
        text, stopped = self._stops.push(piece)
        self._said += len(piece)
        self._said_at.append(self._said if piece else math.inf)  # one that completes no character goes with the next
        if at_end or stopped:
            self.finish_reason, self.unfed = "stop", []  # the template's end of an answer stands in for what ended it
        else:
            self.unfed = [token]
            if len(self.token_ids) == self._limit:
                self.finish_reason = "length"
                text += self._stops.push(self._detokenizer.flush())[0]
        if self.finish_reason:
            text += self._stops.flush()
        self._texts.append(text)
        if stopped:
            shown = sum(map(len, self._texts))
            self.before_stop = max(count for count, said in enumerate(self._said_at) if said <= shown)
        return text
