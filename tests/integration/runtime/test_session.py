"""Sessions on the CPU: INT8 sums are whole on every processor."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.backends.ort_session import open_session
from runtime.device.cpuinfo import int8_sums_saturate


@pytest.mark.parametrize(
    ("operator", "shape", "weights"),
    [("MatMul", (1, 6, 64), (64, 8)), ("Conv", (1, 64, 3, 2), (8, 64, 1, 1)), ("Conv", (1, 16, 4, 4), (8, 16, 2, 2))],
)
def test_sums_of_the_largest_products(tmp_path, operator, shape, weights):
    """Each pair of products is 2 x 127 x 127, twice what 16 bits hold once activations are moved to 0..255. With VNNI
    they come out right in any case; without it the product of matrices does not, unless the session is told to."""
    values = {"scale": np.float32(1.0), "zero": np.int8(0), "weight": np.full(weights, 127, np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w"]),
        helper.make_node(operator, ["rounded", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in values.items()],
    )
    file = tmp_path / "sums.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    (found,) = open_session(file, 1).run(None, {"x": np.full(shape, 127, np.float32)})
    assert (found == 127 * 127 * 64).all()


@pytest.mark.parametrize(
    ("machine", "flags", "saturate"),
    [
        ("x86_64", "fpu avx avx2 bmi2", True),
        ("x86_64", "avx2 avx512f avx512_vnni", False),
        ("x86_64", "avx2 avx_vnni", False),
        ("aarch64", "asimd", False),
    ],
)
def test_which_processors_saturate(tmp_path, monkeypatch, machine, flags, saturate):
    monkeypatch.setattr("platform.machine", lambda: machine)
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name\t: avx_vnni edition\nflags\t\t: {flags}\n")
    assert int8_sums_saturate(file) == saturate
    assert int8_sums_saturate(tmp_path / "none") == (machine == "x86_64")
