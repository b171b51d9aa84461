"""The portable decoder graph: parity, its cache, its variants, and what TensorRT makes of it."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from export.decoder.check import check_decoder
from export.decoder.export import export_decoder
from export.decoder.llama import llama_graph
from export.decoder.surgery import merge_image_embeds
from export.graphs import store
from export.graphs.mixed_precision import LIMIT, half_decoder, half_graph, nodes_to_keep, to_half
from export.tensorrt.build import Options, build, capability
from runtime.errors import UserError
from train.model import Checkpoint

CAPACITY = 32
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
VARIANTS = {
    "grouped queries": {},
    "untied head": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one key head, heads wider than hidden / heads": {"num_key_value_heads": 1, "head_dim": 32},
    "linear scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3 scaling": {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


def random_llama(**changes) -> LlamaForCausalLM:
    """Weights large enough that attention and rotation matter; norms and biases not as they are initialised."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SMALL | changes)).eval()
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.15))
    return llama


def write_graph(llama: LlamaForCausalLM, folder, capacity: int = CAPACITY):
    state = dict(llama.state_dict())
    if llama.config.tie_word_embeddings:
        del state["lm_head.weight"]
    model, read = llama_graph(llama.config, state, capacity)
    merge_image_embeds(model)
    file = folder / "portable.onnx"
    store.write_graph(model, read, file)
    onnx.checker.check_model(str(file))
    return file


