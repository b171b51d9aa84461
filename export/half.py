"""FP32 graph -> FP16 graph, except where FP16 would overflow or lose its weights.

FP16 holds magnitudes up to 65,504. Which tensors of an encoder exceed it (the residual stream of deep stages, sums
inside LayerNorm, the cube inside a tanh-approximated GELU) depends on the weights, so the FP32 graph is run and its
ranges are taken; every node that touches such a tensor keeps computing in FP32, with casts around it. A product with a
weight matrix is the exception: in FP32 its weights would take, and be read at each run in, twice the bytes. It is
computed in FP16 from an input scaled down by a power of two, and scaled back in FP32.
"""

import contextlib
import copy
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

LIMIT = 65504 / 4  # inputs that nobody ran may go further than those that were run
MASKED = 1e30
LARGEST_WEIGHT_ERROR = 1e-3  # relative; FP16's own rounding is 3e-4, subnormal weights lose more
WEIGHT_ERROR = "relative error of the weights in FP16"


@dataclass(frozen=True)
class Kept:
    """A node that stays in FP32: its name and operator, what exceeded the limit, and by how much.

    Of a product with a weight matrix, input and result alone stay in FP32, the product is made in FP16 at a safe scale.
    """

    node: str
    operator: str
    reason: str
    value: float


def nodes_to_keep(model: onnx.ModelProto, inputs: list[dict[str, np.ndarray]]) -> list[Kept]:
    """The nodes of the FP32 `model` that must not compute in FP16, found by running it on `inputs`.

    inputs: one feed for each run. Raises ValueError where a tensor is NaN or infinite in FP32 already, naming it.
    """
    plain, aliases = _without_quantisation(model)
    ranges = _ranges(plain, inputs)
    ranges |= {name: ranges[of] for name, of in aliases.items() if of in ranges}
    errors = _weight_errors(model.graph)
    kept = []
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
            kept.append(Kept(node.name, node.op_type, WEIGHT_ERROR, error))
    return kept


def to_half(model: onnx.ModelProto, kept: list[Kept]) -> onnx.ModelProto:
    """The graph with FP16 weights, inputs and outputs, the nodes in `kept` in FP32. `model` is not changed.

    Q/DQ nodes get FP16 scales, so that what lies between them and the next layer is FP16 too.
    """
    model = copy.deepcopy(model)
    in_fp32 = _scale_products(model.graph, kept)
    types = _inferred(model)
    del model.graph.value_info[:]
    model.graph.value_info.extend(types)
    blocked = [op for op in DEFAULT_OP_BLOCK_LIST if op not in ("QuantizeLinear", "DequantizeLinear", "TopK")]
    half = convert_float_to_float16(
        model,
        min_positive_val=6e-8,
        max_finite_val=65504.0,
        disable_shape_infer=True,
        op_block_list=blocked,
        node_block_list=in_fp32,
    )
    del half.graph.value_info[:]  # they name types of before
    _drop_round_trips(half.graph)
    return half


