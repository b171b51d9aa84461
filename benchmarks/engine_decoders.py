"""What TensorRT makes of two ONNX graphs of the same decoder: ours (`--graph portable`) and optimum-onnx's.

    python -m benchmarks.engine_decoders [--checkpoint DIR] [--target sm89]

Both are exported in float32, checked against PyTorch, timed on ONNX Runtime's CPU provider (prompt and steps as in
benchmarks.decoder_graphs, with room for just those), converted to FP16 by the same code and built by TensorRT for RTX
with a profile for prefill and one for decoding. No engine is executed, so layers and bytes are compared, not speed.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import LlamaForCausalLM

from benchmarks import record
from benchmarks.decoder_graphs import CAPACITY, ROUNDS, measure, prompt
from benchmarks.llama_folder import write_llama
from benchmarks.peers.turns import optimum_export
from export.cli import open_checkpoint
from export.decoder.check import check_decoder
from export.decoder.export import decoder_part, export_decoder
from export.decoder.surgery import merge_image_embeds
from export.graphs.mixed_precision import half_graph, nodes_to_keep, to_half
from export.tensorrt import build as builder
from runtime.backends.ort_portable import PortableSequence
from runtime.bundle.manifest import DecoderPart
from train.model import Checkpoint, load_language_state

OPTIMUM_OPSET = 20
DECODE_OPT = 1024  # positions in the cache that optimum's decoding profile is tuned for


def export_optimum(checkpoint: Checkpoint, folder: Path) -> Path:
    """optimum-onnx's float32 export, with image embeds merged in: the cache is concatenated and comes back longer."""
    source, built, file = folder / "llama", folder / "optimum", folder / "optimum.onnx"
    write_llama(checkpoint, source)
    optimum_export(source, built, OPTIMUM_OPSET)
    model = onnx.load(str(built / "model.onnx"))
    merge_image_embeds(model)
    onnx.save(model, str(file), save_as_external_data=True, location=f"{file.name}.data", size_threshold=4096)
    return file


class OptimumSequence:
    """optimum's graph on ONNX Runtime: `present` is the next call's `past`."""

    def __init__(self, file: Path, part: DecoderPart):
        self._session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self._part = part
        hidden = next(value.shape[1] for value in self._session.get_inputs() if value.name == "image_embeds")
        self._no_images = np.empty((0, hidden), np.float32)
        self.restart()

    def restart(self) -> "OptimumSequence":
        part = self._part
        self._past = [np.empty((1, part.kv_heads, 0, part.head_dim), np.float32)] * (2 * part.layers)
        return self

    def forward(self, ids: list[int], image_embeds: np.ndarray | None = None) -> np.ndarray:
        """As `runtime.backends.base.Sequence.forward`."""
        length = self._past[0].shape[2]
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, length + len(ids)), np.int64),
            "position_ids": np.arange(length, length + len(ids), dtype=np.int64)[None],
            "image_embeds": self._no_images if image_embeds is None else image_embeds,
        }
        names = [f"past_key_values.{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(self._past))]
        logits, *self._past = self._session.run(None, feeds | dict(zip(names, self._past, strict=True)))
        return logits[0, -1]


def optimum_profiles(network: Any, options: builder.Options, context: int) -> list[dict[str, tuple]]:
    """As `export.tensorrt.build.profiles`, for optimum's inputs: prefill has no past, decoding any."""
    shapes = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}

    def shape(name: str, new: int, past: int, images: int) -> tuple:
        if name.startswith("past_key_values"):
            return (1, shapes[name][1], past, shapes[name][3])
        if name == "image_embeds":
            return (images, shapes[name][1])
        return (1, new + past if name == "attention_mask" else new)

    prefill = ((1, 0, 1), (builder.PREFILL_OPT, 0, builder.PREFILL_OPT), (context, context - 1, context))
    decode = ((1, 1, 0), (1, DECODE_OPT, 0), (1, context - 1, 0))
    return [{name: tuple(shape(name, *size) for size in sizes) for name in shapes} for sizes in (prefill, decode)]


def optimum_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """As `export.graphs.mixed_precision.half_graph`, for optimum's inputs."""
    random, length, feed = np.random.default_rng(0), 64, {}
    for value in model.graph.input:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name.startswith("past_key_values"):
            feed[value.name] = np.zeros((1, dims[1], 0, dims[3]), np.float32)
        elif value.name == "image_embeds":
            feed[value.name] = random.standard_normal((1, dims[1]), dtype=np.float32)
        elif value.name == "input_ids":
            feed[value.name] = random.integers(3, 1000, (1, length))
        else:
            feed[value.name] = np.arange(length)[None] if value.name == "position_ids" else np.ones((1, length), int)
    return to_half(model, nodes_to_keep(model, [feed]))


