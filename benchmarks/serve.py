"""The server under load, with and without batching, on the demo model.

    python -m benchmarks.serve [--bundle DIR] [--rates R ...] [--seconds S] [--json F]

Every server is a process of its own, asked through OpenAI's client. Answers have a fixed number of tokens (ignore_eos).

seen: CROWD conversations at once about images seen before, TOKENS each, against one after the other.
new: CROWD pages at once that were never seen, SHORT tokens each, against one after the other; and when the first answer
begins, against a lone one.
gap: the longest pause between two tokens of an answer while another page comes in.
schema: tokens of an answer that follows a JSON schema (a long array of objects), against one that follows none; medians
of ROUNDS turns each.
sweep: requests at random times (Poisson), so many a second on average, about pages seen before, SHORT tokens each:
throughput, time to the first token and between tokens; with --max-batch CROWD and 1.
"""

import argparse
import asyncio
import base64
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import openai

from benchmarks import record

ROOT = Path(__file__).parents[1]
CROWD, TOKENS, SHORT, ROUNDS = 8, 256, 64, 5
QUESTIONS = ("What is the total?", "Who issued this document?", "What is the date?", "Describe the page.")
ONE_BY_ONE = "one after the other"
WAIT = 120  # seconds, for a server to be ready
ITEM = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "amount": {"type": "number"}},
    "required": ["name", "amount"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": TOKENS}  # longer than an answer may be


class Server:
    """`python -m runtime.serve` as a user starts it."""

    def __init__(self, bundle: str | None, batch: int, *options: object):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        command = [sys.executable, "-m", "runtime.serve", "--port", self.url.rpartition(":")[2]]
        command += ["--max-batch", str(batch), "--max-queue", "1000", *(["--bundle", bundle] if bundle else [])]
        command += map(str, options)
        self._process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        end = time.monotonic() + WAIT
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/ready", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None and self._ready()

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=3600)

    def close(self) -> int:
        """Returns its exit code; below 0 it is the signal that has ended it."""
        self._process.terminate()
        return self._process.wait()


@dataclass
class Answered:
    """Times of one answer, seconds of time.perf_counter: when it was asked for, and when each piece came."""

    begin: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0

    @property
    def first(self) -> float:
        return self.pieces[0] - self.begin

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:], strict=False)]


async def ask(
    client: openai.AsyncOpenAI,
    model: str,
    page: str,
    question: str,
    tokens: int,
    schema: dict | None = None,
    every: bool = False,
) -> Answered:
    """every: note each token, by asking for its logprob, and not only those that bring text."""
    content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": page}}]
    answered = Answered(time.perf_counter())
    followed = (
        {"type": "json_schema", "json_schema": {"name": "asked", "schema": schema}} if schema else {"type": "text"}
    )
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=tokens, temperature=0,
        stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}, response_format=followed,
        logprobs=every,
    )  # fmt: skip
    async for chunk in stream:
        if chunk.choices and (chunk.choices[0].delta.content or chunk.choices[0].logprobs):
            answered.pieces.append(time.perf_counter())
        if chunk.usage:
            answered.tokens = chunk.usage.completion_tokens
    return answered


