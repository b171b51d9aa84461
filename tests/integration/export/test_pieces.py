"""A graph that is cut and run piece by piece computes what it does as a whole."""

import numpy as np
import onnx
import onnxruntime
import pytest

from export import encoder as encoder_export
from export.encoder import export_encoder
from export.graphs.pieces import cut, open_piece, run_piece
from tests.integration.export.test_encoder import tiny

BORDERS = ["encoder.stem", "encoder.stages.2.downsample", "encoder", "image_embeds"]


@pytest.mark.parametrize("inline_bytes", [0, 10**9])
def test_pieces_compute_what_the_whole_does(tmp_path, monkeypatch, inline_bytes):
    monkeypatch.setattr(encoder_export, "INLINE_BYTES", inline_bytes)
    file = tmp_path / "fp32.onnx"
    export_encoder(tiny(), file, "fp32")
    pieces = cut(onnx.load(file, load_external_data=False), BORDERS)
    value = pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 128), dtype=np.float32)
    for piece in pieces:
        value = run_piece(open_piece(piece, tmp_path), value)
    (whole,) = onnxruntime.InferenceSession(file).run(None, {"pixel_values": pixels})
    np.testing.assert_allclose(value, whole, rtol=1e-4, atol=1e-6)
    assert sum(len(piece.graph.node) for piece in pieces) == len(onnx.load(file).graph.node)
    weights = [tensor.name for piece in pieces for tensor in piece.graph.initializer]
    assert sorted(weights) == sorted(tensor.name for tensor in onnx.load(file).graph.initializer)


def test_a_border_inside_a_residual_block_is_refused(tmp_path):
    export_encoder(tiny(), tmp_path / "fp32.onnx", "fp32")
    model = onnx.load(tmp_path / "fp32.onnx")
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(model, ["encoder.stages.1.blocks.0.conv_dw", "image_embeds"])
    with pytest.raises(ValueError, match="cannot be cut"):
        cut(model, ["encoder.stages.1.blocks.0", "encoder.stem", "image_embeds"])
