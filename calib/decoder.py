"""Bundle -> bundle with a decoder of 4 or 8 bits.

rtn, q4_1: each weight is rounded to the nearest code, see `export.graphs.matmul_nbits`.
gptq: 4 bits on the codes of q4_1; the error of each weight is made up for by those after it, see `calib.gptq`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from calib.bundle import REPORT, SOURCE, Outcome, check_source, copy_bundle, manifest_of
from calib.evaluation import Evaluation
from calib.gptq import Compensated
from calib.images import HELD_OUT, LEAST, Page, fewer_pages, find_pages, pixels_of, split, spread
from calib.report import write_decoder_report
from export.bundle_writer import new_bundle, write_manifest
from export.graphs.block_formats import METHODS as BLOCK_METHODS
from export.graphs.load import open_graph
from export.graphs.matmul_nbits import check_whole_blocks, quantize_weights
from export.graphs.variants import write_variants
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_encoder import OnnxEncoder
from runtime.bundle.manifest import Bundle, DecoderPart
from runtime.errors import UserError
from runtime.graph_io import KINDS
from runtime.text.template import first_turn, with_answer
from runtime.text.tokenizer import Tokenizer

BITS = {"int4": 4, "int8": 8}
METHODS = {**BLOCK_METHODS, "gptq": (4,)}  # and the bits it is for
DEFAULT_METHODS = {"int4": "q4_1", "int8": "rtn"}
GPTQ_PROMPTS = 128
REMOVED_METHODS = {"awq": "gptq loses less (ANLS 0.896 against 0.860 on the demo model); use --method gptq"}


@dataclass(frozen=True)
class DecoderOptions:
    """How to quantize a decoder. Raises UserError for a value that cannot be.

    Args:
        precision: int4 or int8.
        method: of `METHODS`; None takes the precision's own of `DEFAULT_METHODS`.
        samples: prompts that gptq is calibrated on; None takes GPTQ_PROMPTS.
        questions: to measure losses on.
    """

    precision: str = "int4"
    method: str | None = None
    samples: int | None = None
    questions: int = 200

    def __post_init__(self):
        check_options(self.precision, self.chosen_method)
        if self.samples is not None and self.chosen_method != "gptq":
            raise UserError(f"--samples is for gptq: {self.chosen_method} is not calibrated on any")
        for name in ("samples", "questions"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} is {value}, expected 1 or more")

    @property
    def chosen_method(self) -> str:
        return self.method or DEFAULT_METHODS.get(self.precision, "rtn")


def check_options(precision: str, method: str) -> None:
    """Raises UserError for an unknown precision or method, and a method that is not for the precision."""
    if precision not in BITS:
        raise UserError(f"unknown --precision {precision!r} of a decoder, expected {' or '.join(BITS)}")
    if method in REMOVED_METHODS:
        raise UserError(f"--method {method} was removed: {REMOVED_METHODS[method]}")
    if method not in METHODS:
        raise UserError(f"unknown --method {method!r} of a decoder, expected {', '.join(METHODS)}")
    if BITS[precision] not in METHODS[method]:
        raise UserError(f"--method {method} is for int4; in 8 bits rounding to the nearest loses nothing to win back")


def quantize_decoder_bundle(bundle: Bundle, out: Path, data: Path, options: DecoderOptions) -> Outcome:
    """Write a bundle like `bundle`, with a decoder of 4 or 8 bits in place of the float32 one.

    The loss is that of the bundle's encoder and the new decoder together, against float32.

    Args:
        data: folder of images or dataset, see `calib.images.find_pages`.

    Raises:
        UserError: the bundle's decoder is not in float32, or a matrix does not divide into blocks; as
            `quantize_encoder_bundle`.
    """
    check_source(bundle, out)
    part, method = bundle.decoder, options.chosen_method
    if part.precision != "fp32":
        raise UserError(f"{bundle.folder} has a decoder in {part.precision}; export it with --decoder-precision fp32")
    if method != "rtn":
        check_whole_blocks(onnx.load(str(bundle.path(part.file)), load_external_data=False).graph)
    samples = (options.samples or GPTQ_PROMPTS) if method == "gptq" else 0
    calibration, held_out = split(find_pages(data), max(samples, LEAST), options.questions)
    pages = held_out or spread(calibration, HELD_OUT)
    evaluation = Evaluation(bundle, fewer_pages(pages, options.questions), options.questions)
    feeds = prompts(bundle, bundle.path(SOURCE), spread(calibration, samples))
    with new_bundle(out) as folder:
        outdated = (part.file, f"{REPORT}/decoder.")
        sections = copy_bundle(bundle, folder, lambda name: name.startswith(outdated))
        file = folder / part.file
        quantize_decoder(bundle.path(part.file), file, options.precision, method, feeds)
        variants = {key: path.relative_to(folder).as_posix() for key, path in write_variants(file).items()}
        sections["decoder"] |= {"precision": options.precision, **variants}
        losses = {"decoder alone": evaluation.loss(decoder=(decoder := OnnxDecoder(file, part)))}
        if bundle.encoder.precision != "fp32":
            both = f"with the encoder in {bundle.encoder.precision}"
            losses[both] = evaluation.loss(bundle.path(bundle.encoder.file), decoder)
        about = {
            "precision": options.precision,
            "method": method,
            "calibration_prompts": min(samples, len(calibration)),
            "bytes": sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")),
            "held_out": bool(held_out),
            **evaluation.about(),
        }
        write_decoder_report(folder / REPORT, about, losses)
        write_manifest(folder, bundle.name, manifest_of(bundle)["producers"], sections)
    return Outcome(evaluation.warnings(), [*losses.values()][-1], (), evaluation.questions, evaluation.tokens)


def quantize_decoder(
    source: Path, target: Path, precision: str, method: str, feeds: Iterable[dict[str, np.ndarray]] = ()
) -> None:
    """Write the fused float32 graph `source` with rounded weights to `target` (weights to `target`.data).

    Args:
        feeds: what gptq is calibrated on, as `prompts` makes it.

    Raises:
        UserError: as `check_options` and `quantize_weights`.
    """
    check_options(precision, method)
    if method == "gptq":
        quantize_weights(*open_graph(source), target, BITS[precision], "q4_1", Compensated(source, feeds))
    else:
        quantize_weights(*open_graph(source), target, BITS[precision], method)


def prompts(bundle: Bundle, encoder: Path, pages: Iterable[Page]) -> Iterable[dict[str, np.ndarray]]:
    """Inputs of the fused decoder graph at the start of a sequence: a page's image, its first question, and the answer
    where it is known. encoder: the graph that encodes the images."""
    encode = OnnxEncoder(encoder, bundle.encoder.stride)
    tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer, bundle.decoder.vocab_size)
    for page in pages:
        embeddings, question = np.asarray(encode([pixels_of(page, bundle.image)])), page.questions[0]
        text = with_answer(first_turn(bundle.prompt, question.prompt, 1), question.answer or "")
        ids = tokenizer.encode_prompt(text, [len(embeddings)])
        yield _first_inputs(bundle.decoder, ids[: bundle.decoder.context_length], embeddings)


def _first_inputs(part: DecoderPart, ids: list[int], embeddings: np.ndarray) -> dict[str, np.ndarray]:
    """With an empty KV cache."""
    empty = np.zeros((1, part.kv_heads, 0, part.head_dim), part.kv_dtype)
    names = [f"past_key_values.{i}.{kind}" for i in range(part.layers) for kind in KINDS]
    return {
        "input_ids": np.array([ids], np.int64),
        "image_embeds": embeddings,
        "attention_mask": np.ones((1, len(ids)), np.int64),
        **dict.fromkeys(names, empty),
    }
