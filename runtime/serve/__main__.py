"""Serve a bundle over HTTP as OpenAI's chat completions are.

python -m runtime.serve --bundle DIR [--host 127.0.0.1] [--port 8000] [--max-batch 8] [--max-queue 64] ...
python -m runtime.serve --bundle DIR --check     what would be served, on what; nothing is served
"""

import argparse
import logging
import math
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from runtime.backends.memory_plan import mebibytes
from runtime.command import run
from runtime.errors import UserError

if TYPE_CHECKING:
    from runtime.backends.memory_plan import Plan
    from runtime.bundle.manifest import Bundle
    from runtime.model import Model
    from runtime.serve.settings import Settings
    from runtime.serve.sizing import Sizing


logger = logging.getLogger("convllava.serve")


def parse(argv: list[str] | None) -> argparse.Namespace:
    from runtime.backends.memory_plan import KV_PRECISIONS
    from runtime.backends.ort_session import PROVIDERS
    from runtime.backends.select import DECODERS, ENCODERS, PRECISIONS
    from runtime.image.preprocess import ASPECTS

    parser = argparse.ArgumentParser(prog="python -m runtime.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s; others want --api-key-file")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key-file", type=Path, metavar="F", help="a key a line, one of which clients must send")
    parser.add_argument("--no-api-key", action="store_true", help="serve other hosts without keys")
    parser.add_argument("--stop-timeout", type=float, default=30.0, metavar="S", help="for what runs, when stopped")
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: lines of JSON, one a request among them"
    )
    parser.add_argument(
        "--docs", action="store_true", help="/docs, a page about /openapi.json that browsers load from a CDN"
    )
    parser.add_argument("--check", action="store_true", help="say what would be served and end")
    # Those of `Settings`, which has the defaults
    settings = parser.add_argument_group("what is served, and within which limits", argument_default=argparse.SUPPRESS)
    settings.add_argument("--bundle", help="folder made by export.bundle; default: the demo model's")
    settings.add_argument(
        "--max-batch", type=int, metavar="N", help="answers decoded at once; default: 8, or as many as fit the memory"
    )
    settings.add_argument(
        "--context", type=int, metavar="N", help="positions of a sequence; default: the model's, or what fits"
    )
    settings.add_argument("--kv-precision", choices=KV_PRECISIONS, help="of the KV cache; default: fp32 if that fits")
    settings.add_argument("--max-queue", type=int, metavar="N", help="requests that may wait; default: 64")
    settings.add_argument(
        "--no-batch-invariant",
        dest="batch_invariant",
        action="store_false",
        help="4 and 8 bits: faster alone, not quite the same in a crowd",
    )
    settings.add_argument("--allow-remote-images", nargs="+", metavar="HOST", help="images may come from")
    settings.add_argument(
        "--allowed-host",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="names to be asked by, besides localhost; default: any, but localhost alone on this machine without keys",
    )
    settings.add_argument(
        "--cors-origin", nargs="+", action="extend", metavar="ORIGIN", help="whose pages may ask; default: none"
    )
    settings.add_argument(
        "--res", type=int, metavar="N", help="side that images are sized to, pixels; default: the bundle's"
    )
    settings.add_argument("--aspect", choices=ASPECTS, help="pad to a square, any ratio or crop; default: the bundle's")
    settings.add_argument(
        "--enable-mm-embeds", action="store_true", help="clients may send embeddings of images; only for trusted ones"
    )
    settings.add_argument("--max-images", type=int, metavar="N", help="of a request; default: 8")
    settings.add_argument(
        "--max-image-bytes", type=int, metavar="N", help="default: 20 MiB; a body may have 64 MiB, or what one needs"
    )
    settings.add_argument("--max-image-pixels", type=int, metavar="N", help="default: 50 million")
    settings.add_argument(
        "--image-cache-bytes",
        type=int,
        metavar="N",
        help="of embeddings of images seen before; default: up to 256 MiB",
    )
    settings.add_argument("--max-output", type=int, metavar="N", help="new tokens of an answer; default: 4096")
    settings.add_argument("--timeout", type=float, metavar="S", help="seconds that a request may take; default: 300")
    settings.add_argument("--encoder", choices=ENCODERS, help="default: auto")
    settings.add_argument("--encoder-precision", choices=PRECISIONS, help="default: the bundle's")
    settings.add_argument("--decoder", choices=DECODERS, help="default: auto")
    settings.add_argument("--provider", choices=list(PROVIDERS), help="default: cpu")
    settings.add_argument("--threads", type=int, metavar="N", help="of one operator; default: one a physical core")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    chosen = vars(parse(argv))
    host, port, key_file, no_key, stop_seconds, check, docs = (
        chosen.pop(name) for name in ("host", "port", "api_key_file", "no_api_key", "stop_timeout", "check", "docs")
    )
    as_json = chosen.pop("log_format") == "json"
    if as_json:
        from runtime.serve.request_record import log_as_json

        log_as_json()
    from runtime.serve.origins import is_loopback

    keys = read_keys(key_file) if key_file else ()
    if not is_loopback(host) and not keys and not no_key:
        raise UserError(f"--host {host} can be reached by others: give --api-key-file, or --no-api-key")
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, expected 0 to 65535")
    if not 0 <= stop_seconds < math.inf:
        raise UserError(f"--stop-timeout is {stop_seconds}, expected seconds")
    if chosen.get("decoder") == "tensorrt":
        raise UserError("a server decodes several answers at once; engines hold one sequence: --decoder auto")
    from runtime.serve.settings import Settings

    for name in {"allow_remote_images", "allowed_host", "cors_origin"} & chosen.keys():
        chosen[name] = ",".join(chosen[name])
    settings = Settings.of(**chosen)
    address = None if check else bound(host, port)  # a port in use is told before the model is loaded
    settings, plan = settings.fitted()
    model = settings.load()
    sizing = settings.sizes(model.bundle.image).default
    served = described(model, plan, sizing)
    if as_json and not check:
        logger.info("%s", served)
    else:
        print(served, file=sys.stdout if check else sys.stderr)
    if not plan.fits and as_json:
        logger.warning("%s", too_large(plan))
    elif not plan.fits:
        print(f"warning: {too_large(plan)}", file=sys.stderr)
    if address is None:
        print(_aligned(plan.rows()))
        for row in engine_rows(model.bundle):
            print(row)
    else:
        serve(settings, model, keys, address, stop_seconds, docs)
    return 0


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet. Raises UserError where it cannot be had."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from error
    return found


