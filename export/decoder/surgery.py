"""Additions to a decoder graph: image embeddings as input, the greedy token as output."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from runtime.graph_io import NEXT_TOKEN


def merge_image_embeds(model: onnx.ModelProto) -> None:
    """Give a token-id decoder the input image_embeds [num_image_embeds, hidden], in place.

    Where input_ids [B, S] is below 0, row -1 - id of image_embeds takes the token embedding's place. Finds the one
    node that looks `input_ids` up in the embedding table, and the Cast behind it if there is one; raises ValueError if
    there is not exactly one.
    """
    graph = model.graph
    lookups = [
        node for node in graph.node if node.op_type in ("Gather", "GatherBlockQuantized") and "input_ids" in node.input
    ]
    if len(lookups) != 1:
        raise ValueError(f"expected one look-up of input_ids in the embedding table, found {len(lookups)}")
    lookup = lookups[0]
    hidden, element = _hidden_size(graph), _float_type(graph)
    cast = next((node for node in graph.node if node.op_type == "Cast" and node.input[0] == lookup.output[0]), None)
    last = cast or lookup
    merged, last.output[0] = last.output[0], "image_merge/token_embeds"
    lookup.input[list(lookup.input).index("input_ids")] = "image_merge/token_ids"
    constants = {
        "image_merge/zero": np.array(0, np.int64),
        "image_merge/minus_one": np.array(-1, np.int64),
        "image_merge/last_axis": np.array([-1], np.int64),
        "image_merge/blank": np.zeros((1, hidden), helper.tensor_dtype_to_np_dtype(element)),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    n = "image_merge/{}".format
    before = [
        helper.make_node("Less", ["input_ids", n("zero")], [n("is_image")]),
        helper.make_node("Where", [n("is_image"), n("zero"), "input_ids"], [n("token_ids")]),
    ]
    after = [
        helper.make_node("Sub", [n("minus_one"), "input_ids"], [n("row_of_id")]),
        helper.make_node("Where", [n("is_image"), n("row_of_id"), n("zero")], [n("row")]),
        # The blank row keeps the look-up valid where there is no image at all
        helper.make_node("Concat", ["image_embeds", n("blank")], [n("rows")], axis=0),
        helper.make_node("Gather", [n("rows"), n("row")], [n("embeds")], axis=0),  # [B, S, hidden]
        helper.make_node("Unsqueeze", [n("is_image"), n("last_axis")], [n("is_image_row")]),
        helper.make_node("Where", [n("is_image_row"), n("embeds"), n("token_embeds")], [merged]),
    ]
    nodes = list(graph.node)
    end = nodes.index(last)
    for node in before + after:
        node.name = node.output[0] + "/" + node.op_type
    del graph.node[:]
    graph.node.extend([*before, *nodes[: end + 1], *after, *nodes[end + 1 :]])
    graph.input.insert(1, helper.make_tensor_value_info("image_embeds", element, ["num_image_embeds", hidden]))


def add_next_token(model: onnx.ModelProto) -> None:
    """Give a decoder the output next_token [batch, 1, 1] int64, the likeliest by logits [batch, 1, vocab], in place.

    So that greedy decoding takes one number off the device at each step instead of all logits. Of equal logits the
    lowest id wins. TopK rather than ArgMax, because ONNX Runtime has it for float16 on CUDA.
    """
    one = numpy_helper.from_array(np.array([1], np.int64), "next_token/one")
    model.graph.initializer.append(one)
    model.graph.node.append(
        helper.make_node("TopK", ["logits", one.name], ["next_token/logit", NEXT_TOKEN], name="next_token/TopK")
    )
    model.graph.output.append(helper.make_tensor_value_info(NEXT_TOKEN, onnx.TensorProto.INT64, ["batch_size", 1, 1]))


def _hidden_size(graph: onnx.GraphProto) -> int:
    """From the final or first normalisation's weight, which every Llama graph keeps as a vector of that length."""
    for tensor in graph.initializer:
        if tensor.name.endswith(("input_layernorm.weight", "norm.weight")) and len(tensor.dims) == 1:
            return tensor.dims[0]
    raise ValueError("no layer norm weight in the graph to read the hidden size from")


def _float_type(graph: onnx.GraphProto) -> int:
    return next(value for value in graph.input if value.name.startswith("past_key")).type.tensor_type.elem_type
