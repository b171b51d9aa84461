"""What a decoder's step reads: matrices whole, of tables and angles a row."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.limits import DecoderFiles, step_bytes
from runtime.bundle.manifest import open_bundle
from tests.support.bundles import exported


def test_tables_are_not_read_whole(tmp_path: Path):
    weights = {
        "table": np.zeros((100, 8), np.float32),
        "matrix": np.zeros((8, 8), np.float16),
        "codes": np.zeros((8, 2, 16), np.uint8),
        "angles": np.zeros((50, 4), np.float32),
        "unused": np.zeros(1000, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "matrix"], ["y"]),
        helper.make_node("BlockMatMul", ["y", "codes"], ["z"], domain="convllava"),
        helper.make_node("GroupQueryAttention", ["z", "angles"], ["out"], domain="com.microsoft"),
    ]
    given = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    taken = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "step", [given], [taken], tensors)
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert step_bytes(tmp_path / "model.onnx") == 8 * 8 * 2 + 8 * 2 * 16


def test_the_kernels_graph_counts_where_a_bundle_has_one():
    bundle = open_bundle(exported("--decoder-precision", "int4"))
    part = DecoderFiles.of(bundle)
    assert part.precision == "int4"
    kernels, plain = (step_bytes(bundle.path(file)) for file in (bundle.decoder.kernels_file, bundle.decoder.file))
    assert part.size == kernels < plain, "the kernels' scales are smaller than float32"
