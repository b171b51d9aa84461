"""How far a batch is: a line on standard error, which a terminal shows in place."""

import sys
import time

TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 0.2, 30.0


class Progress:
    """Questions done, their rate and the time left. It begins when it is made.

    Attributes:
        total: questions.
        done: those that are finished.
    """

    def __init__(self, total: int, done: int = 0):
        """done: in an earlier run."""
        self.total, self.done = total, done
        self._earlier, self._failed = done, 0
        self._terminal = sys.stderr.isatty()
        self._interval = TERMINAL_INTERVAL_S if self._terminal else LOG_INTERVAL_S
        self._begin = self._shown = time.monotonic()

    def update(self, failed: bool) -> None:
        """One more is finished."""
        self.done += 1
        self._failed += failed
        now = time.monotonic()
        if now - self._shown >= self._interval or (self._terminal and self.done == self.total):
            self._shown = now
            before, after = ("\r", "\x1b[K") if self._terminal else ("", "\n")  # erases what a longer line left
            print(f"{before}{self._line(now - self._begin)}{after}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line that a terminal shows."""
        if self._terminal:
            print(file=sys.stderr)

    def _line(self, seconds: float) -> str:
        rate = (self.done - self._earlier) / seconds
        left = clock((self.total - self.done) / rate)
        return f"{self.done}/{self.total} questions, {self._failed} failed, {rate:.3g}/s, {left} left"


def clock(seconds: float) -> str:
    """H:MM:SS."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
