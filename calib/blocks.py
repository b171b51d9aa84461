"""The weights of a fused decoder graph in 4 or 8 bits, in blocks of 32 along the input, for ONNX Runtime's MatMulNBits.

rtn: each weight is rounded to the nearest of its block's levels, which lie around zero: w = scale (q - zero).
q4_1: 4 bits with a scale and an offset for each block, as in GGUF's Q4_1: w = scale q + minimum. Weights that were
stored that way are kept to a few hundredths of a step, and others fit better than around zero. MatMulNBits takes whole
levels as zero points alone; what is left of the offsets meets the sum of a block's inputs. So the means of the blocks
are put behind the inputs (AveragePool, Concat), and the rest of the offsets behind the weights, in 4 bits: 3 % more
columns.

The head takes 8 bits around zero in any case, since what is lost there is lost in every token, and with it the token
embeddings where they are the same matrix; where they have their own, it stays as it is. Activations are float32; ONNX
Runtime rounds them to 8 bits for each product.

Matrices are read and written one at a time, so that memory for the largest is enough.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from runtime.errors import UserError

BLOCK = 32
METHODS = {"rtn": (4, 8), "q4_1": (4,)}  # and the bits it is for
FLOAT_COMPUTE, INT8_COMPUTE = 0, 4  # MatMulNBits' accuracy level; in INT8, activations are rounded on the fly
ALIGNMENT = 64  # bytes, of a tensor in the file of weights
DOMAIN = "convllava"  # of the operators in runtime.kernels
SMALL = 1024  # bytes of a tensor that stays in the graph's own file


@dataclass(frozen=True)
class Blocks:
    """A matrix [K, N] in blocks along K. levels: uint8 [N, blocks, BLOCK], 0 to 2**bits - 1; scales: float32
    [N, blocks]; zeros: uint8 [N, blocks], the level that stands for 0, or None: the one in the middle."""

    bits: int
    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """MatMulNBits' inputs by the ending of their names, as it wants them packed."""
        packed = self.levels if self.bits == 8 else _pairs(self.levels)
        zeros = {} if self.zeros is None else {"zeros": _pairs(self.zeros)}
        return {f"Q{self.bits}": packed, "scales": self.scales, **zeros}


def nearest(weights: np.ndarray, bits: int) -> Blocks:
    """[K, N] around zero: the weight of a block that is furthest from it takes the lowest level."""
    blocks, half = _blocks(weights), 2 ** (bits - 1)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = np.where(furthest == 0, 1, furthest / -half).astype(np.float32)
    levels = np.clip(np.rint(blocks / scales) + half, 0, 2 * half - 1).astype(np.uint8)
    return Blocks(bits, levels, scales[..., 0])


def with_offsets(weights: np.ndarray) -> Blocks:
    """[K, N], K a multiple of BLOCK -> 4-bit blocks of K + K / BLOCK rows: those of `weights`, then what the mean of
    each block of inputs is multiplied by."""
    return Grid.of(weights).nearest(weights)


@dataclass(frozen=True)
class Grid:
    """Sixteen levels for each block of a matrix: level * step + lowest. steps, lowest: float32 [N, blocks]."""

    steps: np.ndarray
    lowest: np.ndarray

    @classmethod
    def of(cls, weights: np.ndarray) -> Self:
        """The least that [K, N] fits on, K a multiple of BLOCK."""
        blocks = _blocks(weights)
        lowest, highest = blocks.min(-1), blocks.max(-1)
        # Far from zero, an offset would leave more than half a step, and coarsen what 31 others leave
        step = (highest - lowest) / 15
        far = np.maximum(lowest, -highest) > step / 2
        lowest = np.where(far, np.minimum(lowest, 0), lowest)
        highest = np.where(far, np.maximum(highest, 0), highest)
        steps = (highest - lowest) / 15
        steps[steps == 0] = 1
        return cls(steps, lowest)

    def nearest(self, weights: np.ndarray) -> Blocks:
        """[K, N], each weight rounded to the nearest level."""
        levels = (_blocks(weights) - self.lowest[..., None]) / self.steps[..., None]
        return self.stored(np.clip(np.rint(levels), 0, 15).astype(np.uint8))

    def stored(self, levels: np.ndarray) -> Blocks:
        """levels: uint8 [N, blocks, BLOCK]."""
        zeros, rest = self._offsets()
        return Blocks(
            4,
            np.concatenate([levels, rest.levels], 1),
            np.concatenate([self.steps, rest.scales], 1),
            np.concatenate([zeros, np.full(rest.scales.shape, 8)], 1).astype(np.uint8),
        )

    def as_stored(self) -> Self:
        """The levels that products get: `lowest` is rounded when it is stored."""
        zeros, rest = self._offsets()
        means = (rest.levels.astype(np.float32) - 8) * rest.scales[..., None]
        offsets = means.reshape(len(means), -1)[:, : zeros.shape[1]] / BLOCK
        return replace(self, lowest=(offsets - zeros * self.steps).astype(np.float32))

    def _offsets(self) -> tuple[np.ndarray, Blocks]:
        """(the whole level that is nearest to zero [N, blocks], what the rest of the offsets is in blocks)."""
        zeros = np.clip(np.rint(-self.lowest / self.steps), 0, 15)
        return zeros, nearest((BLOCK * (self.lowest + zeros * self.steps)).T, 4)


