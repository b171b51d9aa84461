"""The decoder through this project's runtime and through what a user would take instead, side by side.

    python -m benchmarks.decode [--bundle DIR] [--checkpoint ID] [--peers NAME ...] [--contexts N ...] [--batches N ...]
                                [--tokens N ...] [--decoder NAME] [--rounds N] [--threads N] [--json F]

Every library runs in a process of its own, llama.cpp in the environment that `make peers` makes. They take turns, a
round through all, so that a slow minute of the machine falls on all of them; the first round warms up. Medians are
recorded, and the median of the ratios round by round; above 1 this project is ahead. Each peer is compared with our
decoder of the same weights: float32, or 4 bits where the peer has 4; with the decoder of --bundle, where one is named.
llama.cpp has its own 4-bit formats of the checkpoint (`benchmarks.peers.products`), of which it repacks some for the
processor, and its usual cache in 16 bits; ours has a cache in 32. GenAI's own 4 bits are others.

prefill: so many image embeds (ids where a library cannot begin with embeds) to the first token. decode: greedy steps
after so many ids of English; `same` counts the ids that agree with ours before the first that differs. With a batch, so
many sequences after the same BATCH_CONTEXT ids, all of whose tokens count.
limit: what the machine allows at best, going through the weights' file and each cache once a step, or multiplying as
fast as a large product does: one of float32, or one of bytes, where weights of 4 or 8 bits meet inputs in 8; `reached`
is our share of it.
"""

import argparse
import os
import tempfile
from pathlib import Path

from benchmarks import record
from benchmarks.calibration import english
from benchmarks.limits import DecoderFiles, decoder_limit, machine_limits
from benchmarks.llama_folder import write_llama
from benchmarks.peers.decoders import PEERS
from benchmarks.peers.products import gguf_files
from benchmarks.peers.turns import (
    Running,
    add_model_options,
    compared,
    genai_export,
    in_turn,
    installed,
    open_model,
    optimum_export,
    same,
    start_peer,
    versions_of_peers,
)
from export.bundle import export_bundle
from export.cli import BUILD
from runtime.backends.select import KERNELS
from runtime.bundle.manifest import open_bundle
from train.data.tokenizer import load_tokenizer

