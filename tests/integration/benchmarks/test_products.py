"""What is made once for several runs, and what it cost: on commands that are not run."""

from pathlib import Path

import pytest

from benchmarks.memory import Memory, Ran
from benchmarks.peers.products import GGUF_FORMATS, Cost, ProductError, gguf_files, make

MIB = 2**20


class Commands:
    """Writes the last path among a command's arguments."""

    def __init__(self, status: int = 0):
        self.status, self.ran = status, []

    def __call__(self, command, cwd) -> Ran:
        paths = [argument for argument in command if isinstance(argument, Path) and not argument.exists()]
        self.ran.append([argument.name for argument in paths])
        if not self.status:
            paths[-1].write_text("made")
        return Ran(self.status, 10.0, Memory(own=len(self.ran) * MIB, mapped=5 * MIB), "first\nwhat went wrong\n")


def test_a_product_is_made_once_and_its_cost_kept(tmp_path: Path):
    run, path = Commands(), tmp_path / "models" / "one"
    costs = [make(path, lambda made: ["write", made], Cost(5.0, 9, 1), run) for _ in range(2)]
    assert costs == [Cost(15.0, 9, 5)] * 2
    assert run.ran == [["one"]]
    assert path.read_text() == "made"


def test_a_failure_leaves_nothing_and_says_why(tmp_path: Path):
    with pytest.raises(ProductError, match="what went wrong"):
        make(tmp_path / "one", lambda made: ["write", made], run=Commands(status=3))
    assert not list(tmp_path.iterdir())


def test_gguf_files_share_the_one_in_float16(tmp_path: Path):
    run = Commands()
    for _ in range(2):
        found = gguf_files(tmp_path / "checkpoint", tmp_path / "gguf", GGUF_FORMATS, run)
    assert [names[-1] for names in run.ran] == ["f16.gguf", "q4_0.gguf", "q4_1.gguf", "q4_k.gguf"]
    assert {form: cost.seconds for form, (_, cost) in found.items()} == dict.fromkeys(GGUF_FORMATS, 20.0)
    assert all(file.is_file() for file, _ in found.values())
    assert not list((tmp_path / "gguf").rglob("f16.gguf"))