def _blocks(weights: np.ndarray) -> np.ndarray:
    """[K, N] -> float32 [N, blocks, BLOCK], padded with zeros."""
    rows = weights.T.astype(np.float32)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    return padded.reshape(len(rows), -1, BLOCK)


def _pairs(levels: np.ndarray) -> np.ndarray:
    """Two levels of 4 bits in a byte, along the last axis."""
    padded = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, levels.shape[-1] % 2)])
    return padded[..., ::2] | padded[..., 1::2] << 4


def quantise_weights(
    source: Path,
    target: Path,
    bits: int | None,
    method: str = "rtn",
    rounding: Callable[[str, np.ndarray], Blocks] | None = None,
) -> None:
    """Write the fused float graph `source` with rounded weights to `target` (and `target`.data).

    bits: None rounds the head alone. method: a key of `METHODS` that is for these bits. rounding: by which the body's
    matrices get their blocks, from name and values; None rounds each weight to the nearest.
    Raises UserError for q4_1 where a matrix has a number of inputs that BLOCK does not divide.
    """
    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    head = next(node for node in graph.node if "logits" in node.output)
    products = _products(graph)
    plans = {node.input[1]: (bits, method) for node in products if bits is not None} | {head.input[1]: (8, "rtn")}
    check_whole_blocks(graph, {name for name, (_, how) in plans.items() if how == "q4_1"})
    shapes = {name: tuple(tensors[name].dims) for name in plans}
    _share_embeddings(graph, head, shapes[head.input[1]])
    _take_blocks(graph, plans, shapes)
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.data", "wb") as data:
        for name, tensor in tensors.items():
            read = onnx.TensorProto()
            read.CopyFrom(tensor)  # some versions of onnx keep in it what they read from the file of weights
            values = numpy_helper.to_array(read, str(source.parent))
            if name in plans:
                by_itself = rounding is None or name == head.input[1]
                blocks = _rounded(values, *plans[name]) if by_itself else rounding(name, values)
                for ending, array in blocks.tensors().items():
                    graph.initializer.append(_stored(f"{name}/{ending}", array, data))
            if name in used:
                graph.initializer.append(_stored(name, values, data))
    onnx.save(model, str(target))


def check_whole_blocks(graph: onnx.GraphProto, names: Collection[str] | None = None) -> None:
    """Raises UserError where a matrix has a number of inputs that BLOCK does not divide. names: of the matrices; None:
    of all that products are taken with."""
    if names is None:
        names = {node.input[1] for node in _products(graph)}
    for tensor in graph.initializer:
        if tensor.name in names and tensor.dims[0] % BLOCK:
            raise UserError(
                f"{tensor.name} has {tensor.dims[0]} inputs, which blocks with offsets (q4_1, gptq) and awq want to be "
                f"a multiple of {BLOCK}; take int8, or --method rtn of calib.quantize"
            )


def _products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """With matrices of the graph's own."""
    matrices = {tensor.name for tensor in graph.initializer}
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in matrices]


def write_variants(file: Path) -> dict[str, Path]:
    """Beside the graph `file`, others of the same weights; returns them by their keys in a bundle's manifest."""
    prefill, kernels = file.with_name("prefill.onnx"), file.with_name("kernels.onnx")
    write_prefill(file, prefill)
    written = {"prefill_file": prefill}
    return written | {"kernels_file": kernels} if write_kernels(file, kernels) else written


