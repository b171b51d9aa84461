"""Decoders of 4 and 8 bits: what they are made of, and how near to float32 they are."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import runtime
from calib.decoder import (
    DecoderOptions,
    prompts,
    quantize_decoder,
    quantize_decoder_bundle,
)
from calib.encoder import EncoderOptions, quantize_encoder_bundle
from calib.images import find_pages
from export.graphs.block_formats import BLOCK
from export.graphs.matmul_nbits import check_whole_blocks
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from tests.support.bundles import exported
from tests.support.commands import run_main


@pytest.fixture(scope="module")
def bundle(conformance_bundle):
    return open_bundle(conformance_bundle)


@pytest.fixture(scope="module")
def feeds(bundle, dataset):
    return list(prompts(bundle, bundle.path("encoder/fp32.onnx"), find_pages(dataset)[:8]))


@pytest.fixture(scope="module")
def source(bundle, tmp_path_factory):
    """The bundle's decoder, with some channels of each MLP fifty times as large and the weights that they meet as much
    smaller: the same function, and what rounding to the nearest is bad at."""
    model = onnx.load(bundle.path(bundle.decoder.file))
    for tensor in model.graph.initializer:
        factor = {"up_proj": 50, "down_proj": 1 / 50}.get(tensor.name.split(".")[-3] if "mlp" in tensor.name else "")
        if factor:
            weights = numpy_helper.to_array(tensor).copy()
            channels = weights.T if factor > 1 else weights
            channels[::4] *= factor
            tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
    file = tmp_path_factory.mktemp("decoder") / "model.onnx"
    onnx.save(model, file)
    return file


@pytest.fixture(scope="module")
def rounded(source, feeds, tmp_path_factory):
    """(precision, method) -> a graph."""
    folder, files = tmp_path_factory.mktemp("rounded"), {}
    for precision, method in (("int8", "rtn"), ("int4", "rtn")):
        files[precision, method] = folder / f"{precision}-{method}.onnx"
        quantize_decoder(source, files[precision, method], precision, method, feeds)
    return files


def test_calibration_keeps_to_the_context(bundle, dataset):
    short = replace(bundle, decoder=replace(bundle.decoder, context_length=40))
    pages = find_pages(dataset)[:8]
    whole, cut = (list(prompts(b, b.path("encoder/fp32.onnx"), pages)) for b in (bundle, short))
    assert max(feed["input_ids"].shape[1] for feed in whole) > 40
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(other["input_ids"], one["input_ids"][:, :40])
        assert other["attention_mask"].shape == other["input_ids"].shape


def test_matrices_of_part_of_a_block_are_refused_before_any_work(tmp_path):
    weights = numpy_helper.from_array(np.zeros((48, 64), np.float32), "body")
    product = helper.make_node("MatMul", ["x", "body"], ["logits"])
    x, logits = (helper.make_tensor_value_info(name, 1, ["n", size]) for name, size in (("x", 48), ("logits", 64)))
    graph = helper.make_graph([product], "decoder", [x], [logits], [weights])
    onnx.save(helper.make_model(graph), tmp_path / "g")
    with pytest.raises(UserError, match="body has 48 inputs"):
        check_whole_blocks(onnx.load(tmp_path / "g").graph)


def logits(file, bundle, feeds) -> np.ndarray:
    decoder = OnnxDecoder(file, bundle.decoder)
    rows = []
    for feed in feeds:
        ids = feed["input_ids"][0].tolist()
        rows.append(decoder.start(len(ids)).forward(ids, feed["image_embeds"]).copy())
    return np.array(rows)


def test_more_bits_and_calibration_bring_a_decoder_nearer(bundle, source, feeds, rounded):
    expected = logits(bundle.path(bundle.decoder.file), bundle, feeds)
    errors = {}
    for key, file in ({"none": source} | rounded).items():
        errors[key] = np.linalg.norm(logits(file, bundle, feeds) - expected) / np.linalg.norm(expected)
    assert errors["none"] < 1e-5
    assert errors["int8", "rtn"] < 0.5 * errors["int4", "rtn"]
    assert errors["int4", "rtn"] < 1


def test_errors_that_are_carried_on_bring_a_decoder_nearer(bundle, feeds, tmp_path):
    source, errors = bundle.path(bundle.decoder.file), {}
    expected = logits(source, bundle, feeds)
    for method in ("rtn", "gptq"):
        quantize_decoder(source, tmp_path / method, "int4", method, feeds)
        found = logits(tmp_path / method, bundle, feeds)
        errors[method] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    sizes = {method: (tmp_path / f"{method}.data").stat().st_size for method in errors}
    assert sizes["gptq"] < sizes["rtn"], "its head has 4 bits in place of 8"
    assert errors["gptq"] < 1.2 * errors["rtn"], "with a head of half the bits"


def test_weights_are_the_nearest_of_sixteen_levels(source, rounded):
    """Against the float32 matrix, block by block."""
    original = onnx.load(source).graph
    plain = {tensor.name: numpy_helper.to_array(tensor) for tensor in original.initializer}
    matrices = {
        node.name: node.input[1] for node in original.node if node.op_type == "MatMul" and node.input[1] in plain
    }
    graph = onnx.load(rounded["int4", "rtn"]).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == len(matrices)
    seen = Counter()
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes["block_size"] == BLOCK
        assert len(node.input) < 4 or not node.input[3], "symmetric: no zero points"
        weights = plain[matrices[node.name]].T
        packed, scales = values[node.input[1]], values[node.input[2]].reshape(weights.shape[0], -1, 1)
        bits = attributes["bits"]
        seen[bits] += 1
        levels = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
        restored = (levels.astype(np.float64) - 2 ** (bits - 1)) * scales
        blocks = weights.reshape(weights.shape[0], -1, BLOCK)
        steps_off = np.abs(restored - blocks) / np.abs(scales)
        assert steps_off.max() <= (2 if bits == 4 else 1.001), "steps are shorter where the furthest may be clipped"
        assert np.mean(steps_off <= 0.501) > 0.96
    assert seen == {8: 1, 4: len(nodes) - 1}, "the head takes 8 bits"


def test_tied_embeddings_share_the_heads_matrix(tmp_path):
    """A head and embeddings of one matrix, as SmolLM2 has them: looked up rows are the head's, within 8 bits."""
    random = np.random.default_rng(0)
    matrix = random.standard_normal((64, 96)).astype(np.float32)  # [D, V]
    nodes = [
        onnx.helper.make_node("Transpose", ["head"], ["table"], perm=[1, 0]),
        onnx.helper.make_node("Gather", ["table", "input_ids"], ["embeds"], name="lookup"),
        onnx.helper.make_node("MatMul", ["embeds", "body"], ["hidden"], name="body"),
        onnx.helper.make_node("MatMul", ["hidden", "head"], ["logits"], name="head"),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("input_ids", onnx.TensorProto.INT64, [1, "s"])],
        [info("logits", 1, [1, "s", 96])],
        [numpy_helper.from_array(matrix, "head"), numpy_helper.from_array(np.eye(64, dtype=np.float32), "body")],
        value_info=[info("table", 1, [96, 64])],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "tied.onnx")
    quantize_decoder(tmp_path / "tied.onnx", tmp_path / "rounded.onnx", "int8", "rtn")
    rounded = onnx.load(tmp_path / "rounded.onnx")
    assert "GatherBlockQuantized" in {node.op_type for node in rounded.graph.node}
    assert not any(tensor.name == "head" for tensor in rounded.graph.initializer), "float32 has gone"
    import onnxruntime

    ids = np.arange(96)[None]
    (found,) = onnxruntime.InferenceSession(tmp_path / "rounded.onnx").run(None, {"input_ids": ids})
    expected = matrix.T.astype(np.float64) @ matrix
    assert np.linalg.norm(found[0] - expected) < 0.02 * np.linalg.norm(expected)


