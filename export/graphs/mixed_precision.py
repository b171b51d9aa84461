"""FP32 graph -> FP16 graph, except where FP16 would overflow or lose its weights.

FP16 holds magnitudes up to 65,504. Which tensors of an encoder exceed it (the residual stream of deep stages, sums
inside LayerNorm, the cube inside a tanh-approximated GELU) depends on the weights, so the FP32 graph is run and its
ranges are taken; every node that touches such a tensor keeps computing in FP32, with casts around it. A product with a
weight matrix is the exception: in FP32 its weights would take, and be read at each run in, twice the bytes. It is
computed in FP16 from an input scaled down by a power of two, and scaled back in FP32.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16, convert_np_to_float16

from export.graphs.ranges import (
    inferred_types,
    largest_magnitudes,
    magnitudes_by_layer,
    probe_inputs,
    without_quantisation,
)
from export.graphs.store import Read, values_of
from runtime.errors import UserError
from runtime.graph_io import PAST

LIMIT = 65504 / 4  # inputs that nobody ran may go further than those that were run
SMALLEST, LARGEST = 6e-8, 65504.0  # weights nearer to zero, or further from it, are moved there
CHUNK = 1 << 22  # weights that are converted at a time
LARGEST_WEIGHT_ERROR = 1e-3  # relative; FP16's own rounding is 3e-4, subnormal weights lose more


@dataclass(frozen=True)
class Kept:
    """A node that stays in FP32: its name and operator, what exceeded the limit, and by how much.

    Of a product with a weight matrix, input and result alone stay in FP32, the product is made in FP16 at a safe scale.
    """

    node: str
    operator: str
    reason: str
    value: float


def is_half(model: onnx.ModelProto) -> bool:
    """Whether a graph takes no float32."""
    return all(value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT for value in model.graph.input)


def half_graph(model: onnx.ModelProto, part: str) -> tuple[onnx.ModelProto, list[Kept]]:
    """(the graph in FP16, the nodes that stay in FP32). A graph that takes FP16 already is returned as it is.

    part: encoder or decoder. Raises UserError for a graph that is not finite in FP32.
    """
    if is_half(model):
        return model, []
    try:
        kept = nodes_to_keep(model, probe_inputs(model, part))
    except ValueError as error:
        raise UserError(f"the {part} cannot be built: {error}; its checkpoint is broken") from error
    return to_half(model, kept), kept


def half_decoder(model: onnx.ModelProto, read: Read) -> tuple[onnx.ModelProto, Read]:
    """(a decoder in FP16, the reader of its weights), found out with the weights of one layer in memory.

    Args:
        model: in FP32; its weights need no values.
        read: of those.

    Raises:
        UserError: a graph that is not finite in FP32.
    """
    (feed,) = probe_inputs(model, "decoder")
    feed = {name: value for name, value in feed.items() if not name.startswith(PAST)}
    errors = {
        tensor.name: _weight_error(values_of(tensor, read))
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }
    try:
        kept = _kept(model, magnitudes_by_layer(model, feed, read), errors)
    except ValueError as error:
        raise UserError(f"the decoder cannot be built: {error}; its checkpoint is broken") from error
    half = to_half(model, kept, errors)
    halves = {tensor.name for tensor in half.graph.initializer if tensor.data_type == TensorProto.FLOAT16}

    def converted(name: str) -> np.ndarray:
        values = read(name)
        if name not in halves:
            return values
        rows = max(1, CHUNK * len(values) // values.size)
        parts = [values[begin : begin + rows].astype(np.float32) for begin in range(0, len(values), rows)]
        return np.concatenate([convert_np_to_float16(part, SMALLEST, LARGEST) for part in parts])

    return half, converted


def nodes_to_keep(model: onnx.ModelProto, inputs: list[dict[str, np.ndarray]]) -> list[Kept]:
    """The nodes of the FP32 `model` that must not compute in FP16, found by running it on `inputs`.

    inputs: one feed for each run. Raises ValueError where a tensor is NaN or infinite in FP32 already, naming it.
    """
    plain, aliases = without_quantisation(model)
    ranges = largest_magnitudes(plain, inputs)
    ranges |= {name: ranges[of] for name, of in aliases.items() if of in ranges}
    return _kept(model, ranges, _weight_errors(model.graph))


def _kept(model: onnx.ModelProto, ranges: dict[str, float], errors: dict[str, float]) -> list[Kept]:
    """ranges: of tensors, see `export.graphs.ranges`. errors: of weights, what float16 loses."""
    errors, kept = dict(errors), []
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in errors:
            errors[node.output[0]] = errors[node.input[0]]
        reasons = [(f"|{name}|", ranges[name]) for name in (*node.input, *node.output) if name in ranges]
        if node.op_type == "LayerNormalization":
            reasons.append(("sum of squares", ranges[f"{node.name}/sum_of_squares"]))
        if node.op_type == "Gelu" and _attribute(node, "approximate") == b"tanh":
            reasons.append(("cube of the input", ranges.get(node.input[0], 0.0) ** 3))
        what, value = max(reasons, key=lambda reason: reason[1], default=("", 0.0))
        error = max((errors.get(name, 0.0) for name in node.input), default=0.0)
        if value > LIMIT:
            kept.append(Kept(node.name, node.op_type, what, value))
        elif error > LARGEST_WEIGHT_ERROR:
            kept.append(Kept(node.name, node.op_type, "relative error of the weights in FP16", error))
    return kept


def to_half(model: onnx.ModelProto, kept: list[Kept], errors: dict[str, float] | None = None) -> onnx.ModelProto:
    """The graph with FP16 weights, inputs and outputs, the nodes in `kept` in FP32. `model` is not changed.

    Q/DQ nodes get FP16 scales, so that what lies between them and the next layer is FP16 too.

    Args:
        errors: what float16 loses of each weight, where weights have no values; they change their type alone.
    """
    model = copy.deepcopy(model)
    in_fp32 = _scale_products(model.graph, kept, _weight_errors(model.graph) if errors is None else errors)
    types = inferred_types(model)
    # The converter looks at values even where it needs a type alone
    shapes = {
        t.name: list(t.dims) for t in model.graph.initializer if errors is not None and not t.HasField("raw_data")
    }
    for tensor in model.graph.initializer:
        if tensor.name in shapes:
            tensor.dims[:] = [0]
    del model.graph.value_info[:]
    model.graph.value_info.extend(types)
    blocked = [op for op in DEFAULT_OP_BLOCK_LIST if op not in ("QuantizeLinear", "DequantizeLinear", "TopK")]
    half = convert_float_to_float16(
        model,
        min_positive_val=SMALLEST,
        max_finite_val=LARGEST,
        disable_shape_infer=True,
        op_block_list=blocked,
        node_block_list=in_fp32,
    )
    for tensor in half.graph.initializer:
        if tensor.name in shapes:
            tensor.dims[:] = shapes[tensor.name]
    del half.graph.value_info[:]  # they name types of before
    _drop_round_trips(half.graph)
    return half


def _scale_products(graph: onnx.GraphProto, kept: list[Kept], errors: dict[str, float]) -> list[str]:
    """Put each kept product with a weight matrix between two scalings; returns the nodes that have to be in FP32.
    errors: what float16 loses of each weight."""
    errors = dict(errors)
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in errors:
            errors[node.output[0]] = errors[node.input[0]]
    kept_by_name = {keep.node: keep for keep in kept}
    in_fp32, nodes = [], []
    for node in graph.node:
        keep = kept_by_name.get(node.name)
        error = errors.get(node.input[1]) if node.op_type == "MatMul" else None
        if keep is None or error is None or error > LARGEST_WEIGHT_ERROR:
            nodes.append(node)
            in_fp32 += [node.name] if keep else []
            continue
        down, up, scaled, product = (f"{node.name}/{what}" for what in ("scale_down", "scale_up", "scaled", "product"))
        scale = 2.0 ** math.ceil(math.log2(keep.value / LIMIT))
        for name, factor in ((down, 1 / scale), (up, scale)):
            graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), name))
        before = helper.make_node("Mul", [node.input[0], down], [scaled], name=down)
        after = helper.make_node("Mul", [product, up], [node.output[0]], name=up)
        node.input[0], node.output[0] = scaled, product
        nodes += [before, node, after]
        in_fp32 += [down, up]
    nodes = [copy.deepcopy(node) for node in nodes]  # emptying the graph would empty those it holds
    del graph.node[:]
    graph.node.extend(nodes)
    return in_fp32


def _drop_round_trips(graph: onnx.GraphProto) -> None:
    """The converter puts casts around each node that stays in FP32, also between two of them, and there a value passes
    through FP16 that may not fit it. Let the second one read what the first one wrote."""
    # By the converter's names: a cast that was there before may come from any type
    to_half = {node.output[0]: node.input[0] for node in graph.node if node.name.endswith("_cast_to_fp16_node")}
    back = [node for node in graph.node if node.name.endswith("_cast_to_fp32_node") and node.input[0] in to_half]
    direct = {node.output[0]: to_half[node.input[0]] for node in back}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = direct.get(name, name)
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    idle = (*direct, *to_half)
    nodes = [copy.deepcopy(node) for node in graph.node if node.output[0] in used or node.output[0] not in idle]
    del graph.node[:]
    graph.node.extend(nodes)


def cast_embeds(model: onnx.ModelProto, dtype: str) -> None:
    """Let image_embeds, an input or output, be of `dtype` (a numpy name), whatever the graph computes in; in place."""
    graph, element = model.graph, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inner = "image_embeds/inner"
    value = next(value for value in (*graph.input, *graph.output) if value.name == "image_embeds")
    if (found := value.type.tensor_type.elem_type) == element:
        return
    value.type.tensor_type.elem_type = element
    is_input = value in graph.input
    for node in graph.node:
        names = node.input if is_input else node.output
        for index, name in enumerate(names):
            if name == "image_embeds":
                names[index] = inner
    ends, to = (["image_embeds", inner], found) if is_input else ([inner, "image_embeds"], element)
    cast = helper.make_node("Cast", ends[:1], ends[1:], name="image_embeds/Cast", to=to)
    graph.node.insert(0 if is_input else len(graph.node), cast)


def _weight_errors(graph: onnx.GraphProto) -> dict[str, float]:
    """Relative error of each FP32 initializer that float16 rounds."""
    return {
        t.name: _weight_error(numpy_helper.to_array(t)) for t in graph.initializer if t.data_type == TensorProto.FLOAT
    }


def _weight_error(weights: np.ndarray) -> float:
    lost = norm = 0.0
    for begin in range(0, weights.size, CHUNK):
        part = weights.reshape(-1)[begin : begin + CHUNK].astype(np.float32)
        with np.errstate(over="ignore"):
            rounded = part.astype(np.float16).astype(np.float32)
        lost += float(np.square(rounded - part, dtype=np.float64).sum())
        norm += float(np.square(part, dtype=np.float64).sum())
    return math.sqrt(lost / norm) if norm else 0.0


def _attribute(node: onnx.NodeProto, name: str):
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
