"""GPTQ against its definition in float64, and what it keeps that rounding to the nearest loses."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib import gptq
from calib.gptq import DAMPING, Compensated
from export.graphs.block_formats import BLOCK, Blocks, SymmetricGrid, nearest


def restored(blocks: Blocks) -> np.ndarray:
    """float64 [K, N], what a product with symmetric blocks computes."""
    values = (blocks.levels.astype(np.float64) - 8) * blocks.scales[..., None]
    return values.reshape(len(values), -1).T


def optimal_brain_quantiser(weights: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """[K, N] in float64 by the update of OBQ that GPTQ is derived from: after input q the others still to come move by
    -error H^-1[:, q] / H^-1[q, q], and q leaves H."""
    grid = SymmetricGrid.of(weights)
    energy = np.diag(moments)
    hessian = moments + DAMPING * energy.mean() * np.eye(len(moments))
    left, values = list(np.argsort(-energy, kind="stable")), weights.astype(np.float64)
    while left:
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        q = left[0]
        step = grid.steps[:, q // BLOCK].astype(np.float64)
        rounded = np.clip(np.rint(values[q] / step), -8, 7) * step
        error = values[q] - rounded
        values[left] -= np.outer(inverse[:, 0] / inverse[0, 0], error)
        values[q] = rounded
        left.pop(0)
    return values


def one_product(weights: np.ndarray, file) -> None:
    """x -> weights -> hidden -> head -> logits."""
    info = helper.make_tensor_value_info
    head = np.eye(weights.shape[1], dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Identity", ["input_ids"], ["x"]),
            helper.make_node("MatMul", ["x", "body"], ["hidden"]),
            helper.make_node("Relu", ["hidden"], ["taken"]),
            helper.make_node("MatMul", ["taken", "second"], ["last"]),
            helper.make_node("MatMul", ["last", "head"], ["logits"]),
        ],
        "g",
        [info("input_ids", 1, [1, "s", len(weights)])],
        [info("logits", 1, [1, "s", weights.shape[1]])],
        [
            numpy_helper.from_array(weights, "body"),
            numpy_helper.from_array(weights[: weights.shape[1]].copy(), "second"),
            numpy_helper.from_array(head, "head"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)


@pytest.fixture(scope="module")
def inputs():
    """[prompts, positions, K] that move together, as activations do, some inputs far more than others."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((24, 3 * BLOCK)) * random.lognormal(0, 1, 3 * BLOCK)
    return [(random.standard_normal((1, 40, 24)) @ mixing).astype(np.float32) for _ in range(6)]


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).standard_normal((3 * BLOCK, 2 * BLOCK)).astype(np.float32)


@pytest.fixture
def source(weights, tmp_path):
    one_product(weights, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def moments_of(inputs: list[np.ndarray]) -> np.ndarray:
    rows = np.concatenate([values[0] for values in inputs]).astype(np.float64)
    return rows.T @ rows


def test_it_is_the_optimal_brain_quantiser(source, weights, inputs):
    found = restored(Compensated(source, [{"input_ids": x} for x in inputs])("body", weights))
    expected = optimal_brain_quantiser(weights, moments_of(inputs))
    steps = np.abs(SymmetricGrid.of(weights).steps).repeat(BLOCK, 1).T
    levels_off = np.abs(found - expected) / steps
    # float32 next to float64: a value half-way between two levels may fall to the other side, and move those after it
    assert np.mean(levels_off < 0.01) > 0.98
    assert levels_off.max() < 2.01


def test_the_layers_output_is_nearer_than_with_each_weight_rounded(source, weights, inputs):
    x = np.concatenate(inputs, 1)[0].astype(np.float64)
    compensated = restored(Compensated(source, [{"input_ids": given} for given in inputs])("body", weights))
    errors = [np.linalg.norm(x @ (values - weights)) for values in (compensated, restored(nearest(weights, 4)))]
    assert errors[0] < 0.5 * errors[1]


def test_changes_of_hundredths_of_a_step_are_kept(source, weights, inputs):
    """Weights on a grid of 4 bits, then fine-tuned a little: rounding gives back the ones from before."""
    random = np.random.default_rng(2)
    before = restored(nearest(weights, 4)).astype(np.float32)
    change = random.standard_normal((len(before), 2)) @ random.standard_normal((2, before.shape[1]))
    after = (before + 0.03 * change * np.abs(SymmetricGrid.of(before).steps).mean()).astype(np.float32)
    x = np.concatenate(inputs, 1)[0].astype(np.float64)
    wanted = np.linalg.norm(x @ (after - before))
    one_product(after, source)
    lost = [
        np.linalg.norm(x @ (values - after))
        for values in (
            restored(nearest(after, 4)),
            restored(Compensated(source, [{"input_ids": given} for given in inputs])("body", after)),
        )
    ]
    assert lost[0] > 0.9 * wanted, "all of it, by rounding"
    assert lost[1] < 0.6 * wanted


def test_matrices_may_be_wanted_in_any_order(source, weights, inputs):
    feeds = [{"input_ids": given} for given in inputs]
    second = weights[: weights.shape[1]]
    in_order = Compensated(source, feeds)
    expected = [in_order("body", weights), in_order("second", second)]
    backwards = Compensated(source, iter(feeds))
    for name, values, blocks in (("second", second, expected[1]), ("body", weights, expected[0])):
        np.testing.assert_array_equal(backwards(name, values).levels, blocks.levels)


@pytest.mark.parametrize("size", [1, gptq.LEAF + 45, 3 * gptq.LEAF])
def test_the_factor_is_that_of_the_inverse(size):
    """Cholesky's, upper, of the inverse of the damped moments in the order of the inputs' energy."""
    rows = np.random.default_rng(4).standard_normal((2 * size, size)).astype(np.float32)
    moments = rows.T @ rows
    order, factor = gptq._factor(moments)
    energy = np.diag(moments)[order]
    assert (np.diff(energy) <= 0).all()
    damped = moments.astype(np.float64) + DAMPING * np.diag(moments).astype(np.float64).mean() * np.eye(size)
    expected = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    np.testing.assert_allclose(factor, expected, atol=1e-5 * np.abs(expected).max())


def test_large_values_between_layers_wait_in_files_that_have_no_name(source, weights, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(gptq, "LARGE", 1)
    folder = tmp_path / "scratch"
    folder.mkdir()
    kept = Compensated(source, [{"input_ids": given} for given in inputs], folder)
    assert all(isinstance(feed["input_ids"], np.memmap) for feed in kept._feeds)
    assert not list(folder.iterdir())
    monkeypatch.undo()
    plain = Compensated(source, [{"input_ids": given} for given in inputs])
    np.testing.assert_array_equal(kept("body", weights).levels, plain("body", weights).levels)


def test_an_input_that_is_always_zero_is_no_division_by_zero(source, weights, inputs):
    silent = [given.copy() for given in inputs]
    for given in silent:
        given[..., :BLOCK] = 0
    blocks = Compensated(source, [{"input_ids": given} for given in silent])("body", weights)
    by_themselves = nearest(weights, 4)
    np.testing.assert_array_equal(blocks.levels[:, 0], by_themselves.levels[:, 0])
    blocks = Compensated(source, [{"input_ids": 0 * given} for given in silent])("body", weights)
    np.testing.assert_array_equal(blocks.levels, by_themselves.levels)
