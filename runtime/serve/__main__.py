"""Serve a bundle over HTTP as OpenAI's chat completions are.

python -m runtime.serve --bundle DIR [--host 127.0.0.1] [--port 8000] [--max-batch 8] [--max-queue 64] ...
python -m runtime.serve --bundle DIR --check     what would be served, on what; nothing is served
"""

import argparse
import ipaddress
import math
import sys
import threading
from pathlib import Path

from runtime.errors import UserError

EXTRA = "pip install '.[cpu,serve]'"


def parse() -> argparse.Namespace:
    from runtime.backends import DECODERS, ENCODERS, PRECISIONS
    from runtime.session import PROVIDERS

    parser = argparse.ArgumentParser(prog="python -m runtime.serve", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s; others want --api-key-file")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=_positive, default=8, metavar="N", help="answers decoded at once")
    parser.add_argument("--max-queue", type=_positive, default=64, metavar="N", help="requests that may wait")
    parser.add_argument(
        "--no-batch-invariant", action="store_true", help="4 and 8 bits: faster alone, not quite the same in a crowd"
    )
    parser.add_argument("--api-key-file", type=Path, metavar="F", help="a key a line, one of which clients must send")
    parser.add_argument("--no-api-key", action="store_true", help="serve other hosts without keys")
    parser.add_argument("--allow-remote-images", nargs="+", default=[], metavar="HOST", help="images may come from")
    parser.add_argument("--max-images", type=_positive, default=8, metavar="N", help="of a request")
    parser.add_argument("--max-image-bytes", type=_positive, default=20 << 20, metavar="N")
    parser.add_argument("--max-image-pixels", type=_positive, default=50_000_000, metavar="N")
    parser.add_argument("--max-output", type=_positive, default=4096, metavar="N", help="new tokens of an answer")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="seconds that a request may take")
    parser.add_argument("--stop-timeout", type=float, default=30.0, metavar="S", help="for what runs, when stopped")
    parser.add_argument("--encoder", default="auto", choices=ENCODERS)
    parser.add_argument("--encoder-precision", choices=PRECISIONS)
    parser.add_argument("--decoder", default="auto", choices=DECODERS)
    parser.add_argument("--provider", default="cpu", choices=list(PROVIDERS))
    parser.add_argument("--threads", type=_positive, metavar="N", help="of one operator; default: one a physical core")
    parser.add_argument("--check", action="store_true", help="say what would be served and end")
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main() -> int:
    args = parse()
    keys = read_keys(args.api_key_file) if args.api_key_file else ()
    if not is_loopback(args.host) and not keys and not args.no_api_key:
        raise UserError(f"--host {args.host} can be reached by others: give --api-key-file, or --no-api-key")
    if args.decoder == "tensorrt":
        raise UserError("a server decodes several answers at once; engines hold one sequence: --decoder auto")
    from runtime.backends import Backends
    from runtime.model import load

    backends = Backends(args.encoder, args.decoder, args.provider, args.encoder_precision, args.threads)
    model = load(args.bundle, backends=backends)
    print(described(model, args.max_batch), file=sys.stdout if args.check else sys.stderr)
    if not args.check:
        serve(model, args, keys)
    return 0


def serve(model, args: argparse.Namespace, keys: tuple[str, ...]) -> None:
    import uvicorn

    from runtime.serve.api import create_app
    from runtime.serve.asking import Asking, Limits
    from runtime.serve.engine import Engine
    from runtime.serve.metrics import Metrics
    from runtime.serve.remote import Fetcher

    metrics = Metrics()
    engine = Engine(model, args.max_batch, args.max_queue, metrics, not args.no_batch_invariant)
    limits = Limits(
        image_bytes=args.max_image_bytes,
        image_pixels=args.max_image_pixels,
        images=args.max_images,
        output_tokens=args.max_output,
        seconds=args.timeout,
    )
    fetch = Fetcher(args.allow_remote_images, args.max_image_bytes) if args.allow_remote_images else None
    app = create_app(Asking(model, engine, limits, fetch), metrics, keys, args.stop_timeout)

    class Server(uvicorn.Server):
        """Told to stop, it lets the engine finish or fail what runs while the connections are still there."""

        def handle_exit(self, sig, frame):
            threading.Thread(target=engine.stop, args=(args.stop_timeout,), daemon=True).start()
            super().handle_exit(sig, frame)

    to_say_so = 5  # seconds
    patience = math.ceil(args.stop_timeout) + to_say_so
    config = uvicorn.Config(
        app, host=args.host, port=args.port, log_level="warning", timeout_graceful_shutdown=patience
    )
    Server(config).run()


def described(model, slots: int) -> str:
    """What is served, and what each slot may take."""
    from runtime.engines import find_engines, verify_engine

    part = model.decoder.part
    per_position = 2 * part.layers * part.kv_heads * part.head_dim * (2 if part.kv_dtype == "float16" else 4)
    rows = [
        ("model", model.bundle.name),
        ("encoder", f"{model.encoder_chosen}"),
        ("decoder", f"{model.decoder_chosen}"),
        ("images", f"{model.bundle.image.resolution} pixels, {model.bundle.image.aspect}"),
        ("context", f"{part.context_length} positions"),
        ("KV cache", f"{slots} slots of up to {per_position * part.context_length / 2**20:.0f} MiB"),
    ]
    rows += [("note", chosen.note) for chosen in (model.encoder_chosen, model.decoder_chosen) if chosen.note]
    for section in ("encoder", "decoder"):
        for engine in find_engines(model.bundle, section):
            try:
                verify_engine(model.bundle, engine)
                state = "whole, of this bundle"
            except UserError as error:
                state = str(error)
            rows.append((f"{section} engine", f"{engine}: {state}"))
    return "\n".join(f"{name:<16} {value}" for name, value in rows)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(file: Path) -> tuple[str, ...]:
    """Raises UserError where the file cannot be read or has no key."""
    try:
        keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: {error}") from error
    if not keys:
        raise UserError(f"--api-key-file {file}: no key in it, expected one a line")
    return keys


def run() -> None:
    try:
        status = main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in ("onnxruntime", "fastapi", "uvicorn", "prometheus_client", "pydantic"):
            raise
        print(f"error: no {error.name}; {EXTRA}", file=sys.stderr)
        status = 2
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    run()
