"""FP16 graphs against float32: what overflows stays in FP32, and nothing else does."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from export.encoder import export_encoder
from export.graphs.mixed_precision import LIMIT, cast_embeds, nodes_to_keep, to_half
from tests.integration.export.test_encoder import tiny

CHANNELS = 8


def graph_of(nodes, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A graph x [n, CHANNELS] -> y."""
    shape = ["n", CHANNELS]
    graph = helper.make_graph(
        [
            helper.make_node(op, inputs, [out], name=f"{op}/{out}", **attributes)
            for op, inputs, out, attributes in nodes
        ],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, **feeds) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)[0]


def relative_error(found, expected) -> float:
    return np.linalg.norm(found.astype(np.float64) - expected) / np.linalg.norm(expected)


def types(model: onnx.ModelProto) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in model.graph.initializer}


x = np.random.default_rng(0).standard_normal((5, CHANNELS)).astype(np.float32)
eye = np.eye(CHANNELS)
square = np.random.default_rng(1).standard_normal((CHANNELS, CHANNELS)) / 3
# name -> (nodes, weights, the operators that must stay in FP32). Of a product with a matrix the matrix is FP16 all the
# same, its input being scaled instead, unless the matrix itself is too small for FP16 ("small").
OVERFLOWS = {
    "nothing": ([("MatMul", ["x", "w"], "a", {}), ("Gelu", ["a"], "y", {})], {"w": square}, []),
    "residual stream": (
        [("MatMul", ["x", "big"], "a", {}), ("Add", ["a", "x"], "b", {}), ("MatMul", ["b", "small"], "y", {})],
        {"big": square * 60000, "small": square / 60000 * 3},
        ["MatMul", "Add", "MatMul"],
    ),
    "sum of squares in LayerNorm": (
        [
            ("MatMul", ["x", "w"], "a", {}),
            ("LayerNormalization", ["a", "g"], "b", {"axis": -1}),
            ("MatMul", ["b", "w2"], "y", {}),
        ],
        {"w": square * 300, "g": np.ones(CHANNELS), "w2": square},
        ["LayerNormalization"],
    ),
    "cube inside a tanh Gelu": (
        [
            ("MatMul", ["x", "w"], "a", {}),
            ("Gelu", ["a"], "b", {"approximate": "tanh"}),
            ("MatMul", ["b", "w2"], "y", {}),
        ],
        {"w": square * 60, "w2": square},
        ["Gelu"],
    ),
    "tails of a Gelu that is exact": (
        [("MatMul", ["x", "w"], "a", {}), ("Gelu", ["a"], "b", {}), ("MatMul", ["b", "w2"], "y", {})],
        {"w": square * 60, "w2": square},
        [],
    ),
    "subnormal weights": (
        [("Mul", ["x", "scale"], "a", {}), ("MatMul", ["a", "w"], "y", {})],
        {"scale": np.full(CHANNELS, 3e-8), "w": square},
        ["Mul"],
    ),
}


@pytest.mark.parametrize("case", OVERFLOWS)
def test_what_overflows_stays_in_fp32_and_nothing_else(case):
    nodes, weights, expected = OVERFLOWS[case]
    model = graph_of(nodes, weights)
    kept = nodes_to_keep(model, [{"x": x}])
    assert [keep.operator for keep in kept] == expected
    assert all(keep.value > LIMIT for keep in kept if "error" not in keep.reason)
    half = to_half(model, kept)
    found = run(half, x=x.astype(np.float16))
    assert found.dtype == np.float16
    assert np.isfinite(found).all()
    if case != "subnormal weights":  # whose output FP16 cannot hold
        assert relative_error(found, run(model, x=x)) < 3e-3
    in_fp32 = {name for name, kind in types(half).items() if kind == TensorProto.FLOAT and name in weights}
    in_fp32_too = {"residual stream": {"small"}, "subnormal weights": {"scale"}, "sum of squares in LayerNorm": {"g"}}
    assert in_fp32 == in_fp32_too.get(case, set())


