"""The weights of a fused decoder graph in 4 or 8 bits, in blocks of 32 along the input, for ONNX Runtime's MatMulNBits.

rtn: each weight is rounded to the nearest of its block's levels, which lie around zero: w = scale (q - zero).
q4_1: 4 bits with a scale and an offset for each block, as in GGUF's Q4_1: w = scale q + minimum. Weights that were
stored that way are kept to a few hundredths of a step, and others fit better than around zero. MatMulNBits takes whole
levels as zero points alone; what is left of the offsets meets the sum of a block's inputs. So the means of the blocks
are put behind the inputs (AveragePool, Concat), and the rest of the offsets behind the weights, in 4 bits: 3 % more
columns.

The head takes 8 bits around zero by default, since what is lost there is lost in every token, and with it the token
embeddings where they are the same matrix; where they have their own, it stays as it is. Activations are float32; ONNX
Runtime rounds them to 8 bits for each product. A graph in float16 is for GPUs: it stays in float16, its head takes as
many bits as the rest, and scales are float16.

Matrices are read and written one at a time, so that memory for the largest is enough.
"""

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from export.graphs.block_formats import BLOCK, Blocks, rounded
from export.graphs.store import Read, by_layer, store, values_of
from runtime.errors import UserError

FLOAT_COMPUTE, INT8_COMPUTE = 0, 4  # MatMulNBits' accuracy level; in INT8, activations are rounded on the fly
TABLE = "embed_tokens/rows"  # of token embeddings that the head's blocks hold
AT_ONCE = 1 << 22  # weights that a thread rounds at a time


def quantize_weights(
    model: onnx.ModelProto,
    read: Read,
    target: Path,
    bits: int | None,
    method: str = "rtn",
    rounding: Callable[[str, np.ndarray], Blocks] | None = None,
    head_bits: int = 8,
) -> None:
    """Write a fused float graph with rounded weights to `target` (and `target`.data).

    Args:
        model: the float graph, changed in place; of its initializers, name, type and shape are enough. See
            `export.graphs.load.open_graph` for one in a file.
        read: values of an initializer that has none of its own, in any float type.
        bits: None rounds the head alone.
        method: a key of `METHODS` that is for these bits.
        rounding: by which the body's matrices get their blocks, and the head's if it has 4 bits, from name and values
            [K, N]; None rounds each weight to the nearest.
        head_bits: 4 or 8, of symmetric blocks.

    Raises:
        UserError: q4_1, and a matrix has a number of inputs that BLOCK does not divide.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    head = next(node for node in graph.node if "logits" in node.output)
    products = _products(graph)
    plans = {node.input[1]: (bits, method) for node in products if bits is not None}
    half = tensors[head.input[1]].data_type == onnx.TensorProto.FLOAT16
    if not half:
        plans[head.input[1]] = (head_bits, "rtn")
    check_whole_blocks(graph, {name for name, (_, how) in plans.items() if how == "q4_1"})
    shapes = {name: (tensors[name].dims[0], tensors[name].dims[1]) for name in plans}
    _share_embeddings(graph, head, shapes[head.input[1]], plans[head.input[1]][0])
    _take_blocks(graph, plans, shapes, FLOAT_COMPUTE if half else INT8_COMPUTE)
    used = {name for node in graph.node for name in node.input}
    del graph.initializer[:]
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.data", "wb") as data:
        for name in by_layer(tensors):
            values = values_of(tensors[name], read)
            if name in plans:
                if rounding is None or (name == head.input[1] and head_bits == 8):
                    arrays = _rounded(values, *plans[name])
                else:
                    arrays = rounding(name, values).tensors()
                for ending, array in arrays.items():
                    element = onnx.TensorProto.FLOAT16 if half and ending == "scales" else None
                    graph.initializer.append(store(f"{name}/{ending}", array, data, element))
                    if name == head.input[1] and ending.startswith("Q") and TABLE in used:
                        graph.initializer.append(_as_table(graph.initializer[-1]))
                del arrays
            if name in used:
                graph.initializer.append(store(name, values, data, tensors[name].data_type))
            del values  # before the next one is read
    onnx.save(model, str(target))


def _rounded(weights: np.ndarray, bits: int, method: str) -> dict[str, np.ndarray]:
    """Tensors of `Blocks`, whose memory for intermediate values stays small: some columns of [K, N] at a time."""
    columns = max(1, AT_ONCE // len(weights))
    pieces = [weights[:, begin : begin + columns] for begin in range(0, weights.shape[1], columns)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        parts = list(pool.map(lambda piece: rounded(piece, bits, method).tensors(), pieces))
    return {ending: np.concatenate([part[ending] for part in parts]) for ending in parts[0]}


def check_whole_blocks(graph: onnx.GraphProto, names: Collection[str] | None = None) -> None:
    """Raises UserError where a matrix has a number of inputs that BLOCK does not divide. names: of the matrices; None:
    of all that products are taken with."""
    if names is None:
        names = {node.input[1] for node in _products(graph)}
    for tensor in graph.initializer:
        if tensor.name in names and tensor.dims[0] % BLOCK:
            raise UserError(
                f"{tensor.name} has {tensor.dims[0]} inputs, which q4_1 and gptq want to be "
                f"a multiple of {BLOCK}; take int8, or --method rtn of calib.quantize"
            )


def _products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """With matrices of the graph's own."""
    matrices = {tensor.name for tensor in graph.initializer}
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in matrices]


def _take_blocks(
    graph: onnx.GraphProto, plans: dict[str, tuple[int, str]], shapes: dict[str, tuple[int, int]], accuracy_level: int
) -> None:
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
                accuracy_level=accuracy_level,
            )
        )
    del graph.node[:]
    graph.node.extend(nodes)


def _share_embeddings(graph: onnx.GraphProto, head: onnx.NodeProto, shape: tuple[int, int], bits: int) -> None:
    """Where token embeddings are the transposed matrix of the head, look them up in its blocks instead, by the name
    TABLE. Embeddings that are a matrix of their own stay as they are. shape: of the head's matrix, [D, V]."""
    matrix = head.input[1]
    tables = {node.output[0]: node for node in graph.node if node.op_type == "Transpose" and node.input[0] == matrix}
    lookup = next((node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables), None)
    if lookup is None or shape[0] % BLOCK:
        return
    graph.node.remove(tables[lookup.input[0]])
    lookup.CopyFrom(
        helper.make_node(
            "GatherBlockQuantized",
            [TABLE, lookup.input[1], f"{matrix}/scales"],
            list(lookup.output),
            name=lookup.name,
            domain="com.microsoft",
            bits=bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
    )


def _as_table(codes: onnx.TensorProto) -> onnx.TensorProto:
    """The head's codes [V, blocks, bytes], where they lie, as [V, all bytes]: a Reshape would be a copy in memory."""
    table = onnx.TensorProto()
    table.CopyFrom(codes)
    table.name = TABLE
    vocabulary, blocks, size = codes.dims
    table.dims[:] = [vocabulary, blocks * size]
    return table