def test_a_bundle_with_an_int8_encoder_and_an_int4_decoder_answers(conformance_bundle, dataset, pictures, tmp_path):
    quantize_encoder_bundle(open_bundle(conformance_bundle), tmp_path / "int8", pictures, EncoderOptions(questions=4))
    out = tmp_path / "int4"
    done = run_main(
        *("calib.quantize", "--part", "decoder", "--bundle", tmp_path / "int8", "--data", dataset),
        *("--precision", "int4", "--questions", 6, "--out", out),
    )
    assert done.returncode == 0, done.stderr
    assert "next tokens differ" in done.stdout
    before, after = open_bundle(tmp_path / "int8"), open_bundle(out)
    assert after.decoder.precision == "int4"
    for variant in (after.decoder.prefill_file, after.decoder.kernels_file):
        assert after.path(variant).stat().st_size < 100_000, "no weights of its own"
    assert after.encoder == before.encoder
    assert (
        after.path("decoder/model.onnx.data").stat().st_size < before.path("decoder/model.onnx.data").stat().st_size / 2
    )
    report = json.loads((out / "calib" / "decoder.json").read_text())
    assert [row["measured"] for row in report["losses"]] == ["decoder alone", "with the encoder in int8"]
    encoder = json.loads((out / "calib" / "encoder-int8.json").read_text())
    assert encoder == json.loads((tmp_path / "int8" / "calib" / "encoder-int8.json").read_text())
    assert report["losses"][0]["sqnr_db"] is None
    assert 25 < report["losses"][1]["sqnr_db"] < 40
    assert report["questions"] >= 6
    assert "perplexity" in (out / "calib" / "decoder.md").read_text()
    *_, last = runtime.load(out).generate([pictures / "00.png"], "What?", runtime.Options(max_new_tokens=3))
    assert len(last.result.token_ids) == 3
    with pytest.raises(UserError, match="decoder in int4"):
        quantize_decoder_bundle(after, tmp_path / "again", dataset, DecoderOptions())
    with pytest.raises(UserError, match="for int4"):
        DecoderOptions("int8", "q4_1")
    with pytest.raises(UserError, match="awq was removed: gptq loses less; use --method gptq"):
        DecoderOptions(method="awq")
    with pytest.raises(UserError, match="--samples is 0"):
        DecoderOptions(method="gptq", samples=0)


