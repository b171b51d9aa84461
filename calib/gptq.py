"""Weights rounded one input after the other, each time moving those still to come so that what the layer gives on
calibration data changes least: GPTQ (arXiv 2210.17323), on the levels of `export.graphs.block_formats.Grid`.

With rounding to the nearest, a change that is small everywhere is lost: fine-tuning moves most weights by a few
hundredths of a step. Here what is lost of it in one weight is carried to the next, until one moves.

The levels of a block are those of the weights as they were (static groups), so that inputs can be taken in the order of
their energy, the largest first, when most weights are left to make up for what they lose.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from calib.probe import Probe
from export.graphs.block_formats import BLOCK, Blocks, Grid

DAMPING = 0.01  # of the mean energy, added to each input's
AT_ONCE = 128  # inputs whose errors are carried on together
POSITIONS = 512  # whose second moments are added at a time: adding costs more than a prompt's products
MEMORY = 12 << 30  # bytes, of the second moments that are kept at a time: two rounds for a 7B


class Compensated:
    """Rounds the matrices of the fused float32 graph `source` to 4 bits: a `rounding` of `quantize_weights`.

    feeds: of the graph, gone over once for as many matrices as `MEMORY` has room for.
    """

    def __init__(self, source: Path, feeds: Iterable[dict[str, np.ndarray]]):
        self._source, self._feeds = source, list(feeds)
        graph = onnx.load(str(source), load_external_data=False).graph
        sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 2}
        products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes]
        products = [node for node in products if "logits" not in node.output]  # the head is not rounded so
        self._inputs = {node.input[1]: node.input[0] for node in products}
        self._sizes = {node.input[0]: sizes[node.input[1]] for node in products}
        self._moments: dict[str, np.ndarray] = {}
        self._factor: tuple[str, np.ndarray, np.ndarray] = ("", np.empty(0), np.empty(0))  # of the input last asked for

    def __call__(self, name: str, weights: np.ndarray) -> Blocks:
        """The blocks of the matrix `name`, [K, N]."""
        wanted = self._inputs[name]
        if wanted != self._factor[0]:
            if wanted not in self._moments:
                self._moments = {}  # before others come
                self._moments = self._collect(self._after(wanted))
            self._factor = (wanted, *_factor(self._moments[wanted]))
        return compensated(weights, *self._factor[1:])

    def _after(self, first: str) -> list[str]:
        """The products' inputs from `first` on, in the order of the graph, as many as there is room for."""
        names = list(self._sizes)
        taken, used = [], 0
        for name in names[names.index(first) :]:
            used += 4 * self._sizes[name] ** 2
            if taken and used > MEMORY:
                break
            taken.append(name)
        return taken

    def _collect(self, names: list[str]) -> dict[str, np.ndarray]:
        """x^T x over all positions x of each, float32 [K, K]."""
        sums = {name: np.zeros((self._sizes[name],) * 2, np.float32) for name in names}
        waiting = {name: [] for name in names}

        def add() -> None:
            for name, values in waiting.items():
                rows = np.concatenate([value.reshape(-1, value.shape[-1]) for value in values])
                sums[name] += rows.T @ rows
                values.clear()

        with tempfile.TemporaryDirectory() as folder:
            probe, count = Probe(self._source, names, Path(folder)), 0
            for feed in self._feeds:
                for name, values in probe(feed).items():
                    waiting[name].append(values)
                count += feed["input_ids"].size
                if count >= POSITIONS:
                    add()
                    count = 0
        if count:
            add()
        return sums


def _factor(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K, K] -> (inputs in the order of their energy, the upper Cholesky factor of the inverse in that order)."""
    energy = np.diag(moments).astype(np.float64)
    order = np.argsort(-energy, kind="stable")
    damped = moments[np.ix_(order, order)].astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * energy.mean() or 1.0
    return order, np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def compensated(weights: np.ndarray, order: np.ndarray, factor: np.ndarray) -> Blocks:
    """weights: [K, N], K a multiple of BLOCK. order, factor: as `_factor` gives them."""
    grid = Grid.of(weights)
    stored = grid.as_stored()
    rest = weights[order].astype(np.float32)  # what is left to be rounded
    levels = np.empty((weights.shape[1], len(order)), np.uint8)
    for begin in range(0, len(order), AT_ONCE):
        end = min(begin + AT_ONCE, len(order))
        errors = np.empty((end - begin, weights.shape[1]), np.float32)
        for i in range(begin, end):
            step, lowest = (values[:, order[i] // BLOCK] for values in (stored.steps, stored.lowest))
            level = np.clip(np.rint((rest[i] - lowest) / step), 0, 15)
            levels[:, order[i]] = level
            errors[i - begin] = (rest[i] - (level * step + lowest)) / factor[i, i]
            rest[i + 1 : end] -= np.outer(factor[i, i + 1 : end], errors[i - begin])
        rest[end:] -= factor[begin:end, end:].T @ errors
    return grid.stored(levels.reshape(len(levels), -1, BLOCK))
