"""Weights in blocks: ONNX Runtime's own quantiser as the reference, GGUF's Q4_1 kept exactly, and what both compute."""

import gguf
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from calib.decoder import quantize_decoder
from export.graphs.block_formats import BLOCK, SymmetricGrid, nearest, step_multiples, with_offsets
from export.graphs.load import open_graph
from export.graphs.matmul_nbits import quantize_weights
from runtime.backends.ort_session import open_session
from runtime.errors import UserError


def decoder_of(body: np.ndarray, head: np.ndarray, file) -> None:
    """x -> body -> head -> logits, as much of a decoder as there is to round."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "body"], ["hidden"], name="body"),
            helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="head"),
        ],
        "g",
        [info("x", 1, [1, "s", body.shape[0]])],
        [info("logits", 1, [1, "s", head.shape[1]]), info("hidden", 1, [1, "s", body.shape[1]])],
        [numpy_helper.from_array(body, "body"), numpy_helper.from_array(head, "head")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)


@pytest.fixture
def matrix():
    """[K, N]; K is no multiple of the block."""
    return np.random.default_rng(0).standard_normal((80, 48)).astype(np.float32)


def onnx_runtimes(matrix: np.ndarray, bits: int, file) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales [N, blocks]) of ONNX Runtime's own quantizer."""
    decoder_of(matrix, matrix[:48], file)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, bits=bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(file), bits=bits, algo_config=config)
    quantizer.process()
    found = {t.name: numpy_helper.to_array(t) for t in quantizer.model.model.graph.initializer}
    return found[f"body_Q{bits}"], found["body_scales"].reshape(matrix.shape[1], -1)


def test_rounding_to_the_nearest_in_8_bits_is_onnx_runtimes(matrix, tmp_path):
    levels, scales = onnx_runtimes(matrix, 8, tmp_path / "plain.onnx")
    found = nearest(matrix, 8).tensors()
    np.testing.assert_allclose(found["scales"], scales, rtol=2.0**-11)
    np.testing.assert_array_equal(found["scales"], found["scales"].astype(np.float16))
    assert found["Q8"].shape == levels.shape
    np.testing.assert_array_equal(found["Q8"][:, :2], levels[:, :2])  # theirs has other padding in the last block


def symmetric_error(codes: np.ndarray, scales: np.ndarray, matrix: np.ndarray) -> float:
    """Of packed codes of 4 bits [N, blocks, 16] that stand for `matrix` [K, N]."""
    levels = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], BLOCK).astype(np.float64)
    restored = ((levels - 8) * scales[..., None]).reshape(len(levels), -1)[:, : len(matrix)]
    return float(np.square(restored - matrix.T).sum())


def test_rounding_in_4_bits_loses_less_than_onnx_runtimes(matrix, tmp_path):
    found = nearest(matrix, 4).tensors()
    ours = symmetric_error(found["Q4"], found["scales"], matrix)
    assert ours < 0.95 * symmetric_error(*onnx_runtimes(matrix, 4, tmp_path / "plain.onnx"), matrix)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-16, 1.0, 1e16])
def test_symmetric_steps_are_whole_multiples_of_one_unit_a_row(matrix, size):
    weights = matrix * np.float32(size)
    weights[:, 0] = 0
    weights[:BLOCK, 1] = 0
    grid = SymmetricGrid.of(weights)
    found = step_multiples(grid.steps)
    assert found is not None
    multiples, units = found
    assert multiples.any(-1).all() and np.abs(multiples).max() == 127
    np.testing.assert_array_equal(multiples * units[:, None], grid.steps)
    blocks = grid.nearest(weights)
    values = (np.arange(16) - 8.0) * grid.steps[..., None]  # [N, blocks, 16]
    padded = np.pad(weights, ((0, -len(weights) % BLOCK), (0, 0))).T.reshape(*grid.steps.shape, BLOCK)
    distance = np.abs(padded[..., None] - values[..., None, :])
    found = np.take_along_axis(distance, blocks.levels[..., None].astype(int), -1)[..., 0]
    assert (found <= distance.min(-1) + 1e-6 * np.abs(grid.steps)[..., None]).all()
    np.testing.assert_array_equal(grid.stored(blocks.levels).levels, blocks.levels)


def test_other_scales_are_no_multiples():
    random = np.random.default_rng(4)
    assert step_multiples(random.uniform(0.1, 1, (4, 3)).astype(np.float32)) is None
    assert step_multiples(np.full((4, 3), np.nan, np.float32)) is None