class Load:
    """Pages to ask about, and what came of it."""

    def __init__(self, bundle: str | None, folder: Path, pages: int):
        options = ["--pages", str(pages), "--split", "test", "--preset", "page-1536", "--out", str(folder / "pages")]
        subprocess.run([sys.executable, "-m", "train.synth", *options], check=True, stdout=subprocess.DEVNULL)
        files = sorted((folder / "pages" / "images").iterdir())
        self._pages = [f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" for file in files]
        self._bundle, self._next = bundle, 0

    def new_pages(self, count: int) -> list[str]:
        """Never asked about before."""
        found = self._pages[self._next : self._next + count]
        self._next += count
        return found

    async def seen(self, server: Server) -> list[dict]:
        async with server.client() as client:
            model = (await client.models.list()).data[0].id
            pages = self.new_pages(CROWD)
            for page in pages:
                await ask(client, model, page, QUESTIONS[0], 1)
            begin = time.perf_counter()
            for page in pages:
                await ask(client, model, page, QUESTIONS[1], TOKENS)
            one_by_one = time.perf_counter() - begin
            begin = time.perf_counter()
            crowd = await asyncio.gather(*(ask(client, model, page, QUESTIONS[2], TOKENS) for page in pages))
            at_once = time.perf_counter() - begin
        tokens = sum(answered.tokens for answered in crowd)
        row = {"work": "seen", "what": f"{CROWD} conversations at once, images seen", "metric": "tokens/s"}
        return [row | {"against": ONE_BY_ONE} | compared(tokens / at_once, tokens / one_by_one, higher=True)]

    async def schema(self, server: Server) -> list[dict]:
        async with server.client() as client:
            model = (await client.models.list()).data[0].id
            (page,) = self.new_pages(1)
            rates: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(ROUNDS + 1):
                for followed, taken in rates.items():
                    answered = await ask(client, model, page, QUESTIONS[3], TOKENS, SCHEMA if followed else None)
                    taken.append((answered.tokens - 1) / (answered.pieces[-1] - answered.pieces[0]))
        row = {"work": "schema", "what": "an answer that follows a JSON schema", "metric": "tokens/s"}
        medians = [statistics.median(taken[1:]) for taken in rates.values()]  # the first ones warm up
        return [row | {"against": "none"} | compared(*medians, higher=True)]

    async def new(self, server: Server) -> list[dict]:
        async with server.client() as client:
            model = (await client.models.list()).data[0].id
            begin = time.perf_counter()
            lone = [await ask(client, model, page, QUESTIONS[0], SHORT) for page in self.new_pages(CROWD)]
            one_by_one = time.perf_counter() - begin
            begin = time.perf_counter()
            crowd = await asyncio.gather(
                *(ask(client, model, page, QUESTIONS[0], SHORT) for page in self.new_pages(CROWD))
            )
            at_once = time.perf_counter() - begin
            first = min(answered.first for answered in crowd)
            alone = statistics.median(answered.first for answered in lone)
            running = asyncio.create_task(ask(client, model, self.new_pages(1)[0], QUESTIONS[0], TOKENS, every=True))
            await asyncio.sleep(alone * 1.2)
            await ask(client, model, self.new_pages(1)[0], QUESTIONS[0], 1)
            gap = max((await running).gaps)
        total = {"work": "new", "what": f"{CROWD} new pages at once, in all", "metric": "s", "against": ONE_BY_ONE}
        begun = {
            "work": "new",
            "what": "until the first of their answers begins",
            "metric": "s",
            "against": "a lone one",
        }
        paused = {"work": "gap", "what": "longest pause of an answer while a page comes in", "metric": "ms"}
        return [
            total | compared(at_once, one_by_one),
            begun | compared(first, alone),
            paused | {"ours": round(1000 * gap), "against": "", "theirs": "", "ratio": ""},
        ]

    async def sweep(self, server: Server, batch: int, rates: list[float], seconds: float) -> list[dict]:
        rows = []
        async with server.client() as client:
            model = (await client.models.list()).data[0].id
            pages = self.new_pages(CROWD)
            for page in pages:
                await ask(client, model, page, QUESTIONS[0], 1)
            for rate in rates:
                dice, tasks, begin = random.Random(0), [], time.perf_counter()
                due = dice.expovariate(rate)
                while due < seconds:
                    await asyncio.sleep(max(begin + due - time.perf_counter(), 0))
                    page, question = dice.choice(pages), dice.choice(QUESTIONS)
                    tasks.append(asyncio.create_task(ask(client, model, page, question, SHORT)))
                    due += dice.expovariate(rate)
                answers = await asyncio.gather(*tasks)
                spent = time.perf_counter() - begin
                firsts = [answered.first for answered in answers]
                gaps = [gap for answered in answers for gap in answered.gaps]
                row = {"work": "sweep", "batch": batch, "rate": rate, "requests": len(answers)}
                row |= {"tokens_per_s": round(sum(answered.tokens for answered in answers) / spent, 1)}
                row |= {f"first_p{p}_ms": round(1000 * percentile(firsts, p)) for p in (50, 99)}
                row |= {f"gap_p{p}_ms": round(1000 * percentile(gaps, p), 1) for p in (50, 99)}
                rows.append(row)
                print(row, flush=True)
        return rows


def compared(ours: float, theirs: float, higher: bool = False) -> dict:
    """Together, one by one, and how many times as good together is."""
    ratio = ours / theirs if higher else theirs / ours
    return {"ours": round(ours, 2), "theirs": round(theirs, 2), "ratio": round(ratio, 2)}


def percentile(values: list[float], percent: int) -> float:
    """The least value that so many percent are not above."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * percent // 100) - 1, 0)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="default: the demo model's")
    parser.add_argument("--rates", nargs="*", type=float, default=[0.1, 0.2, 0.4, 0.8], metavar="R", help="a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="that requests come in, at each rate")
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/serve.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        load = Load(args.bundle, Path(folder), 5 * CROWD + 3)
        rows = []
        for batch in (CROWD, 1):
            server = Server(args.bundle, batch)
            try:
                if batch > 1:
                    for scene in (load.seen, load.schema, load.new):
                        rows += asyncio.run(scene(server))
                        print(*rows[-3:], sep="\n", flush=True)
                rows += asyncio.run(load.sweep(server, batch, args.rates, args.seconds))
            finally:
                server.close()
    record.write("serve", rows, args.json)


if __name__ == "__main__":
    main()
