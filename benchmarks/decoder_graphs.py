"""The decoder's graphs side by side: the fused one in each precision, the same with this project's
kernels, and our portable one.

    python -m benchmarks.decoder_graphs [--checkpoint DIR]

Each is exported, opened, checked against PyTorch and timed on ONNX Runtime: a prompt of 614 positions (576 of them an
image at 1536) and 48 single steps after it; the perplexity is that of 1,022 tokens of English, fed one by one. Rounds
go through all graphs in turn, so that a slow minute of the machine falls on all of them; medians are recorded.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from benchmarks import record
from benchmarks.calibration import WINDOW, WINDOWS, english, perplexity
from export.cli import BUILD, name_of, open_checkpoint
from export.decoder.check import check_decoder
from export.decoder.export import decoder_part, export_decoder
from export.graphs.variants import write_variants
from runtime import kernels
from runtime.backends.base import Sequence
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_portable import PortableSequence
from train.data.tokenizer import load_tokenizer

GRAPHS = [("fused", "fp32"), ("portable", "fp32"), ("fused", "fp16")]
GRAPHS += [(graph, precision) for precision in ("int8", "int4") for graph in ("fused", "kernels")]
IMAGE_TOKENS, TEXT_TOKENS, STEPS, ROUNDS = 576, 38, 48, 5
CAPACITY = IMAGE_TOKENS + TEXT_TOKENS + STEPS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder_graphs", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="default: the demo model")
    checkpoint = open_checkpoint(parser.parse_args().checkpoint)
    ids, images = prompt(checkpoint.llama_config.hidden_size)
    text = np.array(english(load_tokenizer(checkpoint.folder).encode, WINDOWS * WINDOW)).reshape(WINDOWS, WINDOW)
    rows, starts = [], []
    for graph, precision in GRAPHS:
        row, start = prepare(checkpoint, graph, precision, text)
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


def weights_of(file: Path) -> list[Path]:
    """The graph's file and that of its weights."""
    data = {entry.value for tensor in onnx.load(file, load_external_data=False).graph.initializer
            for entry in tensor.external_data if entry.key == "location"}  # fmt: skip
    return [file, *(file.with_name(name) for name in sorted(data))]


def prepare(checkpoint, graph: str, precision: str, text: np.ndarray) -> tuple[dict, Callable[[], Sequence]]:
    """(what can be said before timing, a function that starts a fresh sequence)."""
    folder = BUILD / "decoder" / f"{name_of(checkpoint)}-{precision}"
    begin = time.perf_counter()
    file = export_decoder(checkpoint, folder, precision, graph.replace("kernels", "fused"), CAPACITY)
    if graph == "kernels":
        file = write_variants(file)["kernels_file"]
    export_s = time.perf_counter() - begin
    error = max(row.error for row in check_decoder(checkpoint, file, precision, graph))
    nodes = onnx.load(file, load_external_data=False).graph.node
    part = decoder_part(checkpoint, precision, file.name)
    begin = time.perf_counter()
    if graph == "portable":
        portable = PortableSequence(file)
        start = portable.restart
    else:
        decoder = OnnxDecoder(file, part, operators=kernels.library() if graph == "kernels" else None)
        start = lambda: decoder.start(CAPACITY)  # noqa: E731
    row = {
        "graph": graph,
        "precision": precision,
        "export_s": round(export_s, 1),
        "load_ms": round((time.perf_counter() - begin) * 1000),
        "size_mb": round(sum(path.stat().st_size for path in weights_of(file)) / 1e6, 1),
        "nodes": len(nodes),
        "relative_error": float(f"{error:.2e}"),
        "text_perplexity": "" if graph == "portable" else round(perplexity(decoder, text), 2),
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
