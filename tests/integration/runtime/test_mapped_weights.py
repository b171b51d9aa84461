"""Large encoders: weights stay where the system maps them, activations are given back."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from runtime.backends.ort_encoder import OnnxEncoder
from runtime.backends.ort_session import open_session, run_options
from runtime.bundle.manifest import open_bundle
from runtime.device.memory import Cpu

WIDTH = 4096  # a matrix of 64 MiB
MIB = 1 << 20
FLOAT = onnx.TensorProto.FLOAT


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """The sums of the rows of x @ w, w in a file beside the graph."""
    file = tmp_path_factory.mktemp("graph") / "graph.onnx"
    weights = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), dtype=np.float32)
    x, y = (helper.make_tensor_value_info(*end) for end in (("x", FLOAT, ["n", WIDTH]), ("y", FLOAT, ["n", 1])))
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["rows"]),
        helper.make_node("ReduceSum", ["rows", "axis"], ["y"]),
    ]
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.array([1]), "axis")]
    graph = helper.make_graph(nodes, "graph", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(file), save_as_external_data=True, location=f"{file.name}.data")
    return file


@pytest.mark.parametrize(("mapped", "copies"), [(True, 0), (False, 1)])
def test_memory_of_weights(graph, mapped, copies):
    before = anonymous_bytes()
    session = open_session(graph, 2, mapped=mapped)
    taken = anonymous_bytes() - before
    assert taken == pytest.approx(copies * 64 * MIB, abs=16 * MIB)
    x = np.random.default_rng(1).standard_normal((3, WIDTH), dtype=np.float32)
    (y,) = session.run(None, {"x": x})
    weights = np.fromfile(f"{graph}.data", np.float32, WIDTH**2).reshape(WIDTH, WIDTH).astype(np.float64)
    assert np.allclose(y, (x @ weights).sum(axis=1, keepdims=True), atol=0.1)


def test_memory_of_activations_is_given_back(graph):
    session = open_session(graph, 2, lean=True)
    x = np.ones((4096, WIDTH), np.float32)  # of which 64 MiB come
    before = anonymous_bytes()
    for _ in range(3):
        session.run(None, {"x": x}, run_options(Cpu(), shrink=True))
    assert anonymous_bytes() - before < 16 * MIB


def test_an_encoder_with_weights_beside_it_computes_the_same(conformance_bundle, tmp_path):
    bundle = open_bundle(conformance_bundle)
    inline, beside = bundle.path(bundle.encoder.file), tmp_path / "fp32.onnx"
    onnx.save(onnx.load(str(inline)), str(beside), save_as_external_data=True, location="fp32.onnx.data")
    image = np.random.default_rng(0).standard_normal((3, 256, 320), dtype=np.float32)
    expected, found = (
        np.asarray(OnnxEncoder(file, bundle.encoder.stride)([image, image])) for file in (inline, beside)
    )
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
