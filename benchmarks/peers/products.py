"""What libraries make of a checkpoint for themselves, kept from one run to the next with what it cost to make."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.memory import Ran, run_measured
from benchmarks.peers.turns import ROOT, interpreter

# what a peer's name ends with -> llama.cpp's name of the file type
GGUF_FORMATS = {
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q4_1": "LLAMA_FTYPE_MOSTLY_Q4_1",
    "q4_k": "LLAMA_FTYPE_MOSTLY_Q4_K_M",
}
COST = ".cost.json"  # beside a product, after its name

Run = Callable[..., Ran]
Command = Sequence[str | Path]


@dataclass(frozen=True)
class Cost:
    """Seconds, and peak memory as `benchmarks.memory` counts it."""

    seconds: float = 0.0
    own_mib: int = 0
    mapped_mib: int = 0

    def then(self, other: "Cost") -> "Cost":
        """Of both, one after the other."""
        own, mapped = max(self.own_mib, other.own_mib), max(self.mapped_mib, other.mapped_mib)
        return Cost(round(self.seconds + other.seconds, 1), own, mapped)


class ProductError(Exception):
    """A command that should have made something failed; says its last words."""

    exit_code = 1


def make(path: Path, command: Callable[[Path], Command], before: Cost | None = None, run: Run = run_measured) -> Cost:
    """What it cost to make `path`, made now where it is not there.

    Args:
        command: takes where to write, which is moved to `path` once it is whole.
        before: the cost of what the command needs, which becomes part of it.

    Raises:
        ProductError: the command failed.
    """
    cost_file = path.with_name(path.name + COST)
    if path.exists() and cost_file.is_file():
        return Cost(**json.loads(cost_file.read_text()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        cost = (before or Cost()).then(spent(command(made), run))
        made.rename(path)
    cost_file.write_text(json.dumps(asdict(cost)))
    return cost


def spent(command: Command, run: Run = run_measured) -> Cost:
    """Run a command. Raises ProductError where it fails."""
    ran = run(command, cwd=ROOT)
    if ran.status:
        last = " ".join(line.strip() for line in ran.output.splitlines()[-3:])
        raise ProductError(last[-300:] or f"{command[0]} ended with {ran.status}")
    return Cost(round(ran.seconds, 1), ran.peak.own // 2**20, ran.peak.mapped // 2**20)


def gguf_files(
    checkpoint: Path, folder: Path, forms: Iterable[str], run: Run = run_measured
) -> dict[str, tuple[Path, Cost]]:
    """GGUF files of the checkpoint's language model in `folder`, by format, with their costs.

    The one in float16 that llama.cpp makes them of is removed again; its cost is part of each.

    Raises:
        ProductError: a command failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {form: folder / f"{form}.gguf" for form in forms}
    with TemporaryDirectory(dir=folder) as scratch:
        source = Path(scratch, "f16.gguf")
        write = [sys.executable, "-m", "benchmarks.peers.llama_gguf", checkpoint, source]
        whole = all(file.exists() for file in files.values())
        before = None if whole else spent(write, run)

        def quantize(form: str) -> Callable[[Path], Command]:
            script = [interpreter("llama.cpp"), "-m", "benchmarks.peers.llama_quantize"]
            return lambda target: [*script, source, target, GGUF_FORMATS[form]]

        return {form: (file, make(file, quantize(form), before, run)) for form, file in files.items()}
