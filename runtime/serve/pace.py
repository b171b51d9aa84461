"""How fast requests end, which tells those that found no place when to come again."""

import math
import time
from collections import deque

WINDOW = 32  # ends of requests
MAX_RETRY_AFTER_S = 60  # OpenAI's clients wait no longer


class Pace:
    """Seconds between the ends of requests, while there are any."""

    def __init__(self):
        self._gaps: deque[float] = deque(maxlen=WINDOW)
        self._last = time.monotonic()

    def begin(self) -> None:
        """A request comes where there was none: what passed until now was no wait."""
        self._last = time.monotonic()

    def end(self) -> None:
        """A request has ended."""
        now = time.monotonic()
        self._gaps.append(now - self._last)
        self._last = now

    def seconds(self, count: int) -> int | None:
        """Until so many have ended, as fast as of late; None where none has."""
        gaps = list(self._gaps)  # another thread may add to them
        if not gaps:
            return None
        return min(max(math.ceil(count * sum(gaps) / len(gaps)), 1), MAX_RETRY_AFTER_S)
