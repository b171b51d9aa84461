"""Images -> image embeds: the bundle's encoder (ConvNeXt, fifth stage, projector) on ONNX Runtime or OpenVINO.

`runtime/trt.py` has the one that runs a TensorRT engine. All are called alike:

    encoder([pixel_values, ...]) -> image embeds [sum of T, D], the images one after the other, on `encoder.device`
"""

import itertools
from pathlib import Path

import numpy as np

from runtime.device import Array, Cpu, Device
from runtime.errors import UserError
from runtime.session import bind_input, bind_output, input_dtype, open_session, run_options

BATCH = 8  # images; more are no faster, and want more memory
OPENVINO_PRECISIONS = {"fp32": "f32", "fp16": "f32", "int8": "f32", "bf16": "bf16"}


def tokens_of(pixel_values: np.ndarray, stride: int) -> int:
    """Visual tokens of an image [3, H, W]."""
    return pixel_values.shape[1] // stride * (pixel_values.shape[2] // stride)


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


class OpenVinoEncoder:
    """An ONNX graph on OpenVINO's CPU plugin.

    precision: of the computation. OpenVINO takes bf16 by itself where the processor has it, at a relative error of
    about 6e-3; here it computes in float32 unless bf16 is asked for.
    Raises UserError where OpenVINO is not installed, cannot open the graph or does not compute in that precision here.
    """

    device = Cpu()

    def __init__(self, file: Path, threads: int | None = None, precision: str = "fp32"):
        try:
            import openvino
        except ImportError as error:
            raise UserError(f"--encoder openvino: {error}; pip install '.[openvino]'") from error
        hints = {"INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            hints["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = openvino.Core().compile_model(str(file), "CPU", hints)
        except RuntimeError as error:
            raise UserError(f"{file}: OpenVINO {openvino.__version__} cannot open it: {error}") from error
        if precision == "bf16" and compiled.get_property("INFERENCE_PRECISION_HINT") != openvino.Type.bf16:
            raise UserError(
                "precision bf16: this processor has none, and OpenVINO would compute in float32 in its place"
            )
        self._request = compiled.create_infer_request()
        self._dtype = compiled.input(0).get_element_type().to_dtype()

    def __call__(self, images: list[np.ndarray]) -> np.ndarray:
        """As `OnnxEncoder`."""
        inputs = (image[None].astype(self._dtype, copy=False) for image in images)
        return np.concatenate([self._request.infer([pixels])[0][0] for pixels in inputs])
