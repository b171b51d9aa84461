"""Sampling as a graph of its own: logits -> a drawn token, for decoding that stays on a GPU.

What `runtime.generate.sampler` computes for temperature, top-k and top-p, operator by operator in float64: the
same random number gives the same token, but where it falls between the last bits of a sum. Shapes are fixed and nothing
is computed on the host, so that ONNX Runtime can record it as a CUDA graph.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.graph_io import NEXT_TOKEN

OPSET = 18
ROW = 256  # entries that are summed up one by one: ONNX Runtime's CumSum on CUDA adds up each prefix anew
# input -> element type, all of shape [1]
SETTINGS = {
    "temperature": TensorProto.DOUBLE,
    "top_k": TensorProto.INT64,
    "top_p": TensorProto.DOUBLE,
    "random": TensorProto.DOUBLE,
}


def sampler_graph(vocab_size: int, logits_dtype: str) -> onnx.ModelProto:
    """logits [1, 1, V] of numpy's type `logits_dtype`, and `SETTINGS` -> next_token [1, 1, 1] int64.

    temperature: above 0. top_k: 1 to V; V leaves all. top_p: above 0, at most 1. random: the draw, uniform in [0, 1).
    The token is V where a logit is not a number.
    """
    rows = -(-vocab_size // ROW)
    constants = {
        "vocabulary": np.array([vocab_size], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([vocab_size - 1], np.int64),
        "last_column": np.array([ROW - 1], np.int64),
        "one": np.array([1], np.int64),
        "row_axis": np.array(0, np.int64),
        "column_axis": np.array(1, np.int64),
        "nothing": np.array([0.0]),
        "nowhere": np.zeros(vocab_size),
        "padding": np.zeros(rows * ROW - vocab_size),
        "table": np.array([rows, ROW], np.int64),
        "all": np.array([-1], np.int64),
        "entries": np.array(float(vocab_size)),
        "token_shape": np.array([1, 1, 1], np.int64),
    }
    node = helper.make_node

    def summed(source: str, target: str) -> list[onnx.NodeProto]:
        """target: the sum of each entry of `source` [V] and those before it."""
        n = f"{target}/{{}}".format
        return [
            node("Concat", [source, "padding"], [n("padded")], axis=0),
            node("Reshape", [n("padded"), "table"], [n("rows")]),
            node("CumSum", [n("rows"), "column_axis"], [n("in_row")]),
            node("Gather", [n("in_row"), "last_column"], [n("row_sums")], axis=1),
            node("CumSum", [n("row_sums"), "row_axis"], [n("rows_before")], exclusive=1),
            node("Add", [n("in_row"), n("rows_before")], [n("sums")]),
            node("Reshape", [n("sums"), "all"], [n("flat")]),
            node("Slice", [n("flat"), "first", "vocabulary"], [target]),
        ]

    nodes = [
        node("Reshape", ["logits", "vocabulary"], ["flat"]),
        # From here on in falling order
        node("TopK", ["flat", "vocabulary"], ["sorted", "order"], axis=0),
        node("Cast", ["sorted"], ["falling"], to=TensorProto.DOUBLE),
        node("Gather", ["falling", "first"], ["likeliest"]),
        node("Sub", ["falling", "likeliest"], ["below"]),
        node("Div", ["below", "temperature"], ["scaled"]),
        node("Sub", ["top_k", "one"], ["rank"]),
        node("Gather", ["scaled", "rank"], ["least"]),
        node("GreaterOrEqual", ["scaled", "least"], ["among_top_k"]),
        node("Exp", ["scaled"], ["weights"]),
        node("Where", ["among_top_k", "weights", "nothing"], ["kept_weights"]),
        node("ReduceSum", ["kept_weights", "first"], ["sum_of_weights"]),
        node("Div", ["kept_weights", "sum_of_weights"], ["probabilities"]),
        *summed("probabilities", "reached"),
        node("Sub", ["reached", "probabilities"], ["before"]),
        node("Less", ["before", "top_p"], ["among_top_p"]),
        node("Where", ["among_top_p", "probabilities", "nothing"], ["kept"]),
        # Back to the order of ids, in which the host draws
        node("ScatterElements", ["nowhere", "order", "kept"], ["by_id"], axis=0),
        *summed("by_id", "sums"),
        node("Gather", ["sums", "last"], ["whole"]),
        node("Div", ["sums", "whole"], ["distribution"]),
        node("Greater", ["distribution", "random"], ["above"]),  # never, where something is not a number
        node("Cast", ["above"], ["above_number"], to=TensorProto.DOUBLE),
        node("ReduceSum", ["above_number", "first"], ["count"]),
        node("Sub", ["entries", "count"], ["below_number"]),
        node("Cast", ["below_number"], ["id"], to=TensorProto.INT64),
        node("Reshape", ["id", "token_shape"], [NEXT_TOKEN]),
    ]
    for each in nodes:
        each.name = each.output[0]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(logits_dtype))
    graph = helper.make_graph(
        nodes,
        "sampler",
        [
            helper.make_tensor_value_info("logits", element, [1, 1, vocab_size]),
            *(helper.make_tensor_value_info(name, dtype, [1]) for name, dtype in SETTINGS.items()),
        ],
        [helper.make_tensor_value_info(NEXT_TOKEN, TensorProto.INT64, [1, 1, 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
