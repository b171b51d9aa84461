"""Sampling as a graph of its own: logits -> a drawn token, for decoding that stays on a GPU.

What `runtime.sampling` computes for temperature, top-k and top-p, operator by operator in float64, so that the same
random number gives the same token. Shapes are fixed and nothing is computed on the host: ONNX Runtime can record it as
a CUDA graph.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.decoder import NEXT_TOKEN

OPSET = 18
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
    """
    constants = {
        "vocabulary": np.array([vocab_size], np.int64),
        "first": np.array([0], np.int64),
        "last": np.array([vocab_size - 1], np.int64),
        "one": np.array([1], np.int64),
        "axis": np.array(0, np.int64),
        "nothing": np.array([0.0]),
        "nowhere": np.zeros(vocab_size),
        "token_shape": np.array([1, 1, 1], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["logits"], ["exact"], to=TensorProto.DOUBLE),
        node("Reshape", ["exact", "vocabulary"], ["flat"]),
        # From here on in falling order; of equal logits the lowest id comes first
        node("TopK", ["flat", "vocabulary"], ["falling", "order"], axis=0),
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
        node("CumSum", ["probabilities", "axis"], ["reached"]),
        node("Sub", ["reached", "probabilities"], ["before"]),
        node("Less", ["before", "top_p"], ["among_top_p"]),
        node("Where", ["among_top_p", "probabilities", "nothing"], ["kept"]),
        # Back to the order of ids, in which the host draws
        node("ScatterElements", ["nowhere", "order", "kept"], ["by_id"], axis=0),
        node("CumSum", ["by_id", "axis"], ["sums"]),
        node("Gather", ["sums", "last"], ["whole"]),
        node("Div", ["sums", "whole"], ["distribution"]),
        node("LessOrEqual", ["distribution", "random"], ["passed"]),
        node("Cast", ["passed"], ["passed_number"], to=TensorProto.DOUBLE),
        node("ReduceSum", ["passed_number", "first"], ["count"]),
        node("Cast", ["count"], ["id"], to=TensorProto.INT64),
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
