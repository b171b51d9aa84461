"""optimum-onnx's export of the same decoder, an independent one, gives the logits that ours gives."""

import argparse

import numpy as np
import pytest

from benchmarks import decode
from benchmarks.engine_decoders import OptimumSequence, export_optimum
from benchmarks.peers import turns
from export.decoder.export import decoder_part, export_decoder
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_portable import PortableSequence
from train.model import Checkpoint

pytestmark = pytest.mark.skipif(
    bool(turns._lacks("optimum")), reason=f"no {turns.ENVIRONMENTS / 'optimum'}: `make peers` makes it"
)
CALLS = (([5, -1, -2, 9, 3], 2), ([7], 0), ([8, 4], 0))  # ids, and rows of the image embeddings among them


@pytest.fixture(scope="module")
def checkpoint(conformance) -> Checkpoint:
    return Checkpoint.open(str(conformance / "checkpoint"))


@pytest.mark.parametrize("graph", ["fused", "portable"])
def test_logits_agree(checkpoint, tmp_path, graph):
    part = decoder_part(checkpoint, "fp32", "")
    file = export_decoder(checkpoint, tmp_path / "ours", "fp32", graph)
    ours = OnnxDecoder(file, part).start(64) if graph == "fused" else PortableSequence(file)
    (tmp_path / "optimum").mkdir()
    theirs = OptimumSequence(export_optimum(checkpoint, tmp_path / "optimum"), part)
    images = np.random.default_rng(0).standard_normal((2, checkpoint.llama_config.hidden_size), dtype=np.float32)
    for ids, rows in CALLS:
        embeds = images if rows else None
        expected = theirs.forward(ids, embeds)
        assert np.abs(ours.forward(ids, embeds) - expected).max() < 1e-4 * np.abs(expected).max()


def test_optimums_own_loop_decodes_the_same_ids(checkpoint, conformance_bundle, tmp_path):
    """As the decode benchmark runs it: a worker in optimum's environment."""
    parser, known = argparse.ArgumentParser(), argparse.Namespace(checkpoint=None)
    assert turns.installed(parser, known, ["optimum"]) == ["optimum"]
    spec = {
        "bundle": str(conformance_bundle),
        "threads": 1,
        "capacity": 64,
        "products": "auto",
        "ids": np.random.default_rng(0).integers(3, 400, 64).tolist(),
        "hidden": checkpoint.llama_config.hidden_size,
        "folders": decode.folders(checkpoint, tmp_path, ["optimum"]),
    }
    workers = [turns.start_peer("decoders", name, spec) for name in ("ours", "optimum")]
    for context in (20, 30, 20):
        ours, theirs = (worker.ask("decode", context=context, steps=12)["ids"] for worker in workers)
        assert ours == theirs
    for worker in workers:
        worker.close()
