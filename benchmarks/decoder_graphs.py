"""The decoder's graphs side by side: ONNX Runtime GenAI's fused one in each precision, our portable one.

    python -m benchmarks.decoder_graphs [--checkpoint DIR]

Each is exported, opened, checked against PyTorch and timed on ONNX Runtime: a prompt of 614 positions (576 of them an
image at 1536) and 48 single steps after it. Rounds go through all graphs in turn, so that a slow minute of the machine
falls on all of them; medians are recorded.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import onnx

from benchmarks import record
from export.cli import BUILD, name_of, open_checkpoint
from export.decoder import PortableSequence, check_decoder, decoder_part, export_decoder
from runtime.decoder import Decoder

GRAPHS = [("fused", "fp32"), ("portable", "fp32"), ("fused", "fp16"), ("fused", "int8"), ("fused", "int4")]
IMAGE_TOKENS, TEXT_TOKENS, STEPS, ROUNDS = 576, 38, 48, 5
CAPACITY = IMAGE_TOKENS + TEXT_TOKENS + STEPS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder_graphs", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="default: the demo model")
    checkpoint = open_checkpoint(parser.parse_args().checkpoint)
    ids, images = prompt(checkpoint.llama_config.hidden_size)
    rows, starts = [], []
    for graph, precision in GRAPHS:
        row, start = prepare(checkpoint, graph, precision)
        rows.append(row)
        starts.append(start)
    samples = [([], []) for _ in GRAPHS]
    for _ in range(ROUNDS + 1):
        for start, (prefill, rate) in zip(starts, samples, strict=True):
            milliseconds, tokens_per_s = measure(start(), ids, images)
            prefill.append(milliseconds)
            rate.append(tokens_per_s)
    for row, (prefill, rate) in zip(rows, samples, strict=True):
        row["prefill_ms"] = round(statistics.median(prefill[1:]), 1)  # the first round warms up
        row["decode_tokens_per_s"] = round(statistics.median(rate[1:]), 1)
        print(row, flush=True)
    record.write("decoder_graphs", rows)


def prompt(hidden: int) -> tuple[list[int], np.ndarray]:
    """(ids, image embeds [IMAGE_TOKENS, hidden])."""
    images = np.random.default_rng(0).standard_normal((IMAGE_TOKENS, hidden), dtype=np.float32) * 0.1
    return [*range(100, 104), *range(-1, -IMAGE_TOKENS - 1, -1), *range(104, 100 + TEXT_TOKENS)], images


def prepare(checkpoint, graph: str, precision: str) -> tuple[dict, callable]:
    """(what can be said before timing, a function that starts a fresh sequence)."""
    folder = BUILD / "decoder" / f"{name_of(checkpoint)}-{precision}"
    begin = time.perf_counter()
    file = export_decoder(checkpoint, folder, precision, graph, CAPACITY)
    export_s = time.perf_counter() - begin
    error = max(row.error for row in check_decoder(checkpoint, file, precision, graph))
    nodes = onnx.load(file, load_external_data=False).graph.node
    part = decoder_part(checkpoint, precision, file.name)
    begin = time.perf_counter()
    if graph == "fused":
        decoder = Decoder(file, part)
        start = lambda: decoder.start(CAPACITY)  # noqa: E731
    else:
        portable = PortableSequence(file)
        start = portable.restart
    row = {
        "graph": graph,
        "precision": precision,
        "export_s": round(export_s, 1),
        "load_ms": round((time.perf_counter() - begin) * 1000),
        "size_mb": round(sum(Path(path).stat().st_size for path in folder.glob(f"{file.name}*")) / 1e6, 1),
        "nodes": len(nodes),
        "relative_error": float(f"{error:.2e}"),
    }
    return row, start


def measure(sequence, ids: list[int], images: np.ndarray) -> tuple[float, float]:
    """(prefill ms, decode tokens/s)."""
    begin = time.perf_counter()
    sequence.forward(ids, images)
    prefill = time.perf_counter()
    for step in range(STEPS):
        sequence.forward([200 + step])
    return (prefill - begin) * 1000, STEPS / (time.perf_counter() - prefill)


if __name__ == "__main__":
    main()