def test_q4_1_is_kept_exactly(matrix):
    """Weights that GGUF's reference implementation stored as Q4_1 come out of the blocks as they are."""
    stored = gguf.quants.quantize(matrix.T[:, :64].copy(), gguf.GGMLQuantizationType.Q4_1)
    weights = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q4_1).T  # [64, 48]
    blocks = with_offsets(weights)
    restored = (blocks.levels.astype(np.float64) - blocks.zeros[..., None]) * blocks.scales[..., None]
    restored = restored.reshape(len(restored), -1)  # [48, 64 and a block for the offsets]
    means = restored[:, 64 : 64 + 64 // BLOCK]
    rebuilt = restored[:, :64] + np.repeat(means / BLOCK, BLOCK, 1)
    step = blocks.scales[:, :2].repeat(BLOCK, 1)
    assert (np.abs(rebuilt - weights.T) <= 0.07 * step).all(), "hundredths of a step, where others err by half"
    assert not restored[:, 66:].any()


def test_blocks_far_from_zero_do_not_harm_the_others():
    """The first block of each row is constant; a step of the others is 1 / 15."""
    weights = np.random.default_rng(3).uniform(-0.5, 0.5, (BLOCK * 8, 16)).astype(np.float32)
    weights[:BLOCK] = 40.0
    blocks = with_offsets(weights)
    restored = ((blocks.levels.astype(np.float64) - blocks.zeros[..., None]) * blocks.scales[..., None]).reshape(16, -1)
    rebuilt = restored[:, : BLOCK * 8] + np.repeat(restored[:, BLOCK * 8 :][:, :8] / BLOCK, BLOCK, 1)
    assert np.abs(rebuilt - weights.T)[:, BLOCK:].max() <= 0.55 / 15
    assert np.abs(rebuilt - weights.T)[:, :BLOCK].max() <= 0.01


@pytest.mark.parametrize(("bits", "method", "bound"), [(4, "q4_1", 0.02), (4, "rtn", 0.05), (8, "rtn", 0.02)])
def test_products_are_the_rounded_weights(tmp_path, bits, method, bound):
    """Inputs with a mean, as activations have; against the product in float64. Weights are on a grid of Q4_1."""
    random = np.random.default_rng(1)
    inputs_of = 33 * BLOCK  # more than a block of offsets
    levels = random.integers(0, 16, (inputs_of, 40)).astype(np.float32)
    levels[::BLOCK], levels[1::BLOCK] = 0, 15
    weights = (levels - 6.4) * 0.03
    decoder_of(weights, np.eye(40, dtype=np.float32), tmp_path / "plain.onnx")
    quantize_weights(*open_graph(tmp_path / "plain.onnx"), tmp_path / "rounded.onnx", bits, method)
    inputs = (random.standard_normal((1, 7, inputs_of)) + 0.7).astype(np.float32)
    hidden, logits = open_session(tmp_path / "rounded.onnx", 1).run(["hidden", "logits"], {"x": inputs})
    expected = inputs.astype(np.float64) @ weights
    error = np.linalg.norm(hidden - expected) / np.linalg.norm(expected)
    assert error < bound
    assert np.linalg.norm(logits - hidden) < 0.02 * np.linalg.norm(hidden), "the head has 8 bits"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_head_that_is_the_token_embeddings_is_stored_once(tmp_path, bits):
    """Both are looked up, and multiplied, in the same bytes of the file."""
    random = np.random.default_rng(5)
    table = random.standard_normal((96, 64)).astype(np.float32)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["head"], ["table"], perm=[1, 0]),
            helper.make_node("Gather", ["table", "input_ids"], ["x"]),
            helper.make_node("MatMul", ["x", "head"], ["logits"], name="head"),
        ],
        "g",
        [info("input_ids", 7, [1, "s"])],
        [info("logits", 1, [1, "s", 96]), info("x", 1, [1, "s", 64])],
        [numpy_helper.from_array(table.T.copy(), "head")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "plain.onnx")
    quantize_weights(*open_graph(tmp_path / "plain.onnx"), tmp_path / "m.onnx", 4, head_bits=bits)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in stored_tensors(tmp_path / "m.onnx")}
    assert places["embed_tokens/rows"] == places[f"head/Q{bits}"] != {}
    blocks = nearest(table.T, bits)
    rows = ((blocks.levels.astype(np.float64) - 2 ** (bits - 1)) * blocks.scales[..., None]).reshape(96, 64)
    ids = np.array([[0, 5, 95, 5]])
    x, logits = open_session(tmp_path / "m.onnx", 1).run(["x", "logits"], {"input_ids": ids})
    np.testing.assert_allclose(x[0], rows[ids[0]], rtol=1e-6)
    assert np.linalg.norm(logits[0] - rows[ids[0]] @ rows.T) < 0.02 * np.linalg.norm(logits)


def stored_tensors(file):
    return onnx.load(file, load_external_data=False).graph.initializer


def test_weights_are_read_and_written_beside_the_graph(tmp_path):
    random = np.random.default_rng(2)
    decoder_of(random.standard_normal((64, 96), np.float32), random.standard_normal((96, 320), np.float32),
               tmp_path / "m.onnx")  # fmt: skip
    model = onnx.load(tmp_path / "m.onnx")
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    (tmp_path / "out").mkdir()
    for name in ("m.onnx", "apart.onnx"):
        quantize_weights(*open_graph(tmp_path / name), tmp_path / "out" / name, 4, "q4_1")
    whole, apart = (onnx.load(tmp_path / "out" / name).graph for name in ("m.onnx", "apart.onnx"))
    assert [t.name for t in whole.initializer] == [t.name for t in apart.initializer]
    for one, other in zip(whole.initializer, apart.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    assert "body" not in {tensor.name for tensor in whole.initializer}, "float32 has gone"


def test_what_cannot_be_rounded_so(tmp_path, matrix):
    decoder_of(matrix, matrix[:48], tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"body has 80 inputs.* 32.*int8.*rtn"):
        quantize_weights(*open_graph(tmp_path / "m.onnx"), tmp_path / "r.onnx", 4, "q4_1")
    with pytest.raises(UserError, match=r"q4_1 is for int4"):
        quantize_decoder(tmp_path / "m.onnx", tmp_path / "r.onnx", "int8", "q4_1")
    assert not (tmp_path / "r.onnx").exists()
