"""Checkpoint -> bundle: encoder, decoder, tokenizer and manifest in one folder, written whole or not at all.

python -m export.bundle --checkpoint DIR --res N --out DIR [--precision fp32|fp16]
                        [--decoder-precision fp32|fp16|int8|int4|w4a16] [--portable-decoder [--capacity N]]
                        [--template NAME] [--check full|none]
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx

from export.bundle_writer import check_place, new_bundle, write_manifest
from export.cli import (
    CHECK_HELP,
    NOTHING_COMPARED,
    check_comparison,
    choose_resolution,
    installed_versions,
    name_of,
    open_checkpoint,
)
from export.decoder.check import DecoderReference, check_decoder
from export.decoder.export import BLOCKS, CAPACITY_HELP, check_options, decoder_part, export_decoder
from export.decoder.sampler import sampler_graph
from export.encoder import check_encoder, check_kernels, check_precision, export_encoder, parity_inputs
from export.estimate import Job, Sizes, require_room
from export.graphs.encoder_kernels import write_encoder_kernels
from export.graphs.kv_precision import write_cache_variants
from export.graphs.variants import write_variants
from export.parity import Difference, ParityError, report
from export.tokenizer.convert import TOKENIZER_FILE, export_tokenizer
from runtime import kernels
from runtime.bundle.manifest import NOT_CHECKED, DecoderPart, EncoderPart
from runtime.command import run
from runtime.demo import DEMO_BUNDLE
from runtime.errors import UserError
from runtime.image.preprocess import ImageRule
from runtime.text.template import MARKED_IMAGE_LINE, TEMPLATES, PromptTemplate
from runtime.text.tokenizer import Tokenizer
from train.model import Checkpoint, ImageEncoder, check_finite, load_image_encoder

CALIBRATE = (
    "; calib.quantize --part decoder --method gptq makes 4 bits of a bundle in float32 that lose less, "
    "given data like what the model will be asked about"
)
PRODUCERS = ("torch", "transformers", "timm", "onnx", "onnxruntime", "tokenizers")


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    resolution: int,
    precision: str = "fp32",
    decoder_precision: str = "fp32",
    portable: bool = False,
    capacity: int | None = None,
    template: str | None = None,
    check: str = "full",
) -> None:
    """Write a bundle, comparing every graph with PyTorch on the way.

    Args:
        resolution: default side of the images, pixels.
        portable: add the decoder of standard operators, for an engine.
        capacity: positions of the portable decoder's KV cache; None takes the model's context.
        template: a name in `runtime.text.template.TEMPLATES`; None takes the checkpoint's, see `prompt_template`.
        check: full or none; the manifest records which graphs were compared, with their largest relative error.

    Raises:
        UserError: an option that cannot be.
        ParityError: a graph does not compute what the model does.
    """
    prompt, image = prompt_template(checkpoint, template), image_rule(checkpoint, resolution)
    check_context(checkpoint, resolution, capacity)
    with new_bundle(out) as folder:
        checks = None if check == "none" else Checks(checkpoint, folder)
        sections: dict[str, Any] = {
            "image": image.to_dict(),
            "prompt": prompt.to_dict(),
            "tokenizer": export_tokenizer(checkpoint.folder, folder / "tokenizer"),
            "encoder": _given(_add_encoder(checkpoint, folder, precision, resolution, checks)),
        }
        files = _add_decoder(checkpoint, folder, decoder_precision, checks)
        if portable:
            files["portable_file"] = _add_portable_decoder(checkpoint, folder, decoder_precision, capacity, checks)
        decoder = decoder_part(checkpoint, decoder_precision, **files, sampler_file="decoder/sampler.onnx")
        onnx.save(sampler_graph(decoder.vocab_size, decoder.kv_dtype), str(folder / "decoder" / "sampler.onnx"))
        Tokenizer(folder / "tokenizer" / TOKENIZER_FILE, sections["tokenizer"], decoder.vocab_size)  # it warns
        sections["decoder"] = _given(decoder)
        sections["checked"] = NOT_CHECKED if checks is None else checks.errors
        write_manifest(folder, name_of(checkpoint), installed_versions(PRODUCERS), sections)


def _given(part: EncoderPart | DecoderPart) -> dict[str, Any]:
    return {key: value for key, value in asdict(part).items() if value is not None}


def check_context(checkpoint: Checkpoint, resolution: int, capacity: int | None) -> None:
    """Raises UserError where an image of the resolution leaves no room for text."""
    tokens = (resolution // checkpoint.encoder_config.stride) ** 2
    context = checkpoint.llama_config.max_position_embeddings
    if capacity is not None and not tokens < capacity <= context:
        raise UserError(f"--capacity {capacity}: a KV cache holds {tokens} visual tokens and text, at most {context}")
    if tokens >= context:
        raise UserError(f"resolution {resolution} makes {tokens} visual tokens, the decoder's context is {context}")


class Checks:
    """Comparisons of a bundle's graphs with PyTorch.

    errors: graph, a path inside the bundle -> its largest relative error.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path):
        self._checkpoint, self._folder = checkpoint, folder
        self._reference: DecoderReference | None = None  # of the decoder, for all its graphs
        self.errors: dict[str, float] = {}

    def encoder(self, file: Path, model: ImageEncoder, precision: str, resolution: int) -> None:
        rows = check_encoder(file, model, parity_inputs(resolution, model.encoder.config.stride), precision)
        self._require(rows, file, "encoder")

    def encoder_kernels(self, file: Path, source: Path, stride: int, resolution: int) -> None:
        self._require(check_kernels(file, source, parity_inputs(resolution, stride)[-1]), file, "encoder with kernels")

    def decoder(self, file: Path, precision: str, graph: str = "fused", what: str = "decoder", hint: str = "") -> None:
        self._reference = self._reference or DecoderReference.of(self._checkpoint)
        rows = check_decoder(self._checkpoint, file, precision, graph, self._reference)
        self._require(rows, file, what, hint)

    def _require(self, rows: list[Difference], file: Path, what: str, hint: str = "") -> None:
        """Raises ParityError where a row exceeds its tolerance; prints the table."""
        if not report(rows):
            raise ParityError(
                f"the exported {what} does not compute what the checkpoint does; no bundle was written{hint}"
            )
        self.errors[file.relative_to(self._folder).as_posix()] = float(f"{max(row.error for row in rows):.3g}")


