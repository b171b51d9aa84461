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
    """The text of one answer, from its tokens.

    Attributes:
        text: what is certain of it so far.
        finish_reason: `stop` (end of sequence or a stop string), `length`, or None while it goes on.
        kept_ids: its tokens that are part of the conversation, without the end-of-sequence token and without what a
            stop string cut off.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        """
        Args:
            tokenizer: of the bundle.
            stop: strings that end the answer and do not appear in it.
        """
        self._detokenizer, self._stops = tokenizer.detokenizer(), StopStrings(stop)
        self.finish_reason: str | None = None
        self.kept_ids: list[int] = []
        self._texts: list[str] = []
        self._decoded = 0  # characters so far, those of a stop string included
        self._decoded_at: list[float] = [0]  # the same after each token

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def push(self, token: int, finish_reason: str | None) -> str:
        """Take the next token.

        Args:
            token: its ID.
            finish_reason: of the tokens: `stop` where this is the end-of-sequence token, `length` where it is the last
                one allowed, None where more may come.

        Returns:
            The text that became certain, often "".
        """
        at_end = finish_reason == "stop"
        piece = self._detokenizer.flush() if at_end else self._detokenizer.push(token)
        text, stopped = self._stops.push(piece)
        self._decoded += len(piece)
        # A token that completes no character goes with the next one
        self._decoded_at.append(self._decoded if piece else math.inf)
        if not at_end:
            self.kept_ids.append(token)
        if finish_reason == "length" and not stopped:
            text += self._stops.push(self._detokenizer.flush())[0]
        self.finish_reason = "stop" if stopped else finish_reason
        if self.finish_reason:
            text += self._stops.flush()
        self._texts.append(text)
        if stopped:
            shown = len(self.text)
            del self.kept_ids[max(count for count, decoded in enumerate(self._decoded_at) if decoded <= shown) :]
        return text
