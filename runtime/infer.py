"""Ask a bundle about pictures, on the terminal.

python runtime/infer.py --bundle DIR --image FILE... --prompt TEXT     one answer, streamed, and a table of its cost
python runtime/infer.py --bundle DIR --image FILE...                   a chat about the pictures
python runtime/infer.py ... --json                                     one JSON object instead
python runtime/infer.py --bundle DIR --batch QUESTIONS --out ANSWERS   many questions, several at once, JSONL to JSONL
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if __name__ == "__main__":  # as a file, its own folder is on the path instead of the project's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runtime.command import run
from runtime.errors import UserError

if TYPE_CHECKING:
    from runtime.model import Model
    from runtime.types import Options, Piece, Result, Trace


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument(
        "--image", nargs="+", action="extend", default=[], metavar="FILE", help="pictures, in the prompt's order"
    )
    parser.add_argument("--prompt", help="question, <image> in it says where a picture goes; without it: a chat")
    parser.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help='JSONL, a question a line: {"image": PATH or [PATH, ...], "prompt": TEXT}, where wanted with "id" '
        '(default: the line\'s number), "max_new_tokens", "system"; paths are relative to the file\'s folder',
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="of --batch: JSONL, a line for each question as it is finished, in any order: text, finish_reason, "
        "visual_tokens, prompt_tokens and new_tokens, or error. Questions that have a line are left out, so that the "
        "same command goes on after Ctrl-C. Exit code 1 where a line is an error",
    )
    parser.add_argument(
        "--max-batch",
        type=int,
        metavar="N",
        help="of --batch: answers decoded at once; default: 8, or as many as fit the memory",
    )
    parser.add_argument("--system", help="system text; default: the bundle's")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 (default): all")
    parser.add_argument("--seed", type=int, metavar="S", help="of the draw, for the same answer again")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R")
    parser.add_argument("--json-schema", type=Path, metavar="FILE", help="that the answer, a JSON text, follows")
    parser.add_argument("--stop", action="append", default=[], metavar="STR", help="end the answer here; repeatable")
    parser.add_argument("--res", type=int, metavar="N", help="side of the images, pixels; default: the bundle's")
    parser.add_argument("--aspect", metavar="MODE", help="pad, crop or any (keep the ratio); default: the bundle's")
    parser.add_argument(
        "--encoder",
        default="auto",
        metavar="RUNTIME",
        help="onnx, kernels (INT8, no calibration), openvino, tensorrt or auto (default): a TensorRT engine where one "
        "fits the GPU, else onnx",
    )
    parser.add_argument("--encoder-precision", metavar="P", help="fp32, fp16, bf16, int8, fp8; default: the bundle's")
    parser.add_argument(
        "--decoder",
        default="auto",
        metavar="RUNTIME",
        help="onnx, tensorrt, kernels, kernels24 (with the ids of float32 products) or auto (default): kernels where "
        "they are faster, else onnx",
    )
    parser.add_argument(
        "--provider", default="cpu", metavar="NAME", help="of ONNX Runtime: cpu, cuda, tensorrt or nv_tensorrt_rtx"
    )
    parser.add_argument(
        "--kv-precision",
        default="auto",
        metavar="P",
        help="of the KV cache: fp32, fp16 (half the memory, slower), int8 (about a quarter, this project's kernels) "
        "or auto (default): fp32 if that fits the memory, else fp16",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of one operator; default: one a physical core")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="save the first image with the answer's boxes drawn")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="save pixel_values, image_embeds, first_logits (.npy)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    check_batch(args)
    if args.draw and args.draw.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--draw: {args.draw} is neither .png nor .jpg")
    for option in ("json", "dump", "draw"):
        if getattr(args, option) and (args.prompt is None or (option == "draw" and not args.image)):
            raise UserError(f"--{option} needs --prompt" + " and --image" * (option == "draw"))
    if args.draw and not args.draw.parent.is_dir():
        raise UserError(f"--draw: no folder {args.draw.parent}")
    if args.dump:
        args.dump.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    from runtime.backends.select import Backends
    from runtime.demo import demo_bundle
    from runtime.model import load
    from runtime.text.grammar import read_schema
    from runtime.types import Options, Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)
    schema = read_schema(args.json_schema) if args.json_schema else None
    options = Options(args.max_new_tokens, sampling, tuple(args.stop), args.res, args.aspect, args.system, schema)
    backends = Backends(
        args.encoder,
        args.decoder,
        args.provider,
        args.encoder_precision,
        args.threads,
        kv_precision=args.kv_precision,
    )
    bundle = args.bundle or demo_bundle()
    if args.batch:
        from runtime.batch.run import answer_batch

        return answer_batch(args.batch, args.out, bundle, options, backends, args.max_batch)
    model = load(bundle, backends=backends)
    if args.prompt is None:
        chat(model, args.image, options)
    else:
        answer(model, args, options)
    return 0


def check_batch(args: argparse.Namespace) -> None:
    """Raises UserError where options are given that do not go with --batch, or only with it."""
    if args.batch is None:
        for option in ("out", "max_batch"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')} needs --batch")
        return
    if args.out is None:
        raise UserError("--batch needs --out, the file that answers are written to")
    for option in ("image", "prompt", "json", "draw", "dump"):
        if getattr(args, option):
            raise UserError(f"--{option} does not go with --batch, whose questions come from the file")


def answer(model: "Model", args: argparse.Namespace, options: "Options") -> None:
    """One question: the answer streamed and a table, or one JSON object."""
    from runtime.types import Trace

    trace = Trace()
    pieces = model.generate(args.image, args.prompt, options, trace)
    if args.json:
        *_, last = pieces
        result = cast("Result", last.result)
        print(json.dumps(_as_json(model, result)))
    else:
        result = _stream(pieces)
        print("\n" + table(model, result))
    if args.draw:
        _draw(args.draw, args.image[0], result.text)
    if args.dump:
        _dump(args.dump, trace)


def chat(model: "Model", images: list[str], options: "Options") -> None:
    """Questions from standard input until it ends; the pictures come with the first one and are encoded once."""
    from runtime.image.decode import open_image

    if isinstance(stdin := sys.stdin, io.TextIOWrapper):  # what is no text is an error of its question alone
        stdin.reconfigure(errors="surrogateescape")
    pictures = [open_image(image) for image in images]  # a bad file is an error before the first question
    conversation = model.chat(options)
    print(f"{model.bundle.name}: {len(images)} image(s). An empty line or end of input leaves.", file=sys.stderr)
    while question := _read_question():
        pieces = conversation.ask(question, pictures)
        try:
            first = next(pieces)
            pictures = []  # they are in the cache now
            result = _stream(chain([first], pieces))
        except KeyboardInterrupt:
            print()
            continue
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        timings = result.timings
        rate = f", {timings.decode_tokens_per_s:.1f} tokens/s" if timings.decode_tokens_per_s else ""
        print(f"[{result.prompt_tokens} new positions, first token {timings.ttft_ms:.0f} ms{rate}]", file=sys.stderr)


def _read_question() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _stream(pieces: "Iterator[Piece]") -> "Result":
    """Print the text as it comes; returns the result."""
    result = None
    for piece in pieces:
        print(piece.text, end="", flush=True)
        result = piece.result
    print()
    return cast("Result", result)  # which the last piece has


def table(model: "Model", result: "Result") -> str:
    timings = result.timings
    rate = timings.decode_tokens_per_s
    rows = [
        ("encoder", f"{model.encoder_backend}"),
        ("decoder", f"{model.decoder_backend}"),
        ("visual tokens", f"{result.visual_tokens}"),
        ("prompt tokens", f"{result.prompt_tokens}"),
        ("new tokens", f"{len(result.token_ids)} ({result.finish_reason})"),
        ("load", f"{model.load_ms:.0f} ms"),
        ("preprocess", f"{timings.preprocess_ms:.1f} ms"),
        ("encode", f"{timings.encode_ms:.1f} ms"),
        ("prefill", f"{timings.prefill_ms:.1f} ms"),
        ("time to first token", f"{timings.ttft_ms:.1f} ms"),
        ("decode", f"{rate:.1f} tokens/s" if rate else "-"),
        ("peak memory", f"{peak_memory_mib():.0f} MiB"),
    ]
    rows += [("note", backend.reason) for backend in (model.encoder_backend, model.decoder_backend) if backend.reason]
    return "\n".join(f"{name:<20} {value:>20}" for name, value in rows)


def _as_json(model: "Model", result: "Result") -> dict[str, Any]:
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "visual_tokens": result.visual_tokens,
        "prompt_tokens": result.prompt_tokens,
        "timings": {"load_ms": model.load_ms, **asdict(result.timings)},
        "peak_memory_mib": peak_memory_mib(),
        "encoder": model.encoder_backend.to_dict(),
        "decoder": model.decoder_backend.to_dict(),
    }


def peak_memory_mib() -> float:
    """The most memory this process has held, MiB; pages of mapped weights count once touched."""
    # getrusage's figure begins at the size of whichever process started this one
    with suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(match[1]) / 1024
    import resource

    kilobyte = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte / 2**20


def _draw(file: Path, image: str, answer: str) -> None:
    from runtime.image.decode import open_image
    from runtime.text.boxes import draw_boxes, read_boxes

    if boxes := read_boxes(answer):
        draw_boxes(open_image(image), boxes).save(file)
        print(f"box drawn: {file}", file=sys.stderr)
    else:
        print(f"no box in the answer, so {file} is not written", file=sys.stderr)


def _dump(folder: Path, trace: "Trace") -> None:
    """pixel_values.npy [3, H, W] (several images: pixel_values-0.npy, ...), image_embeds.npy, first_logits.npy."""
    import numpy as np

    for pattern in ("pixel_values.npy", "pixel_values-[0-9]*.npy", "image_embeds.npy"):
        for old in folder.glob(pattern):
            old.unlink()
    for number, pixel_values in enumerate(trace.pixel_values):
        suffix = "" if len(trace.pixel_values) == 1 else f"-{number}"
        np.save(folder / f"pixel_values{suffix}.npy", pixel_values)
    if trace.image_embeds is not None:
        np.save(folder / "image_embeds.npy", trace.image_embeds)
    if trace.first_logits is not None:
        np.save(folder / "first_logits.npy", trace.first_logits)


if __name__ == "__main__":
    run(main)
