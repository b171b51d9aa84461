"""A fused decoder graph with its KV cache in float16 or int8, which shares the weights of the one with float32."""

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from export.graphs.variants import DOMAIN
from runtime.bundle.manifest import KV_SCALE_BYTES, cache_file
from runtime.graph_io import PAST, PRESENT

INPUTS = 9  # of GroupQueryAttention with rotary embeddings
QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, LAST, _, COS, SIN = range(INPUTS)
HEAD_MULTIPLE, MAX_HEAD_DIM = 16, 256  # of the heads that CachedAttention takes


def write_cache_variants(files: Iterable[Path], kv_dtype: str) -> list[Path]:
    """Beside each fused graph with a float32 KV cache, the same with one in float16 or int8, a key of
    `runtime.bundle.manifest.CACHE_SUFFIXES`; returns their files."""
    rewrite = {"float16": halve_cache, "int8": quantize_cache}[kv_dtype]
    written: list[Path] = []
    for file in files:
        model = onnx.load(str(file), load_external_data=False)
        if rewrite(model):
            written.append(file.with_name(cache_file(file.name, kv_dtype)))
            onnx.save(model, str(written[-1]))
    return written


def halve_cache(model: onnx.ModelProto) -> bool:
    """Let GroupQueryAttention compute in float16 over a KV cache in float16; all else stays in float32. In place.

    Returns False, and changes nothing, where the cache is no float32.
    """
    graph = model.graph
    if (caches := _float_caches(graph)) is None:
        return False
    _retype(graph, caches, TensorProto.FLOAT16, _head_dim(caches))
    tables: set[str] = set()  # rotary ones that were converted, for all layers
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            nodes.append(node)
            continue
        for index in (QUERY, KEY, VALUE, COS, SIN):
            name = node.input[index] if index < len(node.input) else ""
            if name and name not in tables:
                nodes.append(_cast(name, f"{name}/half", TensorProto.FLOAT16))
                tables.update({name} if index in (COS, SIN) else ())
            if name:
                node.input[index] = f"{name}/half"
        output, node.output[0] = node.output[0], f"{node.output[0]}/half"
        nodes += [node, _cast(node.output[0], output, TensorProto.FLOAT)]
    graph.ClearField("node")
    graph.node.extend(nodes)
    return True


def quantize_cache(model: onnx.ModelProto) -> bool:
    """CachedAttention of `runtime.kernels` over a KV cache in int8 in place of GroupQueryAttention. In place.

    A key or value is its int8 codes and, in four bytes behind them, their scale.

    Returns False, and changes nothing, where the cache is no float32, or CachedAttention does not take such heads or
    inputs.
    """
    graph = model.graph
    if (caches := _float_caches(graph)) is None:
        return False
    head_dim = _head_dim(caches)
    given = [list(node.input) for node in graph.node if node.op_type == "GroupQueryAttention"]
    if not 0 < head_dim <= MAX_HEAD_DIM or head_dim % HEAD_MULTIPLE:
        return False
    if any(len(inputs) != INPUTS or inputs[KEY] or inputs[VALUE] for inputs in given):
        return False
    _retype(graph, caches, TensorProto.INT8, head_dim + KV_SCALE_BYTES)
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            inputs = [node.input[index] for index in (QUERY, PAST_KEY, PAST_VALUE, LAST, COS, SIN)]
            heads = {a.name: a.i for a in node.attribute if a.name in ("num_heads", "kv_num_heads")}
            outputs = list(node.output)
            node.CopyFrom(helper.make_node("CachedAttention", inputs, outputs, node.name, domain=DOMAIN, **heads))
    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return True


def _float_caches(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto] | None:
    """The KV cache's inputs and outputs; None where they are no float32."""
    caches = [value for value in (*graph.input, *graph.output) if value.name.startswith((f"{PAST}.", f"{PRESENT}."))]
    if any(value.type.tensor_type.elem_type != TensorProto.FLOAT for value in caches):
        return None
    return caches


def _head_dim(caches: list[onnx.ValueInfoProto]) -> int:
    return caches[0].type.tensor_type.shape.dim[3].dim_value


def _retype(graph: onnx.GraphProto, caches: list[onnx.ValueInfoProto], element: int, width: int) -> None:
    for value in caches:
        value.type.tensor_type.elem_type = element
        value.type.tensor_type.shape.dim[3].dim_value = width
    cached = {value.name for value in caches}
    for value in [value for value in graph.value_info if value.name in cached]:
        graph.value_info.remove(value)


def _cast(source: str, target: str, element: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}/Cast", to=element)
