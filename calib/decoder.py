"""A decoder's weights in 4 or 8 bits, blocks of 32 with a scale each, symmetric. Activations are float32; ONNX Runtime
rounds them to 8 bits for each product.

rtn: each weight is rounded to the nearest (ONNX Runtime's quantiser).
awq: weights are scaled first by how large the activations are that they meet, and the scales fitted to what the layer
then gives (AWQ, arXiv 2306.00978, and NNCF's scale estimation), on prompts with images.

The head takes 8 bits in either case, since what is lost there is lost in every token, and with it the token embeddings
where they are the same matrix; where they have their own, it stays in float32.
"""

import logging
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from calib.evaluation import with_answer
from calib.images import Page, pixels_of
from runtime.bundle import Bundle, DecoderPart
from runtime.decoder import KINDS
from runtime.encoder import OnnxEncoder
from runtime.errors import UserError
from runtime.prompt import first_turn
from runtime.tokenizer import Tokenizer

METHODS = ("rtn", "awq")
BITS = {"int4": 4, "int8": 8}
BLOCK = 32
INT8_COMPUTE = 4  # MatMulNBits' accuracy level: activations are rounded to 8 bits on the fly


def check_options(precision: str, method: str) -> None:
    """Raises UserError for what there is not."""
    if precision not in BITS:
        raise UserError(f"unknown --precision {precision!r} of a decoder, expected {' or '.join(BITS)}")
    if method not in METHODS:
        raise UserError(f"unknown --method {method!r} of a decoder, expected {' or '.join(METHODS)}")
    if method == "awq" and precision != "int4":
        raise UserError("--method awq is for int4; in 8 bits rounding to the nearest loses nothing to win back")


def quantise_decoder(
    source: Path, target: Path, precision: str, method: str, feeds: Iterable[dict[str, np.ndarray]] = ()
) -> None:
    """Write the fused float32 graph `source` with rounded weights to `target` (weights to `target`.data).

    feeds: what awq is calibrated on, as `prompts` makes it. Raises UserError as `check_options`.
    """
    check_options(precision, method)
    model = onnx.load(str(source))
    head = next(node for node in model.graph.node if "logits" in node.output)
    weights = {tensor.name for tensor in model.graph.initializer}
    products = [node.name for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    body = [name for name in products if name != head.name]
    matrix = head.input[1]
    model = _rounded(model, 8, but=body)
    _share_head(model.graph, matrix)
    model = _awq(model, list(feeds)) if method == "awq" else _rounded(model, BITS[precision])
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in target.parent.glob(f"{target.name}*"):
        file.unlink()
    onnx.save(model, str(target), save_as_external_data=True, location=f"{target.name}.data")


def _rounded(model: onnx.ModelProto, bits: int, but: Collection[str] = ()) -> onnx.ModelProto:
    """Every product with weights but those named becomes a MatMulNBits."""
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=INT8_COMPUTE, bits=bits)
    quantiser = MatMulNBitsQuantizer(model, bits=bits, nodes_to_exclude=list(but), algo_config=config)
    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)  # it tells of every node
    quantiser.process()
    return quantiser.model.model


def _share_head(graph: onnx.GraphProto, matrix: str) -> None:
    """Where token embeddings are the transposed `matrix` that the head had, look them up in its rounded one instead, in
    place. Embeddings that are a matrix of their own stay as they are."""
    tables = {node.output[0]: node for node in graph.node if node.op_type == "Transpose" and node.input[0] == matrix}
    embedding = next((node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables), None)
    head = next(node for node in graph.node if "logits" in node.output)
    values = {tensor.name: tensor for tensor in graph.initializer}
    vocab, blocks, size = values[head.input[1]].dims
    if embedding is None or blocks * size != values[matrix].dims[0]:
        return
    table = tables[embedding.input[0]]
    graph.initializer.append(numpy_helper.from_array(np.array([vocab, blocks * size]), "embed_tokens/shape"))
    table.CopyFrom(helper.make_node("Reshape", [head.input[1], "embed_tokens/shape"], ["embed_tokens/rows"]))
    embedding.CopyFrom(
        helper.make_node(
            "GatherBlockQuantized",
            ["embed_tokens/rows", embedding.input[1], head.input[2]],
            list(embedding.output),
            name=embedding.name,
            domain="com.microsoft",
            bits=8,
            block_size=size,
            gather_axis=0,
            quantize_axis=1,
        )
    )
    graph.initializer.remove(values[matrix])


def _awq(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> onnx.ModelProto:
    """By way of external weights: a large model does not fit one protobuf."""
    import nncf
    from nncf.onnx.quantization.backend_parameters import BackendParameters

    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "decoder.onnx"))
        onnx.save(model, file, save_as_external_data=True, location="decoder.data")
        compressed = nncf.compress_weights(
            onnx.load(file, load_external_data=False),
            mode=nncf.CompressWeightsMode.INT4_SYM,
            group_size=BLOCK,
            ratio=1.0,
            all_layers=True,
            ignored_scope=nncf.IgnoredScope(types=["Gather", "GatherBlockQuantized"], validate=False),
            dataset=nncf.Dataset(feeds),
            subset_size=len(feeds),
            awq=True,
            scale_estimation=True,
            advanced_parameters=nncf.AdvancedCompressionParameters(
                backend_params={BackendParameters.EXTERNAL_DATA_DIR: folder}
            ),
        )
        onnx.load_external_data_for_model(compressed, folder)
    return compressed


def prompts(bundle: Bundle, encoder: Path, pages: Iterable[Page]) -> Iterable[dict[str, np.ndarray]]:
    """What the fused decoder graph takes at the start of a sequence: a page's image, its first question, and the answer
    where it is known. encoder: the graph that encodes the images."""
    encode = OnnxEncoder(encoder, bundle.encoder.stride)
    tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer)
    for page in pages:
        embeds, question = encode([pixels_of(page, bundle.image)]), page.questions[0]
        text = with_answer(first_turn(bundle.prompt, question.prompt, 1), question.answer or "")
        yield _start(bundle.decoder, tokenizer.encode_prompt(text, [len(embeds)]), embeds)


def _start(part: DecoderPart, ids: list[int], embeds: np.ndarray) -> dict[str, np.ndarray]:
    empty = np.zeros((1, part.kv_heads, 0, part.head_dim), part.kv_dtype)
    names = [f"past_key_values.{i}.{kind}" for i in range(part.layers) for kind in KINDS]
    return {
        "input_ids": np.array([ids], np.int64),
        "image_embeds": embeds,
        "attention_mask": np.ones((1, len(ids)), np.int64),
        **dict.fromkeys(names, empty),
    }
