"""A decoder graph run layer by layer, all calls through one layer at a time: memory for its weights is enough."""

import re
from collections.abc import Callable, Collection, Iterator

import numpy as np
import onnx
from onnx import helper

from runtime.graph_io import PAST, PRESENT

LAYER = re.compile(rf"(?:\blayers|{PRESENT})\.(\d+)\b")  # in the names of a layer's tensors

Feed = dict[str, np.ndarray]
Run = Callable[[Feed], list[np.ndarray]]  # a piece's inputs -> its outputs in their order


def layers_of(model: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """The nodes before the first layer, those of each layer, those after the last."""
    layers = sum(value.name.startswith(PAST) for value in model.graph.input) // 2
    pieces: list[list[onnx.NodeProto]] = [[] for _ in range(layers + 2)]
    piece_of = {}
    for node in model.graph.node:
        found = next((match for name in node.output if (match := LAYER.search(name))), None)
        if found:
            piece = min(int(found[1]), layers) + 1
        else:  # what belongs to no layer follows them if it reads from one
            piece = layers + 1 if any(piece_of.get(name) for name in node.input) else 0
        piece_of |= dict.fromkeys(node.output, piece)
        pieces[piece].append(node)
    return pieces


def run_by_layer(
    model: onnx.ModelProto,
    feeds: list[Feed],
    open_piece: Callable[[onnx.ModelProto], Run],
    wanted: Collection[str] = (),
) -> Iterator[list[Feed]]:
    """Run a decoder graph on calls that follow each other, one piece for all of them at a time.

    Args:
        model: its weights may lie elsewhere.
        feeds: inputs of each call, without the KV cache, which is empty at first.
        open_piece: makes a runnable of a graph of some of the nodes.
        wanted: names of inner tensors to be given as well.

    Yields:
        after each piece, for each call, the tensors that later pieces read, outputs of the graph and `wanted` ones;
        keys and values not among them.
    """
    pieces = layers_of(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    graph_inputs = {value.name: value for value in model.graph.input}
    needed = {value.name for value in model.graph.output} | set(wanted)
    last_use = {name: i for i, nodes in enumerate(pieces) for node in nodes for name in node.input}
    calls = [dict(feed) for feed in feeds]
    for index, nodes in enumerate(pieces):
        made = {name for node in nodes for name in node.output if name}
        read = {name for node in nodes for name in node.input if name and name not in made}
        outputs = sorted(name for name in made if name in needed or last_use.get(name, 0) > index)
        inputs = sorted(read - weights.keys())
        cache = {name: _empty(graph_inputs[name]) for name in inputs if name.startswith(PAST)}
        piece = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
        piece.graph.name = f"piece {index}"
        piece.graph.node.extend(nodes)
        piece.graph.initializer.extend(weights[name] for name in sorted(read & weights.keys()))
        for name in inputs:
            value = (cache if name in cache else calls[0])[name]
            element = helper.np_dtype_to_tensor_dtype(value.dtype)
            piece.graph.input.append(helper.make_tensor_value_info(name, element, [None] * value.ndim))
        piece.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        run = open_piece(piece)
        for call in calls:
            feed = {name: (cache if name in cache else call)[name] for name in inputs}
            found = dict(zip(outputs, run(feed), strict=True))
            cache |= {PAST + name[len(PRESENT) :]: found.pop(name) for name in outputs if name.startswith(PRESENT)}
            call |= found
        del run, cache
        yield calls
        for call in calls:
            for name in [name for name in call if last_use.get(name, 0) <= index]:
                del call[name]


def _empty(value: onnx.ValueInfoProto) -> np.ndarray:
    """A KV cache for one sequence: without positions, or all of a fixed capacity at zero."""
    kind = value.type.tensor_type
    dims = [dim.dim_value for dim in kind.shape.dim[1:]]
    return np.zeros((1, *dims), helper.tensor_dtype_to_np_dtype(kind.elem_type))