def _scale_products(graph: onnx.GraphProto, kept: list[Kept]) -> list[str]:
    """Put each kept product with a weight matrix between two scalings; returns the nodes that have to be in FP32."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    kept_by_name = {keep.node: keep for keep in kept}
    in_fp32, nodes = [], []
    for node in graph.node:
        keep = kept_by_name.get(node.name)
        weights = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if keep is None or weights is None or _weight_error(weights) > LARGEST_WEIGHT_ERROR:
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


def _without_quantisation(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """(the same graph in float, dequantised value -> what it was before it was quantised).

    Rounding does not move a range, and ONNX Runtime's CPU provider computes nothing in FP8.
    """
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    quantised = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    pairs = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    if not pairs:
        return model, {}
    aliases, plain = {}, copy.deepcopy(model)
    for node in pairs:
        if node.input[0] in quantised:
            aliases[node.output[0]] = quantised[node.input[0]]
        else:
            weights, scale = (numpy_helper.to_array(values[name]).astype(np.float32) for name in node.input[:2])
            if scale.ndim:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % weights.ndim
                scale = scale.reshape([-1 if i == axis else 1 for i in range(weights.ndim)])
            plain.graph.initializer.append(numpy_helper.from_array(weights * scale, node.output[0]))
    nodes = [copy.deepcopy(n) for n in plain.graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    del plain.graph.node[:]
    plain.graph.node.extend(nodes)
    for node in plain.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = aliases.get(name, name)
    used = {name for node in plain.graph.node for name in node.input}
    kept = [tensor for tensor in plain.graph.initializer if tensor.name in used]
    del plain.graph.initializer[:]
    plain.graph.initializer.extend(kept)
    return plain, aliases


def _ranges(model: onnx.ModelProto, inputs: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Largest magnitude of each float tensor that a node makes, and the largest sum of squares of each LayerNorm."""
    probe = copy.deepcopy(model)
    graph = probe.graph
    types = {v.name: v.type.tensor_type.elem_type for v in _inferred(model)}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.output}
    names, maxima = [], []

    def add(name: str, magnitude: str) -> None:
        maximum = f"range/{len(names)}"
        graph.node.append(helper.make_node("ReduceMax", [magnitude], [maximum], keepdims=0))
        graph.node.append(helper.make_node("Reshape", [maximum, "range/one"], [f"{maximum}/1"]))
        names.append(name)
        maxima.append(f"{maximum}/1")

    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "range/one"))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "range/last"))
    for node in list(graph.node):
        for name in node.output:
            if types.get(name) == TensorProto.FLOAT:
                graph.node.append(helper.make_node("Abs", [name], [f"range/{name}/abs"]))
                add(name, f"range/{name}/abs")
        if node.op_type == "LayerNormalization":
            source = f"range/{node.name}"
            graph.node.append(helper.make_node("ReduceMean", [node.input[0], "range/last"], [f"{source}/mean"]))
            graph.node.append(helper.make_node("Sub", [node.input[0], f"{source}/mean"], [f"{source}/centred"]))
            graph.node.append(
                helper.make_node("ReduceSumSquare", [f"{source}/centred", "range/last"], [f"{source}/squares"])
            )
            add(f"{node.name}/sum_of_squares", f"{source}/squares")
    graph.node.append(helper.make_node("Concat", maxima, ["range/all"], axis=0))
    graph.output.append(helper.make_tensor_value_info("range/all", TensorProto.FLOAT, [len(names)]))
    found = []
    with _session(probe) as session:
        for feed in inputs:
            *outputs, maximum = session.run(None, feed)
            found.append(maximum)
            if not all(np.isfinite(value).all() for value in outputs):
                raise ValueError(f"{_first_not_finite(model, feed)} is not finite in FP32 already")
    found = np.max(found, axis=0)
    if any(node.op_type in ("Softmax", "Attention") for node in model.graph.node):
        found[found > MASKED] = 0  # of attention's masks, whose minus infinity FP16 has too
    return dict(zip(names, found.tolist(), strict=True))


@contextlib.contextmanager
def _session(model: onnx.ModelProto) -> Iterator[onnxruntime.InferenceSession]:
    """By way of a file, because one protobuf holds 2 GB and a large model does not fit."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "model.onnx"))
        onnx.save(model, file, save_as_external_data=True, location="model.data")
        yield onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _first_not_finite(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> str:
    """Name of the first tensor of the graph with a NaN or an infinity in it."""
    probe = copy.deepcopy(model)
    types = {value.name: value for value in _inferred(model) if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    names = [name for node in model.graph.node for name in node.output if name in types]
    probe.graph.output.extend(types[name] for name in names)
    with _session(probe) as session:
        for name, value in zip(names, session.run(names, feed), strict=True):
            if not np.isfinite(value).all():
                return name
    return model.graph.output[0].name


def _weight_errors(graph: onnx.GraphProto) -> dict[str, float]:
    """Relative error of each FP32 initializer that float16 rounds."""
    return {t.name: _weight_error(t) for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _weight_error(tensor: TensorProto) -> float:
    weights = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        rounded = weights.astype(np.float16).astype(np.float32)
    norm = float(np.linalg.norm(weights))
    return float(np.linalg.norm(rounded - weights)) / norm if norm else 0.0


def _inferred(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return list(onnx.shape_inference.infer_shapes(_without_weights(model)).graph.value_info)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose matrices are inputs: types can be inferred all the same, and it fits one protobuf."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1:
            light.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            light.graph.initializer.append(tensor)
    return light


def _attribute(node: onnx.NodeProto, name: str):
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