def _add_encoder(
    checkpoint: Checkpoint, folder: Path, precision: str, resolution: int, checks: Checks | None
) -> EncoderPart:
    file = f"encoder/{precision}.onnx"
    (folder / "encoder").mkdir()
    model = load_image_encoder(checkpoint, None)
    export_encoder(model, folder / file, precision)
    if checks is not None:
        checks.encoder(folder / file, model, precision, resolution)
    stride, kernels_file = checkpoint.encoder_config.stride, "encoder/kernels.onnx"
    has_kernels = write_encoder_kernels(folder / file, folder / kernels_file)
    if has_kernels and checks is not None:
        if missing := kernels.unavailable():
            print(f"warning: {kernels_file} is not compared with PyTorch: {missing}", file=sys.stderr)
        else:
            checks.encoder_kernels(folder / kernels_file, folder / file, stride, resolution)
    return EncoderPart(
        file=file,
        precision=precision,
        hidden_size=checkpoint.llama_config.hidden_size,
        stride=stride,
        kernels_file=kernels_file if has_kernels else None,
    )


def _add_decoder(checkpoint: Checkpoint, folder: Path, precision: str, checks: Checks | None) -> dict[str, str]:
    """The fused graph and its variants; returns their paths in the bundle by their keys in the manifest."""
    file = export_decoder(checkpoint, folder / "decoder", precision)
    if checks is not None:
        checks.decoder(file, precision, hint=CALIBRATE if precision == "int4" else "")
    variants = write_variants(file) if precision in BLOCKS else {}
    if "prefill_file" in variants and checks is not None:
        checks.decoder(variants["prefill_file"], precision, "prefill", "decoder for prompts")
    if "kernels_file" in variants and checks is not None:
        if missing := kernels.unavailable():
            print(f"warning: decoder/kernels.onnx is not compared with PyTorch: {missing}", file=sys.stderr)
        else:
            checks.decoder(variants["kernels_file"], precision, "kernels", "decoder with kernels")
    graphs = {"file": file, **variants}
    for kv_dtype, tolerated in (("float16", "fp16"), ("int8", "int8")):
        rewritten = write_cache_variants(graphs.values(), kv_dtype)
        if checks is None or not rewritten:
            continue
        if kv_dtype == "int8" and (missing := kernels.unavailable()):
            print(f"warning: decoders with an int8 KV cache are not compared with PyTorch: {missing}", file=sys.stderr)
            continue
        # Rewritten alike: the first one's comparison is all of theirs
        tolerated = tolerated if precision == "fp32" else precision
        checks.decoder(rewritten[0], tolerated, what=f"decoder with a KV cache in {kv_dtype}")
    return {key: f"decoder/{path.name}" for key, path in graphs.items()}


