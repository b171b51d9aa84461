"""Image -> image embeds: the bundle's encoder graph (ConvNeXt, fifth stage, projector) on ONNX Runtime."""

from pathlib import Path

import numpy as np

from runtime.session import input_dtype, open_session


class Encoder:
    def __init__(self, file: Path, threads: int | None = None):
        self._session = open_session(file, threads)
        self._dtype = input_dtype(self._session, "pixel_values")

    def __call__(self, pixel_values: np.ndarray) -> np.ndarray:
        """pixel_values [3, H, W] float32 -> image embeds [T, D] in the graph's dtype, rows of the image in order."""
        pixels = pixel_values[None].astype(self._dtype, copy=False)
        return self._session.run(["image_embeds"], {"pixel_values": pixels})[0][0]
