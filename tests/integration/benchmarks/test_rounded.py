"""A bundle whose decoder is rounded to 4.25 bits straight from the checkpoint is what a float32 graph is rounded to."""

import sys
from pathlib import Path

from benchmarks.released import rounded
from export.decoder.export import export_decoder
from export.graphs.load import open_graph
from export.graphs.matmul_nbits import quantize_weights
from runtime.backends.select import open_decoder
from runtime.bundle.manifest import open_bundle
from tests.support.bundles import exported
from train.model import Checkpoint


def test_weights_are_those_of_the_float32_graph_rounded(conformance: Path, tmp_path: Path, monkeypatch):
    like = exported("--decoder-precision", "int4")
    arguments = [str(conformance / "checkpoint"), str(like), str(tmp_path / "bundle")]
    monkeypatch.setattr(sys, "argv", ["rounded", *arguments])
    rounded.main()
    source = export_decoder(Checkpoint.open(conformance / "checkpoint"), tmp_path / "fp32", "fp32")
    quantize_weights(*open_graph(source), tmp_path / "model.onnx", 4, "rtn", head_bits=4)
    bundle = open_bundle(tmp_path / "bundle")
    file = bundle.path(bundle.decoder.file)
    assert Path(f"{file}.data").read_bytes() == Path(f"{tmp_path / 'model.onnx'}.data").read_bytes()
    assert Path(f"{file}.data").read_bytes() != (like / "decoder" / "model.onnx.data").read_bytes()
    assert set(bundle.files) == set(open_bundle(like).files)
    open_decoder(bundle).start(8).forward_greedy([1, 5, 9])
