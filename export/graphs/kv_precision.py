"""A fused decoder graph with its KV cache in float16, which shares the weights of the one with float32."""

from collections.abc import Iterable
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from runtime.bundle.manifest import half_cache_file
from runtime.graph_io import PAST, PRESENT

QUERY, KEY, VALUE, COS, SIN = 0, 1, 2, 7, 8  # inputs of GroupQueryAttention in the type of its KV cache


def write_half_caches(files: Iterable[Path]) -> list[Path]:
    """Beside each fused graph with a float32 KV cache, the same with a float16 one; returns their files."""
    written: list[Path] = []
    for file in files:
        model = onnx.load(str(file), load_external_data=False)
        if halve_cache(model):
            written.append(file.with_name(half_cache_file(file.name)))
            onnx.save(model, str(written[-1]))
    return written


def halve_cache(model: onnx.ModelProto) -> bool:
    """Let GroupQueryAttention compute in float16 over a KV cache in float16; all else stays in float32. In place.

    Returns False, and changes nothing, where the cache is no float32.
    """
    graph = model.graph
    caches = [value for value in (*graph.input, *graph.output) if value.name.startswith((f"{PAST}.", f"{PRESENT}."))]
    if any(value.type.tensor_type.elem_type != TensorProto.FLOAT for value in caches):
        return False
    for value in caches:
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    cached = {value.name for value in caches}
    for value in [value for value in graph.value_info if value.name in cached]:
        graph.value_info.remove(value)
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


def _cast(source: str, target: str, element: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], f"{target}/Cast", to=element)
