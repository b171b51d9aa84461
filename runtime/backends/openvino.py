"""The encoder on OpenVINO's CPU plugin."""

from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError

OPENVINO_PRECISIONS = {"fp32": "f32", "fp16": "f32", "int8": "f32", "bf16": "bf16"}


class OpenVinoEncoder:
    """An ONNX graph on OpenVINO's CPU plugin.

    precision: of the computation. OpenVINO takes bf16 by itself where the processor has it, at a relative error of
    about 6e-3; here it computes in float32 unless bf16 is asked for.
    Raises UserError where OpenVINO is not installed, cannot open the graph or does not compute in that precision here.
    """

    batches = False

    def __init__(self, file: Path, threads: int | None = None, precision: str = "fp32"):
        try:
            import openvino
        except ImportError as error:
            raise UserError(f"--encoder openvino: {error}; pip install '.[openvino]'") from error
        hint = OPENVINO_PRECISIONS[precision]
        hints: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
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
