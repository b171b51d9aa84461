"""Decoder graphs: every precision of the fused one against PyTorch, and the merging of image embeds."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from export.decoder.check import check_decoder
from export.decoder.export import export_decoder, write_fused
from export.decoder.surgery import merge_image_embeds
from runtime.errors import UserError
from tests.support.commands import run_main
from train.model import Checkpoint

CALLS = ("prompt with two images", "second turn", "step 1", "step 2", "step 3")


@pytest.fixture(scope="module")
def checkpoint(conformance):
    return Checkpoint.open(conformance / "checkpoint")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "w4a16"])
def test_fused_graph_is_within_its_bound(checkpoint, tmp_path, precision):
    file = export_decoder(checkpoint, tmp_path, precision)
    rows = check_decoder(checkpoint, file, precision)
    assert all(row.ok for row in rows), rows
    assert rows[0].what.startswith("layer ")
    assert [row.what for row in rows[1:]] == [f"fused {precision} logits, {call}" for call in CALLS]
    graph = onnx.load(file, load_external_data=False).graph
    operators = {node.op_type for node in graph.node}
    assert "GroupQueryAttention" in operators
    assert ("MatMulNBits" in operators) == (precision in ("int8", "int4", "w4a16"))
    half = TensorProto.FLOAT16 if precision in ("fp16", "w4a16") else TensorProto.FLOAT
    assert {value.type.tensor_type.elem_type for value in graph.input if value.name.startswith("past_")} == {half}
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


@pytest.mark.parametrize("matrix", ["attn.o_proj", "mlp.down_proj"])
def test_a_broken_layer_is_named(checkpoint, tmp_path, matrix):
    """One weight of the middle layer's, so that the error is small there and in the layer after it."""
    file = export_decoder(checkpoint, tmp_path, "fp32")
    graph = onnx.load(file, load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == f"model.layers.1.{matrix}.MatMul.weight")
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    with file.with_name("model.onnx.data").open("r+b") as data:
        data.seek(offset)
        data.write(np.float32(3).tobytes())
    rows = check_decoder(checkpoint, file, "fp32")
    assert rows[0].what == "layer 1, prompt with two images"
    assert not rows[0].ok


def test_a_layer_that_gives_nan_is_named(checkpoint, tmp_path):
    file = export_decoder(checkpoint, tmp_path, "fp32")
    model = onnx.load(file)
    (norm,) = (t for t in model.graph.initializer if t.name == "model.layers.2.post_attention_layernorm.weight")
    norm.CopyFrom(numpy_helper.from_array(np.full(norm.dims[0], np.nan, np.float32), norm.name))
    onnx.save(model, tmp_path / "nan.onnx")
    rows = check_decoder(checkpoint, tmp_path / "nan.onnx", "fp32")
    assert rows[0].what == "layer 2, prompt with two images"
    assert not rows[0].ok


def test_layers_of_rounded_weights_are_judged_one_by_one(checkpoint, tmp_path):
    """Layer 1 adds nothing from its MLP; what follows is given PyTorch's hidden states, and is right."""
    file = export_decoder(checkpoint, tmp_path, "int4")
    graph = onnx.load(file, load_external_data=False).graph
    scales = next(
        tensor for tensor in graph.initializer if tensor.name.endswith("layers.1.mlp.down_proj.MatMul.weight/scales")
    )
    place = {entry.key: entry.value for entry in scales.external_data}
    with file.with_name("model.onnx.data").open("r+b") as data:
        data.seek(int(place["offset"]))
        data.write(bytes(int(place["length"])))
    layer, *logits = check_decoder(checkpoint, file, "int4")
    assert layer.what == "layer 1, prompt with two images"
    assert not layer.ok
    assert all(row.ok for row in logits)


def test_embeddings_of_their_own_stay_in_float16(checkpoint, tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    state = LlamaForCausalLM(config).half().state_dict()
    write_fused(config, state, "int8", file := tmp_path / "model.onnx")
    graph = onnx.load(file).graph
    (table,) = (tensor for tensor in graph.initializer if list(tensor.dims) == [96, 64])
    np.testing.assert_array_equal(numpy_helper.to_array(table), state["model.embed_tokens.weight"].numpy())
    assert numpy_helper.to_array(table).dtype == np.float16


def test_block_wise_weights_have_the_bits_asked_for(checkpoint, tmp_path):
    found = {}
    for precision in ("int8", "int4", "w4a16"):
        graph = onnx.load(export_decoder(checkpoint, tmp_path / precision, precision), load_external_data=False).graph
        found[precision] = [
            next(attribute.i for attribute in node.attribute if attribute.name == "bits")
            for node in graph.node
            if node.op_type == "MatMulNBits"
        ]
    assert set(found["int8"]) == {8}
    assert set(found["w4a16"]) == {4}
    assert sorted(set(found["int4"])) == [4, 8]  # the head keeps 8
    assert found["int4"].count(8) == 1


def test_what_cannot_be_exported_is_said_at_once(checkpoint, tmp_path):
    with pytest.raises(UserError, match="int3"):
        export_decoder(checkpoint, tmp_path, "int3")
    with pytest.raises(UserError, match="linear"):
        export_decoder(checkpoint, tmp_path, "fp32", "linear")
    with pytest.raises(UserError, match="int4"):
        export_decoder(checkpoint, tmp_path, "int4", "portable")
    done = run_main("export.decoder", "--precision", "bf16", "--out", tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def embedding_model(lookups: int = 1) -> tuple[onnx.ModelProto, np.ndarray]:
    """input_ids -> the rows of a table; as much of a decoder as merging needs."""
    table = np.random.default_rng(0).standard_normal((10, 4), dtype=np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], [f"out{i}"], name=f"g{i}") for i in range(lookups)]
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["past_key"], ["present_key"])],
        "g",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"]),
            helper.make_tensor_value_info("past_key", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("out0", TensorProto.FLOAT, ["b", "s", 4]),
            helper.make_tensor_value_info("present_key", TensorProto.FLOAT, [1]),
        ],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.ones(4, np.float32), "norm.weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), table


@pytest.fixture(scope="module")
def merged():
    model, table = embedding_model()
    merge_image_embeds(model)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())

    def look_up(ids, images):
        feeds = {"input_ids": np.array(ids), "image_embeds": images, "past_key": np.zeros(1, np.float32)}
        return session.run(["out0"], feeds)[0]

    return look_up, table


def test_ids_below_zero_name_rows_of_the_image_embeds(merged):
    look_up, table = merged
    images = np.random.default_rng(1).standard_normal((3, 4), dtype=np.float32)
    found = look_up([[5, -1, -3, 0], [-2, 9, -2, 1]], images)
    expected = [[table[5], images[0], images[2], table[0]], [images[1], table[9], images[1], table[1]]]
    assert np.array_equal(found, np.array(expected))


def test_no_image_at_all_is_a_plain_look_up(merged):
    look_up, table = merged
    assert np.array_equal(look_up([[3, 4]], np.empty((0, 4), np.float32)), table[[[3, 4]]])


def test_a_row_that_is_not_there_is_an_error(merged):
    look_up, _ = merged
    with pytest.raises(Exception, match="out of"):
        look_up([[-5]], np.zeros((3, 4), np.float32))


def test_a_graph_with_no_or_two_look_ups_is_refused():
    for lookups in (0, 2):
        with pytest.raises(ValueError, match=f"found {lookups}"):
            merge_image_embeds(embedding_model(lookups)[0])
