"""One library at work, in a process and an environment of its own: a line of JSON in for each piece of work, one out.

python -m benchmarks.peers.worker NAME '{"bundle": ..., ...}'
"""

import json
import os
import sys
import time

import numpy as np

from benchmarks.peers.decoders import PEERS, Peer

PAUSE = 0.3  # seconds, in which the threads of the library before go to sleep


class Worker:
    """The pieces of work. ids: of the text that all peers are given."""

    def __init__(self, name: str, spec: dict):
        self._peer: Peer = PEERS[name](spec)
        self._ids, self._hidden, self._held = spec["ids"], spec["hidden"], 0
        self._embeds = np.random.default_rng(0).standard_normal((spec["capacity"], self._hidden), np.float32) * 0.1

    def prefill(self, tokens: int) -> dict:
        """Seconds from `tokens` embeds (ids, where the library cannot begin with embeds) to the likeliest next id."""
        self._peer.reserve(tokens + 1)
        self._held = 0
        given = (None, self._embeds[:tokens]) if self._peer.embeds else (self._ids[:tokens],)
        begin = time.perf_counter()
        self._peer.prefill(*given)
        return {"seconds": time.perf_counter() - begin}

    def decode(self, context: int, steps: int) -> dict:
        """Seconds of `steps` greedy steps after the first `context` ids, 2 or more, and the ids found."""
        if self._held < context - 1:
            self._peer.reserve(context + steps + 1)
            self._peer.prefill(self._ids[: context - 1])
        self._peer.rewind(context - 1)
        self._held = context - 1
        token = self._peer.prefill(self._ids[context - 1 : context])
        found = []
        begin = time.perf_counter()
        for _ in range(steps):
            token = self._peer.step(token)
            found.append(token)
        return {"seconds": time.perf_counter() - begin, "ids": found}


def reset_peak() -> None:
    """Let the peak of resident memory begin at what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_mib() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong among the answers
    begin = time.perf_counter()
    worker = Worker(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps({"load_s": time.perf_counter() - begin}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        time.sleep(PAUSE)
        reset_peak()
        answer = getattr(worker, request.pop("work"))(**request) | {"mib": peak_mib()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
