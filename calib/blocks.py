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

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import external_data_helper, helper, numpy_helper

from runtime.errors import UserError

BLOCK = 32
METHODS = {"rtn": (4, 8), "q4_1": (4,)}  # and the bits it is for
FLOAT_COMPUTE, INT8_COMPUTE = 0, 4  # MatMulNBits' accuracy level; in INT8, activations are rounded on the fly
ALIGNMENT = 64  # bytes, of a tensor in the file of weights
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
    blocks = _blocks(weights)
    lowest, highest = blocks.min(-1), blocks.max(-1)
    # Far from zero, an offset would leave more than half a step, and coarsen what 31 others leave
    step = (highest - lowest) / 15
    far = np.maximum(lowest, -highest) > step / 2
    lowest, highest = np.where(far, np.minimum(lowest, 0), lowest), np.where(far, np.maximum(highest, 0), highest)
    scales = (highest - lowest) / 15
    scales[scales == 0] = 1
    levels = np.clip(np.rint((blocks - lowest[..., None]) / scales[..., None]), 0, 15).astype(np.uint8)
    zeros = np.clip(np.rint(-lowest / scales), 0, 15)
    rest = nearest((BLOCK * (lowest + zeros * scales)).T, 4)
    return Blocks(
        4,
        np.concatenate([levels, rest.levels], 1),
        np.concatenate([scales, rest.scales], 1),
        np.concatenate([zeros, np.full(rest.scales.shape, 8)], 1).astype(np.uint8),
    )


def _blocks(weights: np.ndarray) -> np.ndarray:
    """[K, N] -> float32 [N, blocks, BLOCK], padded with zeros."""
    rows = weights.T.astype(np.float32)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    return padded.reshape(len(rows), -1, BLOCK)


def _pairs(levels: np.ndarray) -> np.ndarray:
    """Two levels of 4 bits in a byte, along the last axis."""
    padded = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, levels.shape[-1] % 2)])
    return padded[..., ::2] | padded[..., 1::2] << 4


def quantise_weights(source: Path, target: Path, bits: int | None, method: str = "rtn") -> None:
    """Write the fused float graph `source` with rounded weights to `target` (and `target`.data).

    bits: None rounds the head alone. method: a key of `METHODS` that is for these bits.
    Raises UserError for q4_1 where a matrix has a number of inputs that BLOCK does not divide.
    """
    model = onnx.load(str(source), load_external_data=False)
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    head = next(node for node in graph.node if "logits" in node.output)
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in tensors]
    plans = {node.input[1]: (bits, method) for node in products if bits is not None} | {head.input[1]: (8, "rtn")}
    for name, (_, how) in plans.items():
        if how == "q4_1" and tensors[name].dims[0] % BLOCK:
            raise UserError(
                f"{name} has {tensors[name].dims[0]} inputs, which blocks with offsets (q4_1) want to be a multiple of "
                f"{BLOCK}; take int8, or --method rtn of calib.quantize"
            )
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
            for ending, array in _rounded(values, *plans[name]).tensors().items() if name in plans else ():
                graph.initializer.append(_stored(f"{name}/{ending}", array, data))
            if name in used:
                graph.initializer.append(_stored(name, values, data))
    onnx.save(model, str(target))


def write_prefill(source: Path, target: Path) -> None:
    """The graph at `source` with products in float32: for prompts on processors that are slow at products of bytes.
    target: a file beside it; the weights are those of `source`."""
    model = onnx.load(str(source), load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = FLOAT_COMPUTE
    onnx.save(model, str(target))


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
