"""A decoder's weights in 4 or 8 bits.

rtn, q4_1: rounded by themselves, see `export.graphs.matmul_nbits`.
gptq: 4 bits on the levels of q4_1; what one weight loses the next make up for, see `calib.gptq`.
awq: 4 bits around zero; weights are scaled first by how large the activations are that they meet, and the scales fitted
to what the layer then gives (AWQ, arXiv 2306.00978, and NNCF's scale estimation), on prompts with images.
"""

import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx

from calib.gptq import Compensated
from calib.images import Page, pixels_of
from export.graphs.block_formats import BLOCK
from export.graphs.block_formats import METHODS as BLOCK_METHODS
from export.graphs.matmul_nbits import check_whole_blocks, quantise_weights
from runtime.backends.ort_encoder import OnnxEncoder
from runtime.bundle.manifest import Bundle, DecoderPart
from runtime.errors import UserError
from runtime.graph_io import KINDS
from runtime.text.template import first_turn, with_answer
from runtime.text.tokenizer import Tokenizer

BITS = {"int4": 4, "int8": 8}
PROMPTS = {"gptq": 128, "awq": 16}  # that a method is calibrated on
METHODS = {**BLOCK_METHODS, "gptq": (4,), "awq": (4,)}  # and the bits it is for
DEFAULTS = {"int4": "q4_1", "int8": "rtn"}


def check_options(precision: str, method: str) -> None:
    """Raises UserError for what there is not."""
    if precision not in BITS:
        raise UserError(f"unknown --precision {precision!r} of a decoder, expected {' or '.join(BITS)}")
    if method not in METHODS:
        raise UserError(f"unknown --method {method!r} of a decoder, expected {', '.join(METHODS)}")
    if BITS[precision] not in METHODS[method]:
        raise UserError(f"--method {method} is for int4; in 8 bits rounding to the nearest loses nothing to win back")


def check_source(source: Path, method: str) -> None:
    """Raises UserError for what a method needs and the graph `source`, or this environment, has not."""
    if method != "rtn":
        check_whole_blocks(onnx.load(str(source), load_external_data=False).graph)
    if method == "awq" and find_spec("nncf") is None:
        raise UserError("--method awq takes NNCF: pip install '.[calib]'")


def quantise_decoder(
    source: Path, target: Path, precision: str, method: str, feeds: Iterable[dict[str, np.ndarray]] = ()
) -> None:
    """Write the fused float32 graph `source` with rounded weights to `target` (weights to `target`.data).

    feeds: what gptq and awq are calibrated on, as `prompts` makes it.
    Raises UserError as `check_options` and `quantise_weights`.
    """
    check_options(precision, method)
    if method == "gptq":
        quantise_weights(source, target, BITS[precision], "q4_1", Compensated(source, feeds))
        return
    if method != "awq":
        quantise_weights(source, target, BITS[precision], method)
        return
    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder, "decoder.onnx")
        quantise_weights(source, head, None)
        model = _awq(head, list(feeds))
    target.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{target}.data").unlink(missing_ok=True)  # onnx appends to a file that is there
    onnx.save(model, str(target), save_as_external_data=True, location=f"{target.name}.data")


def _awq(file: Path, feeds: list[dict[str, np.ndarray]]) -> onnx.ModelProto:
    """The graph at `file` with its remaining matrices rounded."""
    import nncf
    from nncf.onnx.quantization.backend_parameters import BackendParameters

    compressed = nncf.compress_weights(
        onnx.load(str(file), load_external_data=False),
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
            backend_params={BackendParameters.EXTERNAL_DATA_DIR: str(file.parent)}
        ),
    )
    onnx.load_external_data_for_model(compressed, str(file.parent))
    return compressed


def prompts(bundle: Bundle, encoder: Path, pages: Iterable[Page]) -> Iterable[dict[str, np.ndarray]]:
    """What the fused decoder graph takes at the start of a sequence: a page's image, its first question, and the answer
    where it is known. encoder: the graph that encodes the images."""
    encode = OnnxEncoder(encoder, bundle.encoder.stride)
    tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer)
    for page in pages:
        embeds, question = encode([pixels_of(page, bundle.image)]), page.questions[0]
        text = with_answer(first_turn(bundle.prompt, question.prompt, 1), question.answer or "")
        ids = tokenizer.encode_prompt(text, [len(embeds)])
        yield _start(bundle.decoder, ids[: bundle.decoder.context_length], embeds)


def _start(part: DecoderPart, ids: list[int], embeds: np.ndarray) -> dict[str, np.ndarray]:
    empty = np.zeros((1, part.kv_heads, 0, part.head_dim), part.kv_dtype)
    names = [f"past_key_values.{i}.{kind}" for i in range(part.layers) for kind in KINDS]
    return {
        "input_ids": np.array([ids], np.int64),
        "image_embeds": embeds,
        "attention_mask": np.ones((1, len(ids)), np.int64),
        **dict.fromkeys(names, empty),
    }