LLAMA_CPP = [name for name in PEERS if name.startswith("llama.cpp-")]
FOUR_BITS = (*LLAMA_CPP, "ort-genai")  # the others compute in float32 or bfloat16
STEPS = 32
BATCH_CONTEXT = 256
KIND = "decoders"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.split("\n")[0])
    known = [name for name in PEERS if name != "ours"]
    add_model_options(parser, "made of the checkpoint, with each precision that peers have")
    parser.add_argument(
        "--peers", nargs="*", default=known, choices=[*known, "llama.cpp"], help="default: all that are installed"
    )
    parser.add_argument("--contexts", nargs="*", type=int, default=[128, 640, 2048, 4096], metavar="N")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument(
        "--tokens", nargs="*", type=int, default=[64, 144, 256, 640, 1024], metavar="N", help="to prefill"
    )
    products = ("auto", "onnx", *KERNELS)
    parser.add_argument("--decoder", default="auto", choices=products, help="ours, as infer.py has it; default: auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="F", help="default: benchmarks/results/decode.json")
    args = parser.parse_args()
    checkpoint, bundle = open_model(parser, args)
    named = [name for peer in args.peers for name in (LLAMA_CPP if peer == "llama.cpp" else [peer])]
    args.peers = installed(parser, named)
    limits = machine_limits(args.threads)
    about = {"threads": args.threads, "versions_of_peers": versions_of_peers()}
    about["limits"] = {key: round(value, 1) for key, value in limits.items()}
    capacity = max([*args.contexts, *args.tokens, BATCH_CONTEXT]) + STEPS + 1
    common = {"threads": args.threads, "capacity": capacity}
    common |= {"hidden": checkpoint.llama_config.hidden_size, "checkpoint": str(checkpoint.folder)}
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        common["folders"] = folders(checkpoint, Path(folder), args.peers)
        bundles = {bundle.decoder.precision: bundle} if bundle else {}
        beside = {name: bundle.decoder.precision if bundle else precision_of(name) for name in args.peers}
        for precision in sorted(set(beside.values()) - bundles.keys()):
            out = Path(folder, precision)
            export_bundle(checkpoint, out, checkpoint.resolution, decoder_precision=precision)
            bundles[precision] = open_bundle(out)
        common["ids"] = english(load_tokenizer(checkpoint.folder).encode, capacity)
        ours = {
            precision: Running(
                KIND, "ours", common | {"bundle": str(bundle.folder), "products": products_of(precision, args)}
            )
            for precision, bundle in bundles.items()
        }
        theirs = {name: start_peer(KIND, name, common) for name in args.peers}
        rows = measured(ours, theirs, beside, args)
        for row in rows:
            row |= decoder_limit(row, DecoderFiles.of(bundles[row["precision"]]), checkpoint.llama_config, limits)
            print(row, flush=True)
        for worker in (*ours.values(), *theirs.values()):
            worker.close()
    record.write("decode", rows, args.json, about)


def products_of(precision: str, args: argparse.Namespace) -> str:
    """There are kernels for 4 and 8 bits alone."""
    return args.decoder if precision in ("int4", "int8") else "auto"


def precision_of(peer: str) -> str:
    return "int4" if peer in FOUR_BITS else "fp32"


def folders(checkpoint, folder: Path, peers: list[str]) -> dict[str, str]:
    """What libraries make of the language model for themselves."""
    found, source = {}, folder / "llama"
    forms = [name.removeprefix("llama.cpp-") for name in peers if name in LLAMA_CPP]
    files = gguf_files(checkpoint.folder, folder, forms) if forms else {}
    found |= {f"llama.cpp-{form}": str(file) for form, (file, _) in files.items()}
    write_llama(checkpoint, source)
    if "optimum" in peers:
        optimum_export(source, folder / "optimum")
        found["optimum"] = str(folder / "optimum")
    if "ort-genai" in peers:
        genai_export(source, folder / "ort-genai")
        found["ort-genai"] = str(folder / "ort-genai")
    return found


def measured(
    ours: dict[str, Running], theirs: dict[str, Running], beside: dict[str, str], args: argparse.Namespace
) -> list[dict]:
    """A row for each piece of work and peer. beside: peer -> precision of ours that it is compared with."""
    pieces = [("prefill", {"tokens": tokens}, 1) for tokens in args.tokens]
    pieces += [("decode", {"context": context, "steps": STEPS}, 1) for context in args.contexts]
    pieces += [("decode", {"context": BATCH_CONTEXT, "steps": STEPS, "batch": batch}, batch) for batch in args.batches]
    rows = []
    for work, arguments, batch in pieces:
        taking = {name: worker for name, worker in theirs.items() if batch == 1 or PEERS[name].batches}
        needed = {beside[name] for name in taking}
        workers = {name: worker for name, worker in ours.items() if name in needed} | taking
        answers = in_turn(workers, args.rounds, work, **arguments)
        for peer in taking:
            precision = beside[peer]
            own, other = answers[precision], answers[peer]
            size = arguments.get("tokens") or arguments["context"]
            row = {"work": work, "peer": peer, "precision": precision, "batch": batch, "context": size}
            if work == "prefill":
                row |= {"metric": "ms", "same": "", **compared(own, other)}
            else:
                row |= {"metric": "tokens/s", "same": same(own[-1]["ids"], other[-1]["ids"])}
                row |= compared(own, other, batch * STEPS)
            row |= {"load_s": round(ours[precision].load_s, 2), "peer_load_s": round(theirs[peer].load_s, 2)}
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
