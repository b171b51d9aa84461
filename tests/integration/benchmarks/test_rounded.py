"""A bundle whose decoder is rounded to 4.25 bits straight from the checkpoint is what calib makes of a float32 one."""

import sys
from pathlib import Path

from benchmarks.released import rounded
from calib.decoder import quantize_decoder
from export.decoder.export import export_decoder
from runtime.backends.select import open_decoder
from runtime.bundle.manifest import open_bundle
from tests.support.bundles import exported
from train.model import Checkpoint


def test_weights_are_those_that_calib_rounds(conformance: Path, tmp_path: Path, monkeypatch):
    like = exported("--decoder-precision", "int4")
    arguments = [str(conformance / "checkpoint"), str(like), str(tmp_path / "bundle")]
    monkeypatch.setattr(sys, "argv", ["rounded", *arguments])
    rounded.main()
    source = export_decoder(Checkpoint.open(conformance / "checkpoint"), tmp_path / "fp32", "fp32")
    quantize_decoder(source, tmp_path / "model.onnx", "int4", "rtn")
    bundle = open_bundle(tmp_path / "bundle")
    file = bundle.path(bundle.decoder.file)
    assert Path(f"{file}.data").read_bytes() == Path(f"{tmp_path / 'model.onnx'}.data").read_bytes()
    assert Path(f"{file}.data").read_bytes() != (like / "decoder" / "model.onnx.data").read_bytes()
    assert set(bundle.files) == set(open_bundle(like).files)
    open_decoder(bundle).start(8).forward_greedy([1, 5, 9])
