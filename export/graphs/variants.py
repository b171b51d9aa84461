"""Variants of a block-quantized decoder graph that share its weights."""

from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import helper

from export.graphs.block_formats import BLOCK
from export.graphs.kernel_scales import kernel_scales
from export.graphs.load import open_graph
from export.graphs.matmul_nbits import FLOAT_COMPUTE
from export.graphs.store import Read, store

DOMAIN = "convllava"  # of the operators in runtime.kernels


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
    surrounds it. target: a file beside it; codes are those of `source`, scales go to `target`.data.

    Means of blocks become part of BlockMatMul, and two products, SiLU and their multiplication one GatedBlockMatMul.
    Returns False, and writes nothing, where a matrix's inputs are no multiple of a block.
    """
    model, read = open_graph(source)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    _replace_nodes(graph, [_block_matmul(node, makers) for node in graph.node])
    if any(node.op_type == "MatMulNBits" for node in graph.node):
        return False
    with open(f"{target}.data", "wb") as data:
        added = _take_kernel_scales(graph, read, data)
    makers = {name: node for node in graph.node for name in node.output}
    _replace_nodes(graph, [_gated(node, makers) for node in graph.node])
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in [*graph.initializer, *added] if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.save(model, str(target))
    return True


def _take_kernel_scales(graph: onnx.GraphProto, read: Read, data: BinaryIO) -> list[onnx.TensorProto]:
    """Give each BlockMatMul [x, codes, scales, zero points] the inputs [x, codes, kernel's scales, units]. Returns
    these, which are written to `data` one matrix at a time."""
    added: dict[str, onnx.TensorProto] = {}
    for node in graph.node:
        if node.op_type != "BlockMatMul":
            continue
        codes, *given = node.input[1:]
        names = [f"{codes}/kernel_scales", f"{codes}/kernel_units"]
        if names[0] not in added:
            bits, size = (next(a.i for a in node.attribute if a.name == name) for name in ("bits", "K"))
            scales, zeros = read(given[0]), read(given[1]) if len(given) > 1 else None
            stored = read(codes)
            shape = stored.shape[:2]
            zeros = None if zeros is None else zeros.reshape(len(stored), -1)
            arrays = kernel_scales(bits, stored, scales.reshape(shape), zeros, size // BLOCK)
            for name, array in zip(names, arrays, strict=True):
                added[name] = store(name, array, data)
        del node.input[2:]
        node.input.extend(names)
    return list(added.values())


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
    if extended is not None and extended.op_type == "Concat":
        means = makers.get(extended.input[-1])
        if means is not None and means.op_type == "AveragePool":
            inputs, size = extended.input[0], size * BLOCK // (BLOCK + 1)
    is_asymmetric = len(weights) > 2 or inputs != node.input[0]
    if size % BLOCK or attributes["block_size"] != BLOCK or (attributes["bits"] == 8 and is_asymmetric):
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
    weights = [*gate.input[1:], *up.input[1:]]
    gated = helper.make_node("GatedBlockMatMul", [gate.input[0], *weights], list(node.output), node.name, domain=DOMAIN)
    gated.attribute.extend(gate.attribute)
    return gated
