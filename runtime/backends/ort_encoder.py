"""Images -> image embeddings: the bundle's encoder (ConvNeXt, fifth stage, projector) on ONNX Runtime."""

import itertools
from pathlib import Path

import numpy as np

from runtime.backends.ort_session import (
    FLOATS,
    bind_input,
    bind_output,
    check_graph,
    float_dtype,
    open_session,
    run_options,
)
from runtime.device.memory import Array, Cpu, Device
from runtime.graph_io import IMAGE_EMBEDS, PIXEL_VALUES
from runtime.image.preprocess import visual_tokens

MAX_BATCH = 8  # images; more are no faster and take more memory


class OnnxEncoder:
    """An encoder graph, see `runtime.backends.base.Encoder`."""

    def __init__(
        self,
        file: Path,
        stride: int,
        threads: int | None = None,
        provider: str = "cpu",
        device: Device | None = None,
        channels_last: bool = False,
        operators: Path | None = None,
    ):
        """
        Args:
            file: the graph.
            stride: pixels of one side per visual token.
            threads, provider, device, operators: see `open_session`.
            channels_last: lay images out as [B, H, W, C] inside the graph (`--provider cuda` alone).

        Raises:
            UserError: as `open_session`.
        """
        self.device: Device = device or Cpu()
        self.batches = not isinstance(self.device, Cpu)
        large = provider == "cpu" and Path(f"{file}.data").is_file()  # where exporters put large weights
        self._session = open_session(
            file,
            threads,
            provider,
            self.device,
            operators,
            channels_last=channels_last,
            mapped=large and file.stem != "int8",  # a quarter of the bytes, and more to lose
            lean=large,
        )
        outputs = {IMAGE_EMBEDS: (FLOATS, (None, None, None))}
        check_graph(self._session, file, {PIXEL_VALUES: (FLOATS, (None, 3, None, None))}, outputs)
        self._stride = stride
        self.dtype = np.dtype(float_dtype(self._session, PIXEL_VALUES))
        self._hidden = self._session.get_outputs()[0].shape[2]
        self._options = run_options(self.device, shrink=large)

    def __call__(self, images: list[np.ndarray]) -> Array:
        """On a GPU images of one size that follow one another are a batch; on a CPU that takes as long and needs more
        memory."""
        tokens = [visual_tokens(*image.shape[1:], stride=self._stride) for image in images]
        embeds, begin = self.device.zeros((sum(tokens), self._hidden), self.dtype), 0
        for _, group in itertools.groupby(zip(images, tokens, strict=True), lambda pair: pair[0].shape):
            same_size = list(group)
            size = MAX_BATCH if self.batches else 1
            for batch in (same_size[at : at + size] for at in range(0, len(same_size), size)):
                end = begin + sum(count for _, count in batch)
                self.run(self.device.take(np.stack([image for image, _ in batch]), self.dtype), embeds[begin:end])
                begin = end
        return embeds

    def run(self, pixel_values: Array, embeds: Array) -> None:
        """pixel_values: [B, 3, H, W] in `dtype`, embeds: [B * T, D], written to; both on `device`."""
        binding = self._session.io_binding()
        bind_input(binding, PIXEL_VALUES, pixel_values, self.device)
        batch = len(pixel_values)
        output = embeds.reshape((batch, len(embeds) // batch, self._hidden))
        bind_output(binding, IMAGE_EMBEDS, output, self.device)
        self._session.run_with_iobinding(binding, self._options)
