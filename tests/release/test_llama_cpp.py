"""llama.cpp, an independent implementation, finds the same token IDs in our GGUF files, and makes its formats."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.llama_gguf import write_gguf
from benchmarks.peers.products import GGUF_FORMATS, gguf_files
from benchmarks.peers.turns import interpreter, not_installed, start_peer
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.bundle.manifest import open_bundle
from train.model import Checkpoint

pytestmark = pytest.mark.skipif(bool(not_installed("llama.cpp")), reason=f"no {interpreter('llama.cpp')}: `make peers`")
PEER, STEPS = "llama.cpp-q4_0", 12


def spec(file: Path) -> dict:
    ids = np.random.default_rng(0).integers(3, 400, 64).tolist()
    return {"threads": 1, "capacity": 64, "hidden": 128, "ids": ids, "folders": {PEER: str(file)}}


def test_greedy_ids_are_the_runtime_s(conformance: Path, conformance_bundle: Path, tmp_path: Path):
    """The conformance checkpoint is in float16, and so is its GGUF."""
    write_gguf(Checkpoint.open(conformance / "checkpoint"), tmp_path / "model.gguf")
    given = spec(tmp_path / "model.gguf")
    worker = start_peer("decoders", PEER, given)
    found = worker.ask("decode", context=20, steps=STEPS)["ids"]
    worker.close()
    bundle = open_bundle(conformance_bundle)
    sequence = OnnxDecoder(bundle.path(bundle.decoder.file), bundle.decoder).start(64)
    token, expected = sequence.forward_greedy(given["ids"][:20]), []
    for _ in range(STEPS):
        token = sequence.forward_greedy([token])
        expected.append(token)
    assert found == expected


def test_llama_cpp_makes_and_opens_each_format(conformance: Path, tmp_path: Path):
    sizes = {}
    for form, (file, cost) in gguf_files(conformance / "checkpoint", tmp_path, GGUF_FORMATS).items():
        worker = start_peer("decoders", PEER, spec(file))
        assert worker.ask("prefill", tokens=16)["seconds"] > 0
        worker.close()
        assert cost.seconds > 0 and cost.own_mib > 0
        sizes[form] = file.stat().st_size
    assert sizes["q4_0"] < sizes["q4_1"] < sizes["q4_k"]
