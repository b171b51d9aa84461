"""Image encoders (with the projector, float32) of several libraries, for `benchmarks.peers.worker`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 256  # values of an encoding that are compared

Encode = Callable[[np.ndarray], np.ndarray]  # pixel values [3, H, W] -> image embeds [T, D]


def ours(spec: dict[str, Any]) -> Encode:
    """The bundle's float32 graph through `runtime.backends.ort_encoder`."""
    from runtime.backends.ort_encoder import OnnxEncoder

    encoder = OnnxEncoder(Path(spec["graph"]), spec["stride"], spec["threads"])
    return lambda pixels: encoder([pixels])


def openvino(spec: dict[str, Any]) -> Encode:
    """The same graph through OpenVINO's own interface.

    spec: also hint, in what it computes; by default `f32`, None leaves it to OpenVINO.
    """
    import openvino

    compiled = openvino.Core().compile_model(spec["graph"], "CPU", openvino_options(spec))
    return lambda pixels: compiled([pixels[None]])[0][0]


def openvino_options(spec: dict[str, Any]) -> dict[str, Any]:
    """OpenVINO's options of a model for `spec["threads"]` threads and in `spec["hint"]`."""
    hint = spec.get("hint", "f32")
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": spec["threads"]}
    return options | ({"INFERENCE_PRECISION_HINT": hint} if hint else {})


def torch_eager(spec: dict[str, Any]) -> Encode:
    """The checkpoint in PyTorch."""
    import torch

    from train.model import Checkpoint, load_image_encoder

    torch.set_num_threads(spec["threads"])
    encoder = load_image_encoder(Checkpoint.open(spec["checkpoint"])).eval()
    return _in_torch(encoder)


def torch_compile(spec: dict[str, Any]) -> Encode:
    """The same, channels last and compiled by torch.compile for each size."""
    import torch

    from train.model import Checkpoint, load_image_encoder

    torch.set_num_threads(spec["threads"])
    torch._dynamo.config.cache_size_limit = 64  # sizes
    encoder = load_image_encoder(Checkpoint.open(spec["checkpoint"])).eval().to(memory_format=torch.channels_last)
    return _in_torch(torch.compile(encoder, dynamic=False), torch.channels_last)


def _in_torch(encoder: Callable, memory_format: Any = None) -> Encode:
    import torch

    def encode(pixels: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(pixels)[None]
        if memory_format is not None:
            batch = batch.contiguous(memory_format=memory_format)
        with torch.inference_mode():
            return encoder(batch)[0].numpy()

    return encode


PEERS = {"ours": ours, "openvino": openvino, "torch": torch_eager, "torch-compile": torch_compile}


class Encoding:
    """The piece of work."""

    def __init__(self, encode: Encode):
        self._encode = encode

    def encode(self, height: int, width: int) -> dict:
        """Seconds of one image, and some values of its embeds. Sizes are compiled, where that is done, in the first
        call."""
        pixels = np.random.default_rng(0).standard_normal((3, height, width), np.float32)
        begin = time.perf_counter()
        embeds = self._encode(pixels)
        seconds = time.perf_counter() - begin
        values = np.asarray(embeds).ravel()
        return {"seconds": seconds, "values": values[:: max(len(values) // SAMPLES, 1)].tolist()}


def start(name: str, spec: dict[str, Any]) -> Encoding:
    """spec: graph, a bundle's float32 encoder, and its stride; checkpoint, a folder; threads."""
    return Encoding(PEERS[name](spec))
