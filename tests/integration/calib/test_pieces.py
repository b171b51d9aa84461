"""Graphs in pieces against the whole graph, with weights in the graph and beside it."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib.activations import CUT_AFTER, activations_of
from calib.pieces import Pieces, mapped_values
from export.encoder import export_encoder
from runtime.errors import UserError
from tests.integration.export.test_encoder import tiny


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """An encoder whose weights lie beside it, through a symbolic link as in the Hub's cache."""
    folder = tmp_path_factory.mktemp("beside")
    export_encoder(tiny(), folder / "inline.onnx", "fp32")
    model = onnx.load(folder / "inline.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    (folder / "model.data").rename(folder / "blob")
    (folder / "model.data").symlink_to("blob")
    return folder / "model.onnx"


def test_every_tensor_is_that_of_the_whole_graph(beside):
    model = onnx.load(beside.with_name("inline.onnx"))
    names = ["pixel_values", *activations_of(model.graph)[1:], "image_embeds"]
    inner = names[1:-1]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    pieces = Pieces(beside, names, CUT_AFTER)
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    assert len(pieces.pieces) == convolutions + 1
    for shape in ((1, 3, 64, 128), (1, 3, 128, 64)):
        pixels = np.random.default_rng(0).standard_normal(shape, np.float32)
        found = {}
        for values in pieces({"pixel_values": pixels}):
            assert not found.keys() & values.keys()
            found |= values
        assert set(found) == set(names)
        for name, expected in zip(names[1:], session.run(names[1:], {"pixel_values": pixels}), strict=True):
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)


def graph_in(element: int, file, constant: float = 0.5) -> None:
    """x + a constant node, halved; its square root; times a matrix; a branch that nothing takes."""
    kind = helper.tensor_dtype_to_np_dtype(element)
    matrix = np.random.default_rng(1).standard_normal((4, 4)).astype(kind)
    nodes = [
        helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(np.array(constant, kind))),
        helper.make_node("Mul", ["x", "half"], ["halved"]),
        helper.make_node("Sqrt", ["halved"], ["root"]),
        helper.make_node("Cast", ["count"], ["number"], to=element),
        helper.make_node("Mul", ["root", "number"], ["scaled"]),
        helper.make_node("Exp", ["scaled"], ["unused"]),
        helper.make_node("MatMul", ["scaled", "matrix"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", element, ["n", 4]), helper.make_tensor_value_info("count", 7, [])],
        [helper.make_tensor_value_info("y", element, ["n", 4]), helper.make_tensor_value_info("unused", element, None)],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)


def test_a_float16_graph_is_computed_in_float32(tmp_path):
    graph_in(TensorProto.FLOAT16, tmp_path / "half.onnx")
    x = np.random.default_rng(0).uniform(1, 2, (3, 4)).astype(np.float32)
    pieces = Pieces(tmp_path / "half.onnx", ["y"], "Sqrt", float32=True)
    assert [[node.op_type for node in piece.nodes] for piece in pieces.pieces] == [
        ["Mul", "Sqrt"],
        ["Cast", "Mul", "MatMul"],
    ], "without what nothing asked for depends on"
    *_, found = pieces({"x": x, "count": np.array(3)})
    matrix = numpy_helper.to_array(onnx.load(tmp_path / "half.onnx").graph.initializer[0]).astype(np.float64)
    assert found["y"].dtype == np.float32
    np.testing.assert_allclose(found["y"], 3 * np.sqrt(x.astype(np.float64) / 2) @ matrix, rtol=1e-5)


def test_weights_that_are_cut_off_are_named(beside, tmp_path):
    (tmp_path / "model.onnx").write_bytes(beside.read_bytes())
    (tmp_path / "model.data").write_bytes(beside.with_name("blob").read_bytes()[:100])
    tensors = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    tensor = max(tensors, key=lambda tensor: np.prod(tensor.dims))
    with pytest.raises(UserError, match=f"weights of '{tensor.name}' cannot be read from"):
        mapped_values(tensor, tmp_path / "model.onnx")
