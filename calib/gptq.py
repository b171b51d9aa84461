"""Weights rounded one input after the other, each time moving those still to come so that what the layer gives on
calibration data changes least: GPTQ (arXiv 2210.17323), on a `SymmetricGrid`.

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

from calib.pieces import Pieces
from export.graphs.block_formats import BLOCK, Blocks, SymmetricGrid

CUT_AFTER = "GroupQueryAttention"  # a layer at a time
DAMPING = 0.01  # of the mean energy, added to each input's
AT_ONCE = 128  # inputs whose errors are carried on together
POSITIONS = 512  # whose second moments are added at a time: adding costs more than a prompt's products
LARGE = 1 << 20  # bytes of a value between layers that waits in a file
LEAF = 256  # rows of a triangular matrix that is inverted whole


class Compensated:
    """Rounds the matrices of a fused float graph to 4 bits: a `rounding` of `quantize_weights`.

    The graph is run in float32, a layer at a time for all prompts: one layer, the second moments of what the matrices
    of two layers take and one prompt's values are in memory. What the next layer takes waits in files without a name.
    Matrices are wanted in the order of the graph; others cost a run from the beginning.

    Args:
        source: the graph, in float32 or float16.
        feeds: of the graph, gone over once.
        folder: on the disk that the files take: for each token of the prompts, twice the hidden size in float32. None
            takes the system's for temporary files.
    """

    def __init__(self, source: Path, feeds: Iterable[dict[str, np.ndarray]], folder: Path | None = None):
        self._folder = folder
        graph = onnx.load(str(source), load_external_data=False).graph
        sizes = {tensor.name: tensor.dims[0] for tensor in graph.initializer if len(tensor.dims) == 2}
        makers = {name: node for node in graph.node for name in node.output}
        products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes]
        self._inputs = {
            node.input[1]: _at_all_positions(node.input[0], makers) if "logits" in node.output else node.input[0]
            for node in products
        }
        self._sizes = {taken: sizes[matrix] for matrix, taken in self._inputs.items()}
        self._pieces = Pieces(source, self._sizes, CUT_AFTER, float32=True)
        self._feeds = [{name: self._kept(value) for name, value in feed.items()} for feed in feeds]
        self._factor: tuple[str, np.ndarray, np.ndarray] = ("", np.empty(0), np.empty(0))  # of the input last asked for
        self._restart()

    def __call__(self, name: str, weights: np.ndarray) -> Blocks:
        """The blocks of the matrix `name`, [K, N]."""
        wanted = self._inputs[name]
        if wanted != self._factor[0]:
            if wanted not in self._moments and not self._comes(wanted):
                self._restart()
            while wanted not in self._moments:
                self._advance()
            self._factor = (wanted, *_factor(self._moments[wanted]))
        return compensated(weights, *self._factor[1:])

    def _restart(self) -> None:
        self._next = 0  # piece
        self._live = list(self._feeds)  # values of each prompt that pieces to come take
        self._sums: list[dict[str, np.ndarray]] = []  # of the last two pieces

    @property
    def _moments(self) -> dict[str, np.ndarray]:
        """x^T x over all positions x of what matrices take, float32 [K, K]."""
        return {name: sums for piece in self._sums for name, sums in piece.items()}

    def _comes(self, name: str) -> bool:
        return any(name in piece.names for piece in self._pieces.pieces[self._next :])

    def _advance(self) -> None:
        """Run the next piece for all prompts."""
        piece, later = self._pieces.pieces[self._next], self._pieces.pieces[self._next + 1 :]
        taken = {name for other in later for name in other.inputs}
        sums = {name: np.zeros((self._sizes[name],) * 2, np.float32) for name in piece.names}
        waiting: dict[str, list[np.ndarray]] = {name: [] for name in piece.names}

        def add() -> None:
            for name, values in waiting.items():
                rows = np.concatenate(values)
                sums[name] += rows.T @ rows
                values.clear()

        session = None
        for i, values in enumerate(self._live):
            session = session or self._pieces.open(piece, values)
            found = self._pieces.run(session, piece, values)
            self._live[i] = {name: value for name, value in values.items() if name in taken}
            self._live[i] |= {name: self._kept(value) for name, value in found.items() if name in taken}
            for name, rows in waiting.items():
                value = found[name] if name in found else values[name]
                rows.append(value.reshape(-1, value.shape[-1]))
            if any(sum(map(len, rows)) >= POSITIONS for rows in waiting.values()):
                add()
        if any(waiting.values()):
            add()
        self._sums = [*self._sums[-1:], sums]
        self._next += 1

    def _kept(self, values: np.ndarray) -> np.ndarray:
        """The same, in a file where they are large."""
        if values.nbytes < LARGE:
            return values
        with tempfile.TemporaryFile(dir=self._folder) as file:
            mapped = np.memmap(file, values.dtype, "w+", shape=values.shape)  # lives on without its name
        mapped[...] = values
        return mapped


def _at_all_positions(name: str, makers: dict[str, onnx.NodeProto]) -> str:
    """What the head takes at its one position, at all."""
    while name in makers and makers[name].op_type in ("Gather", "Unsqueeze"):
        name = makers[name].input[0]
    return name


def _factor(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[K, K] -> (inputs in the order of their energy, the upper Cholesky factor of the inverse in that order)."""
    energy = np.diag(moments).astype(np.float64)
    order = np.argsort(-energy, kind="stable")
    damped = moments[np.ix_(order[::-1], order[::-1])].astype(np.float64)  # reversed: L^-1 is then the factor, reversed
    damped[np.diag_indices_from(damped)] += DAMPING * energy.mean() or 1.0
    lower = np.linalg.cholesky(damped)
    del damped
    _invert_lower(lower)
    return order, np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def _invert_lower(matrix: np.ndarray) -> None:
    """Invert a lower triangular matrix in place."""
    if len(matrix) <= LEAF:
        matrix[...] = np.tril(np.linalg.inv(matrix))
        return
    half = len(matrix) // 2
    first, second, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    _invert_lower(first)
    _invert_lower(second)
    below[...] = -second @ (below @ first)


def compensated(weights: np.ndarray, order: np.ndarray, factor: np.ndarray) -> Blocks:
    """weights: [K, N], K a multiple of BLOCK. order, factor: as `_factor` gives them."""
    grid = SymmetricGrid.of(weights)
    rest = weights[order].astype(np.float32)  # what is left to be rounded
    levels = np.empty((weights.shape[1], len(order)), np.uint8)
    for begin in range(0, len(order), AT_ONCE):
        end = min(begin + AT_ONCE, len(order))
        errors = np.empty((end - begin, weights.shape[1]), np.float32)
        for i in range(begin, end):
            step = grid.steps[:, order[i] // BLOCK]
            level = np.clip(np.rint(rest[i] / step), -8, 7)
            levels[:, order[i]] = level + 8
            errors[i - begin] = (rest[i] - level * step) / factor[i, i]
            rest[i + 1 : end] -= np.outer(factor[i, i + 1 : end], errors[i - begin])
        rest[end:] -= factor[begin:end, end:].T @ errors
    return grid.stored(levels.reshape(len(levels), -1, BLOCK))