@dataclass
class Candidate:
    """A graph in float32. start: makes a fresh sequence with room for the benchmark's prompt and steps."""

    name: str
    file: Path
    sequence: PortableSequence | OptimumSequence
    error: float
    export_s: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_decoders", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="default: the demo model")
    parser.add_argument("--target", default="sm89", help="GPU to build for; default: sm89")
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.checkpoint)
    options = builder.Options(part="decoder", target=args.target)
    with tempfile.TemporaryDirectory() as folder:
        candidates = [portable(checkpoint, Path(folder)), optimum(checkpoint, Path(folder))]
        speeds = time_in_turn(candidates, checkpoint.llama_config.hidden_size)
        rows = []
        for candidate, (prefill, rate) in zip(candidates, speeds, strict=True):
            candidate.sequence = None  # the session's memory, before the builder wants its own
            row = {
                "graph": candidate.name,
                "nodes": len(onnx.load(candidate.file, load_external_data=False).graph.node),
                "relative_error": float(f"{candidate.error:.2e}"),
                "export_s": round(candidate.export_s, 1),
                "prefill_ms": round(prefill, 1),
                "decode_tokens_per_s": round(rate, 1),
                **built(candidate, options, checkpoint.llama_config.max_position_embeddings),
            }
            print(row, flush=True)
            rows.append(row)
    record.write("engine_decoders", rows)


def portable(checkpoint: Checkpoint, folder: Path) -> Candidate:
    begin = time.perf_counter()
    file = export_decoder(checkpoint, folder / "full", "fp32", "portable")
    seconds = time.perf_counter() - begin
    error = max(row.error for row in check_decoder(checkpoint, file, "fp32", "portable"))
    short = export_decoder(checkpoint, folder / "short", "fp32", "portable", CAPACITY)
    return Candidate("portable", file, PortableSequence(short), error, seconds)


def optimum(checkpoint: Checkpoint, folder: Path) -> Candidate:
    begin = time.perf_counter()
    file = export_optimum(checkpoint, folder)
    seconds = time.perf_counter() - begin
    sequence = OptimumSequence(file, decoder_part(checkpoint, "fp32", ""))
    return Candidate("optimum-onnx", file, sequence, prompt_error(checkpoint, sequence), seconds)


def prompt_error(checkpoint: Checkpoint, sequence: OptimumSequence) -> float:
    """Relative error of the logits after a prompt of 16 tokens, and after one more, the larger of the two."""
    state = load_language_state(checkpoint, torch.float32)
    llama = LlamaForCausalLM.from_pretrained(None, config=checkpoint.llama_config, state_dict=state)
    ids = np.random.default_rng(0).integers(3, checkpoint.llama_config.vocab_size, 17).tolist()
    with torch.inference_mode():
        expected = llama(torch.tensor([ids])).logits[0, -2:].numpy()
    found = [sequence.restart().forward(ids[:-1]), sequence.forward(ids[-1:])]
    return max(float(np.abs(f - e).max() / np.abs(e).max()) for f, e in zip(found, expected, strict=True))


def time_in_turn(candidates: list[Candidate], hidden: int) -> list[tuple[float, float]]:
    """Medians of (prefill ms, decode tokens/s), the first round apart, which warms up."""
    ids, images = prompt(hidden)
    rounds = [
        [measure(candidate.sequence.restart(), ids, images) for candidate in candidates] for _ in range(ROUNDS + 1)
    ]
    return [tuple(map(statistics.median, zip(*samples, strict=True))) for samples in zip(*rounds[1:], strict=True)]


def built(candidate: Candidate, options: builder.Options, context: int) -> dict:
    """Figures of the FP16 engine."""
    ours, file = candidate.name == "portable", candidate.file.with_name("half.onnx")
    model = onnx.load(str(candidate.file))
    half = half_graph(model, "decoder")[0] if ours else optimum_half(model)
    onnx.save(half, str(file), save_as_external_data=True, location=f"{file.name}.data", size_threshold=4096)
    del model, half
    profiles = builder.profiles if ours else partial(optimum_profiles, context=context)
    with mock.patch.object(builder, "profiles", profiles):
        serialised, about = builder.build(file, options)
    types = [layer["type"] for layer in about["network_layers"]]
    return {
        "network_layers": len(types),
        "kv_cache_updates": types.count("KV_CACHE_UPDATE"),
        "attentions": types.count("ATTENTION_INPUT"),
        "engine_layers": len(about["engine_layers"]),
        "weights_mb": round(about["memory"]["weights_bytes"] / 1e6, 1),
        "engine_mb": round(len(serialised) / 1e6, 1),
        "build_s": about["build_seconds"],
    }


if __name__ == "__main__":
    main()