def serve(
    settings: "Settings",
    model: "Model",
    keys: tuple[str, ...],
    address: socket.socket,
    stop_seconds: float,
    docs: bool,
) -> None:
    import uvicorn

    logging.getLogger("convllava").setLevel(logging.INFO)

    from runtime.serve.app import create_app
    from runtime.serve.metrics import Metrics
    from runtime.serve.settings import listed

    metrics = Metrics()
    service = settings.service(model, metrics)
    hosts, origins = listed(settings.allowed_host), listed(settings.cors_origin)
    app = create_app(service, metrics, keys, stop_seconds, hosts, origins, docs)

    class Server(uvicorn.Server):
        """Told to stop, it lets the scheduler finish or fail what runs while the connections are still there."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            threading.Thread(target=service.scheduler.stop, args=(stop_seconds,), daemon=True).start()
            super().handle_exit(sig, frame)

    to_say_so = 5  # seconds
    patience = math.ceil(stop_seconds) + to_say_so
    # httptools, which uvicorn would prefer, takes headers without end
    # Without a log_config uvicorn's lines go where ours go
    config = uvicorn.Config(app, http="h11", log_config=None, log_level="warning", timeout_graceful_shutdown=patience)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which uvicorn raises again once it has stopped
    Server(config).run(sockets=[address])


def too_large(plan: "Plan") -> str:
    """What to do about a plan that does not fit."""
    total, available = (dict(plan.rows())[name] for name in ("total at most", "available"))
    return (
        f"all slots full would take {total}, {available} are available: lower --max-batch, --context or "
        "--image-cache-bytes, or --kv-precision fp16 or int8"
    )


def described(model: "Model", plan: "Plan", sizing: "Sizing") -> str:
    """What is served, and what each slot may take."""
    rows = [
        ("model", model.bundle.name),
        ("encoder", f"{model.encoder_backend}"),
        ("decoder", f"{model.decoder_backend}"),
        ("images", f"{sizing.resolution} pixels, {sizing.aspect}"),
        ("context", f"{plan.context} positions"),
        ("KV cache", f"{plan.slots} slots of up to {mebibytes(plan.kv_bytes // plan.slots)} in {plan.kv_precision}"),
        ("memory", ", ".join(f"{name} {size}" for name, size in plan.rows()[5:])),
    ]
    rows += [("note", backend.reason) for backend in (model.encoder_backend, model.decoder_backend) if backend.reason]
    return _aligned(rows)


def engine_rows(bundle: "Bundle") -> list[str]:
    """Every engine of the bundle, and whether it is whole."""
    from runtime.bundle.engines import find_engines, verify_engine

    rows: list[tuple[str, str]] = []
    for section in ("encoder", "decoder"):
        try:
            engines = find_engines(bundle, section)
        except UserError as error:
            rows.append((f"{section} engine", str(error)))
            continue
        for engine in engines:
            try:
                verify_engine(bundle, engine)
                state = "whole, of this bundle"
            except UserError as error:
                state = str(error)
            rows.append((f"{section} engine", f"{engine}: {state}"))
    return [_aligned([row]) for row in rows]


def _aligned(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<16} {value}" for name, value in rows)


def read_keys(file: Path) -> tuple[str, ...]:
    """The lines of a file in UTF-8 that are not empty, without byte order marks.

    Raises:
        UserError: the file cannot be read, is not UTF-8 or has no key.
    """
    try:
        text = file.read_text(encoding="utf-8").replace("\ufeff", "")  # which editors put before the first line
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--api-key-file {file}: {error}; UTF-8 is expected") from error
    if "\0" in text:
        raise UserError(f"--api-key-file {file}: it has zero bytes as UTF-16 does; UTF-8 is expected")
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys:
        raise UserError(f"--api-key-file {file}: no key in it, expected one a line")
    return keys


if __name__ == "__main__":
    run(main)