def write_prefill(source: Path, target: Path) -> None:
    """The graph at `source` with products in float32: for prompts on processors that are slow at products of bytes.
    target: a file beside it; the weights are those of `source`."""
    model = onnx.load(str(source), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = FLOAT_COMPUTE
    onnx.save(model, str(target))


def write_kernels(source: Path, target: Path) -> bool:
    """The graph at `source` with this project's operators (`runtime.kernels`) in place of MatMulNBits and of what
    surrounds it. target: a file beside it; the weights are those of `source`.

    Means of blocks become part of BlockMatMul, and two products, SiLU and their multiplication one GatedBlockMatMul.
    Returns False, and writes nothing, where a matrix's inputs are no multiple of a block.
    """
    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    _replace_nodes(graph, [_block_matmul(node, makers) for node in graph.node])
    if any(node.op_type == "MatMulNBits" for node in graph.node):
        return False
    makers = {name: node for node in graph.node for name in node.output}
    _replace_nodes(graph, [_gated(node, makers) for node in graph.node])
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.save(model, str(target))
    return True


def _replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """`nodes` in the graph, less those that nobody reads any more."""
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(nodes):  # a node comes after those it reads from
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    graph.ClearField("node")
    graph.node.extend(reversed(kept))


def _block_matmul(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> onnx.NodeProto:
    """A MatMulNBits as a BlockMatMul, its inputs without the means behind them; any other node as it is."""
    if node.op_type != "MatMulNBits":
        return node
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    inputs, size, *weights = node.input[0], attributes["K"], *node.input[1:]
    extended = makers.get(inputs)
    means = makers.get(extended.input[-1]) if extended is not None and extended.op_type == "Concat" else None
    if means is not None and means.op_type == "AveragePool":
        inputs, size = extended.input[0], size * BLOCK // (BLOCK + 1)
    if size % BLOCK or attributes["block_size"] != BLOCK:
        return node
    return helper.make_node(
        "BlockMatMul", [inputs, *weights], list(node.output), node.name, domain=DOMAIN, K=size, bits=attributes["bits"]
    )


def _gated(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> onnx.NodeProto:
    """The Mul of silu(gate) and up as a GatedBlockMatMul, where both are BlockMatMuls of one input; any other node as
    it is."""
    if node.op_type != "Mul":
        return node
    silu, up = (makers.get(name) for name in node.input)
    if silu is None or silu.op_type != "Mul" or up is None or up.op_type != "BlockMatMul":
        return node
    gate, sigmoid = (makers.get(name) for name in silu.input)
    if gate is None or gate.op_type != "BlockMatMul" or sigmoid is None or sigmoid.op_type != "Sigmoid":
        return node
    if sigmoid.input[0] != silu.input[0] or gate.input[0] != up.input[0] or gate.attribute != up.attribute:
        return node
    weights = [name for matmul in (gate, up) for name in [*matmul.input[1:], ""][:3]]
    gated = helper.make_node("GatedBlockMatMul", [gate.input[0], *weights], list(node.output), node.name, domain=DOMAIN)
    gated.attribute.extend(gate.attribute)
    return gated


def _rounded(weights: np.ndarray, bits: int, method: str) -> Blocks:
    return with_offsets(weights) if method == "q4_1" else nearest(weights, bits)


def _take_blocks(graph: onnx.GraphProto, plans: dict[str, tuple[int, str]], shapes: dict[str, tuple[int, int]]) -> None:
    """MatMulNBits in place of every product with a matrix of `plans`, name -> (bits, method)."""
    nodes, extended = [], set()
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in plans:
            nodes.append(node)
            continue
        inputs, matrix = node.input
        (size, outputs), (bits, method) = shapes[matrix], plans[matrix]
        names = [f"{matrix}/Q{bits}", f"{matrix}/scales"]
        if method == "q4_1":
            size += size // BLOCK
            names.append(f"{matrix}/zeros")
            if inputs not in extended:  # once, for all matrices that it meets
                extended.add(inputs)
                means = helper.make_node(
                    "AveragePool", [inputs], [f"{inputs}/means"], kernel_shape=[BLOCK], strides=[BLOCK]
                )
                nodes += [
                    means,
                    helper.make_node("Concat", [inputs, *means.output], [f"{inputs}/extended"], axis=-1),
                ]
            inputs = f"{inputs}/extended"
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [inputs, *names],
                list(node.output),
                name=node.name,
                domain="com.microsoft",
                K=size,
                N=outputs,
                bits=bits,
                block_size=BLOCK,
                accuracy_level=INT8_COMPUTE,
            )
        )
    del graph.node[:]
    graph.node.extend(nodes)


def _share_embeddings(graph: onnx.GraphProto, head: onnx.NodeProto, shape: tuple[int, int]) -> None:
    """Where token embeddings are the transposed matrix of the head, look them up in its blocks of 8 bits instead.
    Embeddings that are a matrix of their own stay as they are. shape: of the head's matrix, [D, V]."""
    matrix = head.input[1]
    tables = {node.output[0]: node for node in graph.node if node.op_type == "Transpose" and node.input[0] == matrix}
    lookup = next((node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables), None)
    if lookup is None or shape[0] % BLOCK:
        return
    rows = numpy_helper.from_array(np.array([shape[1], shape[0]]), "embed_tokens/shape")
    graph.node.insert(0, helper.make_node("Constant", [], [rows.name], value=rows))
    table = tables[lookup.input[0]]
    table.CopyFrom(helper.make_node("Reshape", [f"{matrix}/Q8", rows.name], ["embed_tokens/rows"]))
    lookup.CopyFrom(
        helper.make_node(
            "GatherBlockQuantized",
            ["embed_tokens/rows", lookup.input[1], f"{matrix}/scales"],
            list(lookup.output),
            name=lookup.name,
            domain="com.microsoft",
            bits=8,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
    )


def _stored(name: str, values: np.ndarray, data: BinaryIO) -> onnx.TensorProto:
    """A tensor of the graph whose bytes, unless they are few, go to the end of `data`."""
    tensor = numpy_helper.from_array(values, name)
    if values.nbytes < SMALL:
        return tensor
    data.write(b"\0" * (-data.tell() % ALIGNMENT))
    begin = data.tell()
    data.write(tensor.raw_data)
    external_data_helper.set_external_data(tensor, Path(data.name).name, begin, values.nbytes)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    return tensor
