"""Checkpoint -> bundle: encoder, decoder, tokenizer and manifest in one folder, written whole or not at all.

python -m export.bundle --checkpoint DIR --res N --out DIR [--precision fp32|fp16]
                        [--decoder-precision fp32|fp16|int8|int4|w4a16] [--portable-decoder [--capacity N]]
                        [--template NAME]
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx

from export import encoder as encoder_export
from export.bundle_writer import write_bundle
from export.cli import choose_resolution, installed_versions, name_of, open_checkpoint, run
from export.decoder.check import check_decoder
from export.decoder.export import BLOCKS, CAPACITY_HELP, check_options, decoder_part, export_decoder
from export.decoder.sampler import sampler_graph
from export.graphs.variants import write_variants
from export.tokenizer.convert import export_tokenizer
from export.tolerances import ParityError, report
from runtime import kernels
from runtime.bundle.manifest import EncoderPart
from runtime.demo import DEMO_BUNDLE
from runtime.errors import UserError
from runtime.image.preprocess import ImageRule
from runtime.text.template import MARKED_IMAGE_LINE, TEMPLATES, PromptTemplate
from train.model import Checkpoint, load_image_encoder

CALIBRATE = (
    "; calib.quantize --part decoder --method gptq makes 4 bits of a bundle in float32 that lose less, "
    "given data like what the model will be asked about"
)
PRODUCERS = ("torch", "transformers", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-genai", "tokenizers")


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    resolution: int,
    precision: str = "fp32",
    decoder_precision: str = "fp32",
    portable: bool = False,
    capacity: int | None = None,
    template: str | None = None,
) -> None:
    """Write the bundle, every part compared with PyTorch on the way.

    resolution: default side of the images, pixels. portable: also the decoder of standard operators, for an engine.
    capacity: positions of its KV cache; None: the context.
    template: a name in `runtime.text.template.TEMPLATES`; None: see `prompt_template`.
    Raises UserError for an option that cannot be, ParityError where a graph does not compute what the model does.
    """
    prompt, image = prompt_template(checkpoint, template), image_rule(checkpoint, resolution)
    tokens, context = (resolution // image.multiple) ** 2, checkpoint.llama_config.max_position_embeddings
    if capacity is not None and not tokens < capacity <= context:
        raise UserError(f"--capacity {capacity}: a KV cache holds {tokens} visual tokens and text, at most {context}")
    if tokens >= context:
        raise UserError(f"resolution {resolution} makes {tokens} visual tokens, the decoder's context is {context}")

    def fill(folder: Path) -> dict[str, Any]:
        tokenizer = export_tokenizer(checkpoint.folder, folder / "tokenizer")
        (folder / "encoder").mkdir()
        encoder_file = folder / "encoder" / f"{precision}.onnx"
        model = load_image_encoder(checkpoint)
        _require(encoder_export.export_checked(model, encoder_file, precision, resolution), "encoder")
        decoder_file = export_decoder(checkpoint, folder / "decoder", decoder_precision)
        hint = CALIBRATE if decoder_precision == "int4" else ""
        _require(report(check_decoder(checkpoint, decoder_file, decoder_precision)), "decoder", hint)
        variants = write_variants(decoder_file) if decoder_precision in BLOCKS else {}
        if "prefill_file" in variants:
            rows = check_decoder(checkpoint, variants["prefill_file"], decoder_precision, "prefill")
            _require(report(rows), "decoder for prompts")
        if "kernels_file" in variants and (missing := kernels.unavailable()):
            print(f"warning: decoder/kernels.onnx is not compared with PyTorch: {missing}", file=sys.stderr)
        elif "kernels_file" in variants:
            rows = check_decoder(checkpoint, variants["kernels_file"], decoder_precision, "kernels")
            _require(report(rows), "decoder with kernels")
        if portable:
            kind = portable_precision(decoder_precision)
            portable_file = export_decoder(checkpoint, folder / "decoder", kind, "portable", capacity)
            rows = check_decoder(checkpoint, portable_file, kind, "portable")
            _require(report(rows), "portable decoder")
        part = decoder_part(
            checkpoint,
            decoder_precision,
            "decoder/model.onnx",
            portable_file="decoder/portable.onnx" if portable else None,
            sampler_file="decoder/sampler.onnx",
            **{key: f"decoder/{file.name}" for key, file in variants.items()},
        )
        onnx.save(sampler_graph(part.vocab_size, part.kv_dtype), str(folder / part.sampler_file))
        return {
            "image": image.to_dict(),
            "prompt": prompt.to_dict(),
            "tokenizer": tokenizer,
            "encoder": asdict(_encoder_part(checkpoint, precision)),
            "decoder": {key: value for key, value in asdict(part).items() if value is not None},
        }

    write_bundle(out, fill, name_of(checkpoint), installed_versions(PRODUCERS))


def portable_precision(decoder_precision: str) -> str:
    """Of the graph for an engine, beside a decoder of another kind."""
    return decoder_precision if decoder_precision in ("fp32", "fp16") else "fp16"


def image_rule(checkpoint: Checkpoint, resolution: int) -> ImageRule:
    """The checkpoint's preprocessing.

    `image_aspect_ratio` other than `pad` is a centre crop in the original; `any` is what `train/` writes for its own.
    """
    mean, std = checkpoint.pixel_statistics
    aspect = checkpoint.config.get("image_aspect_ratio")
    return ImageRule(
        mean=mean,
        std=std,
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


def _encoder_part(checkpoint: Checkpoint, precision: str) -> EncoderPart:
    return EncoderPart(
        file=f"encoder/{precision}.onnx",
        precision=precision,
        hidden_size=checkpoint.llama_config.hidden_size,
        stride=checkpoint.encoder_config.stride,
    )


def _require(good: bool, part: str, hint: str = "") -> None:
    if not good:
        raise ParityError(f"the exported {part} does not compute what the checkpoint does; no bundle was written{hint}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.bundle", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="folder or Hub id in the released layout; default: the demo model")
    parser.add_argument("--res", type=int, help="default side of the images, pixels; default: the checkpoint's")
    parser.add_argument("--out", type=Path, help="the bundle's folder; default: build/bundle/<checkpoint>")
    parser.add_argument("--precision", default="fp32", help="of the encoder: fp32 or fp16; default: fp32")
    parser.add_argument("--decoder-precision", default="fp32", help="fp32, fp16, int8, int4 or w4a16; default: fp32")
    parser.add_argument("--portable-decoder", action="store_true", help="add the decoder of standard operators")
    parser.add_argument("--capacity", type=int, metavar="N", help=CAPACITY_HELP)
    parser.add_argument("--template", help=f"one of {', '.join(TEMPLATES)}; default: the checkpoint's, or vicuna_v1")
    args = parser.parse_args(argv)
    encoder_export.check_precision(args.precision)
    check_options(args.decoder_precision, capacity=None if args.portable_decoder else args.capacity)
    if args.portable_decoder:
        check_options(portable_precision(args.decoder_precision), "portable", args.capacity)
    checkpoint = open_checkpoint(args.checkpoint)
    resolution = choose_resolution(args.res, checkpoint)
    out = args.out or DEMO_BUNDLE.parent / name_of(checkpoint)
    portable, precision = args.portable_decoder, args.decoder_precision
    export_bundle(checkpoint, out, resolution, args.precision, precision, portable, args.capacity, args.template)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: encoder {args.precision}, decoder {args.decoder_precision}, {size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    run(main)
