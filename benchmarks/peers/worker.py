"""One library at work, in a process and an environment of its own: a line of JSON in for each piece of work, one out.

python -m benchmarks.peers.worker KIND NAME '{"bundle": ..., ...}'

KIND: a module beside this one, whose `start(name, spec)` returns what has a method for each piece of work.
"""

import importlib
import json
import os
import sys
import time

PAUSE = 0.3  # seconds, in which the threads of the library before go to sleep


def reset_peak() -> None:
    """Let the peak of resident memory begin at what is resident now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_mib() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1024)


def main() -> None:
    kind, name, spec = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong among the answers
    begin = time.perf_counter()
    work = importlib.import_module(f"benchmarks.peers.{kind}").start(name, json.loads(spec))
    loaded = {"load_s": time.perf_counter() - begin, "mib": peak_mib()}
    print(json.dumps(loaded), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        time.sleep(PAUSE)
        reset_peak()
        answer = getattr(work, request.pop("work"))(**request) | {"mib": peak_mib()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
