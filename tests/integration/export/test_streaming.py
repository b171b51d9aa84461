"""Decoder graphs are written one weight at a time and run one layer at a time."""

import re
import weakref

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from export.decoder.export import export_decoder
from export.decoder.fused import fused_graph
from export.graphs.layers import layers_of, run_by_layer
from export.graphs.matmul_nbits import quantize_weights
from export.graphs.mixed_precision import half_decoder
from export.graphs.pieces import open_piece
from export.graphs.store import write_graph
from train.model import Checkpoint, load_language_state


@pytest.fixture(scope="module")
def checkpoint(conformance):
    return Checkpoint.open(conformance / "checkpoint")


def feeds_of(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    """A prompt of five tokens and an image embedding, then a step."""
    names = {value.name for value in model.graph.input}
    hidden = model.graph.input[1].type.tensor_type.shape.dim[1].dim_value
    feeds = []
    for begin, ids in ((0, [3, 9, -1, 30, 200, 7]), (6, [11])):
        images = np.random.default_rng(0).standard_normal((sum(i < 0 for i in ids), hidden), np.float32)
        feed = {"input_ids": np.array([ids]), "image_embeds": images}
        if "write_indices" in names:
            feed["write_indices"] = np.array([begin])
        else:
            feed["attention_mask"] = np.ones((1, begin + len(ids)), np.int64)
        feeds.append(feed)
    return feeds


def run_whole(file, feeds) -> list[np.ndarray]:
    session, logits, cache = onnxruntime.InferenceSession(file), [], {}
    names = [value.name for value in session.get_outputs()]
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = [dim if isinstance(dim, int) else 0 for dim in value.shape[1:]]
            cache[value.name] = np.zeros((1, *shape), np.float32)
    for feed in feeds:
        found = dict(zip(names, session.run(names, feed | cache), strict=True))
        cache = {name: found[name.replace("past_key_values", "present")] for name in cache}
        logits.append(found["logits"])
    return logits


@pytest.mark.parametrize(
    ("precision", "graph"), [("fp32", "fused"), ("int8", "fused"), ("int4", "fused"), ("fp32", "portable")]
)
def test_layer_by_layer_a_graph_computes_what_the_whole_does(checkpoint, tmp_path, precision, graph):
    file = export_decoder(checkpoint, tmp_path, precision, graph, 32 if graph == "portable" else None)
    model, opened = onnx.load(file, load_external_data=False), []

    def open_it(piece):
        opened.append({tensor.name for tensor in piece.graph.initializer})
        session = open_piece(piece, tmp_path)
        return lambda feed: session.run(None, feed)

    feeds = feeds_of(model)
    for values in run_by_layer(model, feeds, open_it):
        found = [call.get("logits") for call in values]
    for one, other in zip(found, run_whole(file, feeds), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert len(opened) == checkpoint.llama_config.num_hidden_layers + 2
    for i, names in enumerate(opened[1:-1]):
        found = [re.search(r"layers\.(\d+)", name) for name in names]
        assert {int(match[1]) for match in found if match} == {i}
    assert sum(len(nodes) for nodes in layers_of(model)) == len(model.graph.node)


class OneAtATime:
    """A reader that fails where the array before is still alive."""

    def __init__(self, read):
        self._read, self._last, self.names = read, lambda: None, []

    def __call__(self, name: str) -> np.ndarray:
        assert self._last() is None, f"{self.names[-1]} is still in memory while {name} is read"
        values = self._read(name).copy()
        self._last = weakref.ref(values)
        self.names.append(name)
        return values


@pytest.mark.parametrize("write", ["plain", "int8", "int4", "half"])
def test_one_weight_is_in_memory_at_a_time(checkpoint, tmp_path, write):
    model, read = fused_graph(checkpoint.llama_config, load_language_state(checkpoint), TensorProto.FLOAT)
    reader, file = OneAtATime(read), tmp_path / "model.onnx"
    if write == "plain":
        write_graph(model, reader, file)
    elif write == "half":
        portable, read = _portable(checkpoint)
        reader = OneAtATime(read)
        write_graph(portable, reader, file)
    else:
        quantize_weights(model, reader, file, *((8, "rtn") if write == "int8" else (4, "q4_1")))
    assert len(reader.names) == len(set(reader.names)) > 3 * checkpoint.llama_config.num_hidden_layers
    onnxruntime.InferenceSession(file)


def _portable(checkpoint):
    from export.decoder.llama import llama_graph
    from export.decoder.surgery import merge_image_embeds

    model, read = llama_graph(checkpoint.llama_config, load_language_state(checkpoint), 32)
    merge_image_embeds(model)
    return half_decoder(model, read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_stored_weights_are_the_checkpoints(checkpoint, tmp_path, dtype, element):
    state = {name: value.to(dtype) for name, value in load_language_state(checkpoint).items()}
    model, read = fused_graph(checkpoint.llama_config, state, element)
    write_graph(model, read, tmp_path / "model.onnx")
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    stored = helper.tensor_dtype_to_np_dtype(element)
    qkv = torch.cat([state[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]).float().numpy()
    table = np.dtype(np.float16) if dtype == torch.float16 else stored
    for found, expected, kind in (
        (weights["model.layers.1.attn.qkv_proj.MatMul.weight"], qkv.T, stored),
        (weights["lm_head.MatMul.weight"], state["lm_head.weight"].float().numpy().T, stored),
        (weights["model.embed_tokens.weight"], state["model.embed_tokens.weight"].float().numpy(), table),
    ):
        assert found.dtype == kind
        np.testing.assert_array_equal(found, expected.astype(kind))
