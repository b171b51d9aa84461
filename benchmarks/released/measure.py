"""Our formats and one peer at a time, in turn at the same work, so that no other model is in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.peers.turns import in_turn
from benchmarks.released.rows import row

STEPS = 16  # greedy steps of a decode


class Worker(Protocol):
    """`benchmarks.peers.turns.Running`."""

    start: dict

    def ask(self, work: str, **arguments) -> dict: ...

    def close(self) -> None: ...


Start = Callable[[str], Worker]  # by name: a format of ours, or the peer


@dataclass(frozen=True)
class Piece:
    """A piece of work. ask: what a worker is asked for; context: positions or image; steps: of a rate, or None."""

    work: str
    ask: str
    arguments: dict
    context: int | str
    steps: int | None = None


def decoder_pieces(tokens: Sequence[int], contexts: Sequence[int], works: Sequence[str]) -> list[Piece]:
    prefills = [Piece("prefill", "prefill", {"tokens": count}, count) for count in tokens]
    decodes = [Piece("decode", "decode", {"context": at, "steps": STEPS}, at, STEPS) for at in contexts]
    return [piece for piece in (*prefills, *decodes) if piece.work in works]


def encoder_piece(side: int) -> Piece:
    return Piece("encoder", "encode", {"height": side, "width": side}, f"{side}x{side}")


def first_token_piece(side: int) -> Piece:
    return Piece("first_token", "first_token", {}, f"{side}x{side}")


def beside(
    peer: str, forms: Sequence[str], start: Start, pieces: Sequence[Piece], rounds: int, loads: bool
) -> list[dict]:
    """Rows of our formats beside a peer, for each piece of work, and for loading.

    loads: start all of them in turn `rounds` times more, and report what that took. The first round warms up, as
    files come into the page cache.
    """
    names = [*forms, peer]
    workers: dict[str, Worker] = {}
    starts: dict[str, list[dict]] = {name: [] for name in names}
    try:
        for _ in range(rounds + 1 if loads else 1):
            for name in names:
                if name in workers:
                    workers.pop(name).close()
                workers[name] = start(name)
                starts[name].append(workers[name].start)
        rows = []
        if loads:
            rows += [row("load", peer, form, "", starts[form][1:], starts[peer][1:]) for form in forms]
        for piece in pieces:
            answers = in_turn(workers, rounds, piece.ask, **piece.arguments)
            for form in forms:
                found = row(piece.work, peer, form, piece.context, answers[form], answers[peer], piece.steps)
                rows.append(found)
                print(found, flush=True)
        return rows
    finally:
        for worker in workers.values():
            worker.close()
