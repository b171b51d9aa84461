"""Images -> image embeds: the bundle's encoder (ConvNeXt, fifth stage, projector) on ONNX Runtime or OpenVINO.

`runtime/backends/tensorrt.py` has the one that runs a TensorRT engine. All are called alike:

    encoder([pixel_values, ...]) -> image embeds [sum of T, D], the images one after the other, on `encoder.device`
"""

import itertools
from pathlib import Path

import numpy as np

from runtime.backends.ort_session import bind_input, bind_output, input_dtype, open_session, run_options
from runtime.device.memory import Array, Cpu, Device
from runtime.image.preprocess import tokens_of

BATCH = 8  # images; more are no faster, and want more memory


class OnnxEncoder:
    """An ONNX graph on ONNX Runtime. stride: pixels of one side to a visual token."""

    def __init__(
        self,
        file: Path,
        stride: int,
        threads: int | None = None,
        provider: str = "cpu",
        device: Device | None = None,
        channels_last: bool = False,
    ):
        """channels_last: lay images out as [B, H, W, C] inside the graph (`--provider cuda` alone)."""
        self.device = device or Cpu()
        self._session = open_session(file, threads, provider, self.device, channels_last=channels_last)
        self._stride = stride
        self.dtype = np.dtype(input_dtype(self._session, "pixel_values"))
        self._hidden = self._session.get_outputs()[0].shape[2]
        self._options = run_options(self.device)

    def __call__(self, images: list[np.ndarray]) -> Array:
        """images: pixel values [3, H, W] float32 -> image embeds [sum of T, D] in the graph's dtype. On a GPU those of
        one size that follow one another are a batch, of BATCH at most; on a CPU that takes as long and wants more
        memory."""
        embeds = self.device.zeros((sum(tokens_of(image, self._stride) for image in images), self._hidden), self.dtype)
        if isinstance(self.device, Cpu):
            batches = [[image] for image in images]
        else:
            alike = [list(some) for _, some in itertools.groupby(images, lambda image: image.shape)]
            batches = [some[begin : begin + BATCH] for some in alike for begin in range(0, len(some), BATCH)]
        begin = 0
        for batch in batches:
            end = begin + len(batch) * tokens_of(batch[0], self._stride)
            self.run(self.device.take(np.stack(batch), self.dtype), embeds[begin:end])
            begin = end
        return embeds

    def run(self, pixel_values: Array, embeds: Array) -> None:
        """pixel_values: [B, 3, H, W] in `dtype`, embeds: [B * T, D], written to; both on `device`."""
        binding = self._session.io_binding()
        bind_input(binding, "pixel_values", pixel_values, self.device)
        batch = len(pixel_values)
        output = embeds.reshape((batch, len(embeds) // batch, self._hidden))
        bind_output(binding, "image_embeds", output, self.device)
        self._session.run_with_iobinding(binding, self._options)