def test_the_reason_and_the_value_are_told():
    nodes, weights, _ = OVERFLOWS["sum of squares in LayerNorm"]
    model = graph_of(nodes, weights)
    (keep,) = nodes_to_keep(model, [{"x": x}])
    a = x.astype(np.float64) @ weights["w"]
    expected = ((a - a.mean(-1, keepdims=True)) ** 2).sum(-1).max()
    assert keep.node == "LayerNormalization/b"
    assert keep.reason == "sum of squares"
    assert keep.value == pytest.approx(expected, rel=1e-4)


def test_the_largest_of_all_inputs_counts():
    nodes, weights, _ = OVERFLOWS["sum of squares in LayerNorm"]
    model = graph_of(nodes, {**weights, "w": square})
    assert nodes_to_keep(model, [{"x": x}]) == []
    assert len(nodes_to_keep(model, [{"x": x}, {"x": x * 1000}, {"x": x}])) == 1


def test_a_graph_that_is_not_finite_is_named():
    model = graph_of([("MatMul", ["x", "w"], "a", {}), ("Log", ["a"], "y", {})], {"w": square})
    with pytest.raises(ValueError, match="y is not finite"):
        nodes_to_keep(model, [{"x": x}])


def test_the_original_is_left_as_it_was():
    model = graph_of(*OVERFLOWS["residual stream"][:2])
    before = model.SerializeToString()
    to_half(model, nodes_to_keep(model, [{"x": x}]))
    assert model.SerializeToString() == before


def test_a_quantised_graph_is_fp16_between_its_q_and_dq_nodes():
    weights = np.random.default_rng(2).integers(-127, 128, (CHANNELS, CHANNELS)).astype(np.int8)
    model = graph_of(
        [
            ("QuantizeLinear", ["x", "s", "z"], "q", {}),
            ("DequantizeLinear", ["q", "s", "z"], "d", {}),
            ("DequantizeLinear", ["w", "ws", "z"], "wd", {}),
            ("MatMul", ["d", "wd"], "a", {}),
            ("Gelu", ["a"], "y", {}),
        ],
        {"s": 0.02, "ws": 0.01},
    )
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.int8(0), "z"))
    half = to_half(model, [])
    assert types(half) == {"s": 10, "ws": 10, "w": TensorProto.INT8, "z": TensorProto.INT8}
    assert "Cast" not in {node.op_type for node in half.graph.node}
    # ONNX's own evaluator: ONNX Runtime would fuse the nodes into integer arithmetic
    reference = ReferenceEvaluator(half).run(None, {"x": x.astype(np.float16)})[0]
    assert reference.dtype == np.float16
    assert relative_error(reference, run(model, x=x)) < 2e-2


@pytest.mark.parametrize(("dtype", "element"), [("float32", 1), ("float16", 10)])
def test_embeds_come_in_the_type_that_is_asked_for(tmp_path, dtype, element):
    export_encoder(tiny(), tmp_path / "fp32.onnx", "fp32")
    model = onnx.load(tmp_path / "fp32.onnx")
    pixels = np.random.default_rng(0).standard_normal((1, 3, 128, 64), dtype=np.float32)
    half = to_half(model, [])
    cast_embeds(half, dtype)
    onnx.checker.check_model(half)
    assert half.graph.output[0].type.tensor_type.elem_type == element
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    found = run(half, pixel_values=pixels.astype(np.float16))
    assert found.dtype == dtype
    assert relative_error(found, run(model, pixel_values=pixels)) < 3e-3


def test_embeds_go_in_in_the_type_that_is_asked_for():
    nodes = [("MatMul", ["image_embeds", "w"], "y", {})]
    model = graph_of(nodes, {"w": square})
    model.graph.input[0].name = "image_embeds"
    half = to_half(model, [])
    cast_embeds(half, "float32")
    assert relative_error(run(half, image_embeds=x), run(model, image_embeds=x)) < 3e-3
