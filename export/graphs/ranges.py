"""How large the values inside a float32 graph become: it is run, with probes, and they are looked at."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from export.graphs.layers import Feed, Run, run_by_layer
from export.graphs.store import Read

SIDE = 512  # pixels of the images that an encoder is run on
PROMPT = 64  # tokens that a decoder is run on
MASKED = 1e30  # beyond it lie an attention mask's values alone


def probe_inputs(model: onnx.ModelProto, part: str) -> list[dict[str, np.ndarray]]:
    """Noise, a gradient and black: normalised pixels of all frequencies; for a decoder, a prompt of random tokens."""
    random = np.random.default_rng(0)
    if part == "encoder":
        shape = (1, 3, SIDE, SIDE)
        ramp = np.broadcast_to(np.linspace(-1.8, 2.2, SIDE, dtype=np.float32), shape)
        images = [random.standard_normal(shape, dtype=np.float32), np.ascontiguousarray(ramp), np.full_like(ramp, -1.8)]
        return [{"pixel_values": image} for image in images]
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in model.graph.input}
    vocab = next(v for v in model.graph.output if v.name == "logits").type.tensor_type.shape.dim[2].dim_value
    length, feed = min(PROMPT, shapes["past_key_values.0.key"][2]), {}
    for name, shape in shapes.items():
        if name.startswith("past_key_values"):
            feed[name] = np.zeros((1, *shape[1:]), np.float32)
        elif name == "image_embeds":
            feed[name] = random.standard_normal((1, shape[1]), dtype=np.float32)
        elif name == "input_ids":
            feed[name] = random.integers(0, vocab, (1, length))
        else:
            feed[name] = np.zeros(1, np.int64)  # write_indices: the cache is empty
    return [feed]


def largest_magnitudes(model: onnx.ModelProto, inputs: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Largest magnitude of each float tensor that a node makes, and the largest sum of squares of each LayerNorm.

    Raises ValueError where an output is NaN or infinite, naming the first tensor that is.
    """
    probe, names = _with_probes(model)
    found = []
    with _session(probe) as session:
        for feed in inputs:
            *outputs, maximum = map(np.asarray, session.run(None, feed))
            found.append(maximum)
            if not all(np.isfinite(value).all() for value in outputs):
                raise ValueError(f"{_first_not_finite(model, feed)} is not finite in FP32 already")
    found = dict(zip(names, np.max(found, axis=0).tolist(), strict=True))
    return _without_masks(model, found)


def magnitudes_by_layer(model: onnx.ModelProto, feed: Feed, read: Read) -> dict[str, float]:
    """As `largest_magnitudes`, of a decoder with an empty KV cache: one layer after the other.

    Args:
        model: its weights need no values.
        feed: inputs but the KV cache.
        read: values of a weight that has none.
    """
    magnitudes: dict[str, float] = {}

    def opened(piece: onnx.ModelProto) -> Run:
        for tensor in piece.graph.initializer:
            if not tensor.HasField("raw_data"):
                tensor.raw_data = np.asarray(read(tensor.name), np.float32, order="C").tobytes()
        types = onnx.shape_inference.infer_shapes(_without_weights(piece)).graph.output
        for value, inferred in zip(piece.graph.output, types, strict=True):
            value.type.CopyFrom(inferred.type)
        probe, names = _with_probes(piece)

        def run(feed: Feed) -> list[np.ndarray]:
            with _session(probe) as session:
                *outputs, maxima = map(np.asarray, session.run(None, feed))
            magnitudes.update(zip(names, maxima.tolist(), strict=True))
            if not all(np.isfinite(value).all() for value in outputs):
                raise ValueError(f"{_first_not_finite(piece, feed)} is not finite in FP32 already")
            return outputs

        return run

    for _ in run_by_layer(model, [feed], opened):
        pass
    return _without_masks(model, magnitudes)


def _without_masks(model: onnx.ModelProto, magnitudes: dict[str, float]) -> dict[str, float]:
    """With 0 for the minus infinity of attention's masks, which FP16 has too."""
    if not any(node.op_type in ("Softmax", "Attention") for node in model.graph.node):
        return magnitudes
    return {name: 0.0 if value > MASKED else value for name, value in magnitudes.items()}


def _with_probes(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """(a copy with one output more, what each of its values is of)."""
    probe = copy.deepcopy(model)
    graph = probe.graph
    types = {v.name: v.type.tensor_type.elem_type for v in inferred_types(model)}
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
    return probe, names


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
    inferred = inferred_types(model)
    types = {value.name: value for value in inferred if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    names = [name for node in model.graph.node for name in node.output if name in types]
    probe.graph.output.extend(types[name] for name in names)
    with _session(probe) as session:
        for name, value in zip(names, session.run(names, feed), strict=True):
            if not np.isfinite(np.asarray(value)).all():
                return name
    return model.graph.output[0].name


def without_quantisation(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """(the same graph in float, dequantised value -> what it was before it was quantised).

    Rounding does not move a range.
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


def inferred_types(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
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