def run(session: onnxruntime.InferenceSession, ids, write_indices, caches=None) -> dict[str, np.ndarray]:
    """One call; caches: of the call before, by the names of the outputs."""
    feeds = {"input_ids": np.array(ids), "write_indices": np.array(write_indices)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            past = None if caches is None else caches[value.name.replace("past_key_values", "present")]
            feeds[value.name] = np.zeros((len(ids), *value.shape[1:]), np.float32) if past is None else past
        elif value.name == "image_embeds":
            feeds[value.name] = np.empty((0, value.shape[1]), np.float32)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture(scope="module")
def checkpoint(conformance):
    return Checkpoint.open(conformance / "checkpoint")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_it_computes_what_pytorch_does_with_standard_operators_alone(checkpoint, tmp_path, precision):
    file = export_decoder(checkpoint, tmp_path, precision, "portable")
    assert {path.name for path in tmp_path.iterdir()} == {"portable.onnx", "portable.onnx.data"}
    model = onnx.load(file, load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    assert {opset.domain for opset in model.opset_import} <= {"", "ai.onnx"}
    onnx.checker.check_model(str(file))
    operators = Counter(node.op_type for node in model.graph.node)
    layers = checkpoint.llama_config.num_hidden_layers
    assert (operators["Attention"], operators["TensorScatter"], operators["RotaryEmbedding"]) == (
        layers,
        2 * layers,
        2 * layers,
    )
    rows = check_decoder(checkpoint, file, precision, "portable")
    assert len(rows) == 6
    assert all(row.ok for row in rows), rows


def test_fp16_found_out_layer_by_layer_is_that_of_the_whole_graph(tmp_path):
    """Weights are so large that the residual stream does not fit FP16 from the first layer on."""
    llama = random_llama(attention_bias=True)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight *= 3e5
        llama.model.layers[1].self_attn.o_proj.weight *= 1e-7
    state = {name: value for name, value in llama.state_dict().items() if name != "lm_head.weight"}
    model, read = llama_graph(llama.config, state, CAPACITY)
    merge_image_embeds(model)
    streamed, streamed_read = half_decoder(model, read)
    store.write_graph(streamed, streamed_read, tmp_path / "streamed.onnx")
    whole, kept = half_graph(onnx.load(write_graph(llama, tmp_path)), "decoder")
    assert len(kept) > 5
    found = onnx.load(tmp_path / "streamed.onnx")
    assert [str(node) for node in found.graph.node] == [str(node) for node in whole.graph.node]
    pairs = list(zip(found.graph.initializer, whole.graph.initializer, strict=True))
    assert {one.data_type for one, _ in pairs} >= {TensorProto.FLOAT, TensorProto.FLOAT16}
    for one, other in pairs:
        assert (one.name, one.data_type) == (other.name, other.data_type)
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_llama(tmp_path, changes):
    llama = random_llama(**changes)
    session = onnxruntime.InferenceSession(write_graph(llama, tmp_path))
    ids = np.random.default_rng(0).integers(0, SMALL["vocab_size"], 20).tolist()
    with torch.inference_mode():
        expected = llama(torch.tensor([ids])).logits[0].numpy()
    first = run(session, [ids[:18]], [0])
    second = run(session, [ids[18:]], [18], first)
    for found, position in ((first, 17), (second, 19)):
        error = np.abs(found["logits"][0, 0] - expected[position]).max()
        assert error < 1e-4 * np.abs(expected[position]).max()


def test_rows_of_a_batch_have_caches_of_different_length(tmp_path):
    llama = random_llama()
    session = onnxruntime.InferenceSession(write_graph(llama, tmp_path))
    rows = [[3, 5, 7, 11], [2, 4, 6, 8]]
    alone = [run(session, [row], [0]) for row in rows]
    # Of the first row only 2 positions count: the next token overwrites the third, and the fourth is out of sight
    caches = {name: np.concatenate([call[name] for call in alone]) for name in alone[0] if name != "logits"}
    found = run(session, [[20], [21]], [2, 4], caches)["logits"][:, 0]
    with torch.inference_mode():
        expected = [llama(torch.tensor([ids])).logits[0, -1].numpy() for ids in ([3, 5, 20], [2, 4, 6, 8, 21])]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_only_the_new_positions_of_the_cache_are_written(tmp_path):
    session = onnxruntime.InferenceSession(write_graph(random_llama(), tmp_path))
    random = np.random.default_rng(0)
    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_key_values")}
    before = {
        name.replace("past_key_values", "present"): random.standard_normal((1, *shape[1:]), dtype=np.float32)
        for name, shape in shapes.items()
    }
    after = run(session, [[1, 2, 3]], [5], before)
    for name, past in before.items():
        assert after[name].shape == past.shape == (1, 2, CAPACITY, 16)
        assert np.array_equal(after[name][:, :, :5], past[:, :, :5])
        assert np.array_equal(after[name][:, :, 8:], past[:, :, 8:])
        assert not np.isclose(after[name][:, :, 5:8], past[:, :, 5:8]).all(axis=-1).any()


def test_a_tied_table_is_stored_once_and_other_weights_beside_the_graph(tmp_path):
    sizes = {}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()
        file = write_graph(random_llama(tie_word_embeddings=tied), folder)
        sizes[tied] = file.with_name("portable.onnx.data").stat().st_size
    assert sizes[False] - sizes[True] == 4 * SMALL["vocab_size"] * SMALL["hidden_size"]


def test_what_the_graph_cannot_be_is_said(tmp_path):
    llama = random_llama()
    with pytest.raises(UserError, match="65 positions"):
        llama_graph(llama.config, llama.state_dict(), 65)
    llama.config.hidden_act = "gelu"
    with pytest.raises(UserError, match="gelu"):
        llama_graph(llama.config, llama.state_dict(), 8)


def test_a_product_beyond_fp16_has_its_weights_in_fp16():
    random = np.random.default_rng(0)
    weights = random.standard_normal((8, 16), dtype=np.float32)
    nodes = [
        helper.make_node("Transpose", ["weights"], ["transposed"], name="transpose", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "transposed"], ["y"], name="product"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(weights, "weights")],
    )
    # 1/64 brings the result back, so that the graph's own output fits FP16
    graph.node[1].output[0] = "large"
    graph.node.append(helper.make_node("Mul", ["large", "small"], ["y"], name="back"))
    graph.initializer.append(numpy_helper.from_array(np.array(1 / 64, np.float32), "small"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    x = 10_000 * random.standard_normal((4, 16), dtype=np.float32)
    expected = x @ weights.T / 64
    assert np.abs(expected * 64).max() > 65504
    kept = nodes_to_keep(model, [{"x": x}])
    assert {keep.node for keep in kept} >= {"product", "back"}
    assert max(keep.value for keep in kept) > LIMIT
    half = to_half(model, kept)
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert types["weights"] == TensorProto.FLOAT16
    session = onnxruntime.InferenceSession(half.SerializeToString())
    found = session.run(None, {"x": x.astype(np.float16)})[0].astype(np.float32)
    assert np.abs(found - expected).max() < 5e-3 * np.abs(expected).max()


@pytest.fixture(scope="module")
def half_file(tmp_path_factory):
    """A small decoder in FP16 with heads of 64, as TensorRT's fused attention wants them."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install '.[rtx]'")
    folder = tmp_path_factory.mktemp("engine")
    llama = random_llama(hidden_size=256, intermediate_size=512, vocab_size=512, num_hidden_layers=2)
    model, _ = half_graph(onnx.load(write_graph(llama, folder)), "decoder")
    file = folder / "half.onnx"
    onnx.save(model, str(file), save_as_external_data=True, location="half.onnx.data")
    return file


def test_tensorrt_updates_the_cache_in_place_with_fused_attention(half_file):
    assert capability(half_file, "rtx") == []
    engine, about = build(half_file, Options(part="decoder", target="sm89"))
    assert len(engine) > 1_000_000
    layers = Counter(layer["type"] for layer in about["network_layers"])
    assert (layers["KV_CACHE_UPDATE"], layers["ATTENTION_INPUT"], layers["ROTARY_EMBEDDING"]) == (4, 2, 4)
    prefill, decode = about["profiles"]
    assert prefill["input_ids"] == ((1, 1), (1, CAPACITY), (1, CAPACITY))
    assert set(decode["input_ids"]) == {(1, 1)}
    assert set(decode["past_key_values.0.key"]) == {(1, 2, CAPACITY, 64)}
    # Both profiles read the same weights: the file's, and not as much again
    data = half_file.with_name("half.onnx.data").stat().st_size
    assert about["memory"]["weights_bytes"] < 1.1 * data


def test_a_cache_of_variable_length_is_refused_by_tensorrt(half_file, tmp_path):
    model = onnx.load(str(half_file))
    for value in [*model.graph.input, *model.graph.output]:
        if value.name.startswith(("past_key_values", "present")):
            value.type.tensor_type.shape.dim[2].dim_param = "capacity"
    onnx.save(model, str(tmp_path / "variable.onnx"))
    assert any("static" in line for line in capability(tmp_path / "variable.onnx", "rtx"))
