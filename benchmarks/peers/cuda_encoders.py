"""A random ConvNeXt with a fifth stage on a GPU (or, to try it out, on the CPU), for `benchmarks.peers.worker`.

spec: device, `cuda` or `cpu`; variant, fifth_stage, hidden: see `random_encoder`; graph, its ONNX file.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.peers.cuda_decoders import gpu_limits
from train.model import ConvNeXtEncoder, EncoderConfig, ImageEncoder, build_projector

SAMPLES = 256  # values of an encoding that are compared
DTYPES = {"cuda": torch.float16, "cpu": torch.float32}

Run = Callable[[], Any]  # encodes the image that lies on the device
Prepare = Callable[[np.ndarray], tuple[Run, Callable[[], np.ndarray]]]  # image -> (run it, its last result)


def random_encoder(variant: str, fifth_stage: tuple[int, int], hidden: int) -> ImageEncoder:
    """The same weights each time. hidden: width of an image embed."""
    torch.manual_seed(0)
    # so large that blocks count: the usual 1e-6 would leave each stage's output what its downsampling made
    config = EncoderConfig.from_variant(variant, tuple(fifth_stage), layer_scale=0.1)
    return ImageEncoder(ConvNeXtEncoder(config), build_projector("mlp2x_gelu", config.widths[-1], hidden)).eval()


def ours(spec: dict[str, Any], channels_last: bool = False) -> Prepare:
    """The exported graph through `runtime.backends.ort_encoder`, the image and the embeds on the GPU."""
    from pathlib import Path

    from runtime.backends.ort_encoder import OnnxEncoder
    from runtime.backends.ort_session import open_device
    from runtime.device.memory import to_numpy
    from runtime.image.preprocess import visual_tokens

    device, stride = open_device(spec["device"]), 64
    encoder = OnnxEncoder(Path(spec["graph"]), stride, None, spec["device"], device, channels_last)

    def prepare(image: np.ndarray):
        pixels = device.take(image[None], encoder.dtype)
        embeds = device.zeros((visual_tokens(*image.shape[1:], stride), spec["hidden"]), encoder.dtype)

        def run() -> None:
            encoder.run(pixels, embeds)
            if spec["device"] == "cuda":
                device.synchronize()

        return run, lambda: to_numpy(embeds)

    return prepare


def ours_channels_last(spec: dict[str, Any]) -> Prepare:
    """The same with ONNX Runtime's layout [B, H, W, C]."""
    return ours(spec, channels_last=True)


class InTorch:
    """The model in PyTorch; contiguous or channels last, eager or compiled for each size."""

    def __init__(self, spec: dict[str, Any], memory_format: torch.memory_format, compiled: bool):
        torch.backends.cudnn.benchmark = True  # as ONNX Runtime, which tries out all algorithms, too
        self._device, self._format, dtype = spec["device"], memory_format, DTYPES[spec["device"]]
        encoder = random_encoder(spec["variant"], spec["fifth_stage"], spec["hidden"])
        self._encoder = encoder.to(self._device, dtype).to(memory_format=memory_format)
        self._forward = torch.compile(self._encoder, dynamic=False) if compiled else self._encoder
        self._dtype = dtype

    def __call__(self, image: np.ndarray):
        pixels = torch.from_numpy(image)[None].to(self._device, self._dtype).contiguous(memory_format=self._format)
        found = []

        def run() -> None:
            with torch.inference_mode():
                found[:] = [self._forward(pixels)]
            self._synchronize()

        return run, lambda: found[0][0].float().cpu().numpy()

    def depthwise(self, image: np.ndarray, rounds: int = 10) -> float:
        """Seconds that the depthwise convolutions alone take, each on what it is given, over and over: what is small
        stays in the GPU's cache."""
        layers = [m for m in self._encoder.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
        seconds = []

        def timed(layer: torch.nn.Module, inputs: tuple) -> None:
            with torch.inference_mode():
                layer.forward(*inputs)
                self._synchronize()
                begin = time.perf_counter()
                for _ in range(rounds):
                    layer.forward(*inputs)
                self._synchronize()
            seconds.append((time.perf_counter() - begin) / rounds)

        hooks = [layer.register_forward_pre_hook(timed) for layer in layers]
        pixels = torch.from_numpy(image)[None].to(self._device, self._dtype).contiguous(memory_format=self._format)
        with torch.inference_mode():
            self._encoder(pixels)
        for hook in hooks:
            hook.remove()
        return sum(seconds)

    def _synchronize(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


PEERS: dict[str, Callable[[dict[str, Any]], Prepare]] = {
    "ours": ours,
    "ours-channels-last": ours_channels_last,
    "torch": lambda spec: InTorch(spec, torch.contiguous_format, False),
    "torch-channels-last": lambda spec: InTorch(spec, torch.channels_last, False),
    "torch-compile": lambda spec: InTorch(spec, torch.channels_last, True),
}


class Encoding:
    """The pieces of work."""

    def __init__(self, prepare: Prepare):
        self._prepare = prepare

    def encode(self, height: int, width: int) -> dict:
        """Seconds of one image that lies on the device, the least of a few, and some values of its embeds. Sizes are
        compiled, where that is done, in the first call."""
        run, result = self._prepare(_image(height, width))
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        values = np.asarray(result(), np.float32).ravel()
        return {"seconds": min(seconds), "values": values[:: max(len(values) // SAMPLES, 1)].tolist()}

    def limits(self) -> dict:
        return {"seconds": 0.0, **gpu_limits()}

    def depthwise(self, height: int, width: int) -> dict:
        return {"seconds": self._prepare.depthwise(_image(height, width))}


def _image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, height, width), np.float32)


def start(name: str, spec: dict[str, Any]) -> Encoding:
    return Encoding(PEERS[name](spec))