def _add_portable_decoder(
    checkpoint: Checkpoint, folder: Path, decoder_precision: str, capacity: int | None, checks: Checks | None
) -> str:
    precision = portable_precision(decoder_precision)
    file = export_decoder(checkpoint, folder / "decoder", precision, "portable", capacity)
    if checks is not None:
        checks.decoder(file, precision, "portable", "portable decoder")
    return f"decoder/{file.name}"


def portable_precision(decoder_precision: str) -> str:
    """Precision of the portable decoder beside a fused one."""
    return decoder_precision if decoder_precision in ("fp32", "fp16") else "fp16"


def image_rule(checkpoint: Checkpoint, resolution: int) -> ImageRule:
    """The checkpoint's preprocessing.

    `image_aspect_ratio` other than `pad` is a centre crop in the original; `any` is what `train/` writes for its own.
    """
    (r, g, b), (r_std, g_std, b_std) = checkpoint.pixel_statistics
    aspect = checkpoint.config.get("image_aspect_ratio")
    return ImageRule(
        mean=(r, g, b),
        std=(r_std, g_std, b_std),
        aspect=aspect if aspect in ("pad", "any") else "crop",
        resolution=resolution,
        multiple=checkpoint.encoder_config.stride,
        max_visual_tokens=checkpoint.llama_config.max_position_embeddings // 2,  # the other half is for the text
    )


def prompt_template(checkpoint: Checkpoint, name: str | None) -> PromptTemplate:
    """The template `name`, else config.json's `conversation_template`, else Vicuna's, which the release was tuned on.

    `conversation_system` replaces its system text, `mm_use_im_start_end` marks the image. Raises UserError for an
    unknown name.
    """
    config = checkpoint.config
    name = name or config.get("conversation_template", "vicuna_v1")
    if name not in TEMPLATES:
        raise UserError(f"unknown prompt template {name!r}, expected one of {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    if "conversation_system" in config:
        template = replace(template, system=config["conversation_system"])
    if config.get("mm_use_im_start_end"):
        template = replace(template, image_format=MARKED_IMAGE_LINE)
    return template


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m export.bundle", description="Make a bundle of a checkpoint: encoder, decoder and tokenizer."
    )
    parser.add_argument("--checkpoint", help="folder or Hub id in the released layout; default: the demo model")
    parser.add_argument("--res", type=int, help="default side of the images, pixels; default: the checkpoint's")
    parser.add_argument("--out", type=Path, help="the bundle's folder; default: build/bundle/<checkpoint>")
    parser.add_argument("--precision", default="fp32", help="of the encoder: fp32 or fp16; default: fp32")
    parser.add_argument("--decoder-precision", default="fp32", help="fp32, fp16, int8, int4 or w4a16; default: fp32")
    parser.add_argument("--portable-decoder", action="store_true", help="add the decoder of standard operators")
    parser.add_argument("--capacity", type=int, metavar="N", help=CAPACITY_HELP)
    parser.add_argument("--template", help=f"one of {', '.join(TEMPLATES)}; default: the checkpoint's, or vicuna_v1")
    parser.add_argument("--check", default="full", help=CHECK_HELP)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    check_precision(args.precision)
    check_comparison(args.check)
    check_options(args.decoder_precision, capacity=None if args.portable_decoder else args.capacity)
    if args.portable_decoder:
        check_options(portable_precision(args.decoder_precision), "portable", args.capacity)
    checkpoint = open_checkpoint(args.checkpoint)
    resolution = choose_resolution(args.res, checkpoint)
    prompt_template(checkpoint, args.template)
    check_context(checkpoint, resolution, args.capacity)
    out = args.out or DEMO_BUNDLE.parent / name_of(checkpoint)
    check_place(out)
    portable = portable_precision(args.decoder_precision) if args.portable_decoder else None
    job = Job(resolution, args.precision, args.decoder_precision, portable, args.check, variants=True)
    room = require_room(Sizes.of(checkpoint), job, out, {"encoder": "--precision", "decoder": "--decoder-precision"})
    check_finite(checkpoint.vision_tensors(), checkpoint.projector_tensors(), checkpoint.language_tensors())
    print(room, flush=True)
    export_bundle(
        checkpoint,
        out,
        resolution,
        args.precision,
        args.decoder_precision,
        args.portable_decoder,
        args.capacity,
        args.template,
        args.check,
    )
    if args.check == "none":
        print(NOTHING_COMPARED)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: encoder {args.precision}, decoder {args.decoder_precision}, {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    run(main)
