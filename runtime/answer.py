"""New tokens, one after the other -> the answer's text, and where it ends."""

from runtime.prompt import StopStrings
from runtime.tokenizer import Tokenizer


class Answer:
    """One answer under way.

    stop: strings that end it and do not appear in it. limit: of its tokens, the end-of-sequence token among them.
    ignore_eos: the end-of-sequence token does not end it, as load tests want it.
    Attributes: token_ids, so far; text, what is certain of it; finish_reason: `stop`, `length`, or None while it goes
    on; unfed: tokens of it that the KV cache must still be given if the conversation goes on.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], limit: int, ignore_eos: bool = False):
        self._limit, self._ends = limit, frozenset() if ignore_eos else tokenizer.eos_token_ids
        self._detokenizer, self._stops = tokenizer.detokenizer(), StopStrings(stop)
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.unfed: list[int] = []
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def push(self, token: int) -> str:
        """Returns the text that became certain."""
        self.token_ids.append(token)
        at_end = token in self._ends
        text, stopped = self._stops.push(self._detokenizer.flush() if at_end else self._detokenizer.push(token))
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
        return text