def test_a_float16_decoder_is_rounded_as_the_same_one_in_float32(bundle, source, feeds, tmp_path):
    """Weights that float16 holds exactly, in either type: the same graph comes out."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "single.onnx")
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "half.onnx", save_as_external_data=True, location="half.data")
    (tmp_path / "out").mkdir()
    for method in ("rtn", "gptq"):
        graphs = []
        for name in ("single", "half"):
            file = tmp_path / "out" / f"{name}-{method}.onnx"
            quantize_decoder(tmp_path / f"{name}.onnx", file, "int4", method, feeds[:2])
            graphs.append(onnx.load(file).graph)
        single, half = graphs
        assert [value.type for value in single.input] == [value.type for value in half.input]
        values = [{t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in graphs]
        assert values[0].keys() == values[1].keys()
        for name, array in values[0].items():
            np.testing.assert_array_equal(values[1][name], array)
        assert {path.name for path in (tmp_path / "out").iterdir()} >= {file.name, f"{file.name}.data"}
    OnnxDecoder(file, bundle.decoder)


def test_what_a_float16_decoder_loses_is_measured_when_asked_for(dataset, tmp_path):
    folder = exported("--res", 256, "--decoder-precision", "fp16")
    arguments = ("--part", "decoder", "--bundle", folder, "--data", dataset, "--method", "gptq", "--samples", 2)
    done = run_main("calib.quantize", *arguments, "--out", tmp_path / "int4")
    assert done.returncode == 0, done.stderr
    assert "was not measured: the decoder is in float16" in done.stderr
    assert "nothing was measured" in done.stdout
    assert "was not measured" in (tmp_path / "int4" / "calib" / "decoder.md").read_text()
    after = open_bundle(tmp_path / "int4")
    assert (after.decoder.precision, after.decoder.kv_dtype) == ("int4", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["int4"]
    done = run_main("calib.quantize", *arguments, "--questions", 2, "--out", tmp_path / "int4")
    assert "(2 questions)" in done.stdout, done.stderr
