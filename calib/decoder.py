"""Bundle -> bundle with a decoder of 4 or 8 bits.

rtn, q4_1: each weight is rounded to the nearest code, see `export.graphs.matmul_nbits`.
gptq: 4 bits in the format of rtn, the head too; the error of each weight is made up for by those after it, see
`calib.gptq`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from calib.bundle import REPORT, SOURCE, Outcome, check_source, copy_bundle, manifest_of
from calib.evaluation import Evaluation, Loss
from calib.gptq import Compensated
from calib.images import DEFAULT_QUESTIONS, HELD_OUT, LEAST, Page, asked_pages, find_pages, pixels_of, split, spread
from calib.pieces import widen
from calib.report import write_decoder_report
from export.bundle_writer import new_bundle, write_manifest
from export.graphs.block_formats import METHODS as BLOCK_METHODS
from export.graphs.kv_precision import write_cache_variants
from export.graphs.load import open_graph
from export.graphs.matmul_nbits import check_whole_blocks, quantize_weights
from export.graphs.variants import write_variants
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_encoder import OnnxEncoder
from runtime.bundle.manifest import CACHE_SUFFIXES, Bundle, DecoderPart
from runtime.errors import UserError
from runtime.graph_io import KINDS
from runtime.text.template import first_turn, with_answer
from runtime.text.tokenizer import Tokenizer

BITS = {"int4": 4, "int8": 8}
SOURCES = ("fp32", "fp16")  # precisions of decoders whose weights can be rounded
METHODS = {**BLOCK_METHODS, "gptq": (4,)}  # and the bits it is for
DEFAULT_METHODS = {"int4": "q4_1", "int8": "rtn"}
GPTQ_PROMPTS = 128
REMOVED_METHODS = {"awq": "gptq loses less; use --method gptq"}


@dataclass(frozen=True)
class DecoderOptions:
    """How to quantize a decoder. Raises UserError for a value that cannot be.

    Args:
        precision: int4 or int8.
        method: of `METHODS`; None takes the precision's own of `DEFAULT_METHODS`.
        samples: prompts that gptq is calibrated on; None takes GPTQ_PROMPTS.
        questions: to measure losses on; 0 measures nothing. None: those about few images, see
            `calib.images.asked_pages`, and none of a decoder in float16, which ONNX Runtime computes in float32, in
            twice its memory.
    """

    precision: str = "int4"
    method: str | None = None
    samples: int | None = None
    questions: int | None = None

    def __post_init__(self):
        check_options(self.precision, self.chosen_method)
        if self.samples is not None and self.chosen_method != "gptq":
            raise UserError(f"--samples is for gptq: {self.chosen_method} is not calibrated on any")
        for name, least in (("samples", 1), ("questions", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"--{name} is {value}, expected {least} or more")

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
    """Write a bundle like `bundle`, with a decoder of 4 or 8 bits in place of the float one.

    The loss is that of the bundle's encoder and the new decoder together, against float32.

    Args:
        data: folder of images or dataset, see `calib.images.find_pages`.

    Raises:
        UserError: the bundle's decoder is in none of `SOURCES`, or a matrix does not divide into blocks; as
            `quantize_encoder_bundle`.
    """
    check_source(bundle, out)
    part, method = bundle.decoder, options.chosen_method
    if part.precision not in SOURCES:
        raise UserError(
            f"{bundle.folder} has a decoder in {part.precision}; "
            f"export it with --decoder-precision {' or '.join(SOURCES)}"
        )
    if method != "rtn":
        check_whole_blocks(onnx.load(str(bundle.path(part.file)), load_external_data=False).graph)
    samples = (options.samples or GPTQ_PROMPTS) if method == "gptq" else 0
    questions, warnings = options.questions, []
    if questions is None and part.precision == "fp16":
        questions, warnings = 0, ["what is lost was not measured: the decoder is in float16; --questions N measures it"]
    wanted = DEFAULT_QUESTIONS if questions is None else questions
    calibration, held_out = split(find_pages(data), max(samples, LEAST), wanted)
    pages = (held_out or spread(calibration, HELD_OUT)) if questions != 0 else []
    evaluation = Evaluation(bundle, *asked_pages(pages, questions)) if pages else None
    if evaluation is not None:
        del evaluation.decoding.decoder  # its memory is for rounding the weights
        warnings += evaluation.warnings()
    feeds = prompts(bundle, bundle.path(SOURCE), spread(calibration, samples))
    part = replace(part, precision=options.precision, kv_dtype="float32")
    with new_bundle(out) as folder:
        outdated = (part.file, f"{REPORT}/decoder.")
        sections = copy_bundle(bundle, folder, lambda name: name.startswith(outdated))
        file = folder / part.file
        quantize_decoder(bundle.path(part.file), file, options.precision, method, feeds)
        written = write_variants(file)
        for kv_dtype in CACHE_SUFFIXES:
            write_cache_variants([file, *written.values()], kv_dtype)
        variants = {key: path.relative_to(folder).as_posix() for key, path in written.items()}
        sections["decoder"] |= {"precision": part.precision, "kv_dtype": part.kv_dtype, **variants}
        losses = {} if evaluation is None else _losses(bundle, evaluation, OnnxDecoder(file, part))
        about = {
            "precision": options.precision,
            "method": method,
            "calibration_prompts": min(samples, len(calibration)),
            "bytes": sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")),
            "held_out": bool(held_out),
            **({} if evaluation is None else evaluation.about()),
        }
        write_decoder_report(folder / REPORT, about, losses)
        write_manifest(folder, bundle.name, manifest_of(bundle)["producers"], sections)
    if evaluation is None:
        return Outcome(warnings, Loss(None, None, None), (), 0, 0)
    return Outcome(warnings, [*losses.values()][-1], (), evaluation.questions, evaluation.tokens)


def _losses(bundle: Bundle, evaluation: Evaluation, decoder: OnnxDecoder) -> dict[str, Loss]:
    """By what was measured; the bundle's own encoder last."""
    losses = {"decoder alone": evaluation.loss(decoder=decoder)}
    if bundle.encoder.precision != "fp32":
        both = f"with the encoder in {bundle.encoder.precision}"
        losses[both] = evaluation.loss(bundle.path(bundle.encoder.file), decoder)
    return losses


def quantize_decoder(
    source: Path, target: Path, precision: str, method: str, feeds: Iterable[dict[str, np.ndarray]] = ()
) -> None:
    """Write the fused float graph `source` in float32, with rounded weights, to `target` (weights to `target`.data).

    Args:
        feeds: what gptq is calibrated on, as `prompts` makes it.

    Raises:
        UserError: as `check_options` and `quantize_weights`.
    """
    check_options(precision, method)
    _, read = open_graph(source)
    model, _ = open_graph(source)  # the reader's own keeps the types that weights are stored in
    if model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:  # logits
        widen(model)
    if method == "gptq":
        rounding = Compensated(source, feeds, target.parent)
        quantize_weights(model, read, target, BITS[precision], "rtn", rounding, head_bits=4)
    else:
        quantize_weights(model, read, target, BITS[precision], method)


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
    empty = np.zeros((1, part.kv_heads, 0, part.head_dim), np.float32)
    names = [f"past_key_values.{i}.{kind}" for i in range(part.layers) for kind in KINDS]
    return {
        "input_ids": np.array([ids], np.int64),
        "image_embeds": embeddings,
        "attention_mask": np.ones((1, len(ids)), np.int64),
        **dict.fromkeys(names, empty),
    }
