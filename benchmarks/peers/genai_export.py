"""ONNX Runtime GenAI's own graph of a Llama, logits of the last position alone.

python -m benchmarks.peers.genai_export SOURCE OUT PRECISION DEVICE
"""

import sys
import tempfile


def build(source: str, out: str, precision: str, device: str) -> None:
    """Write GenAI's graph and configuration of the Hugging Face folder `source` into the folder `out`."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    with tempfile.TemporaryDirectory() as cache:
        paths = ("llama", source, out, precision, device, cache)
        create_model(*paths, **parse_extra_options(*paths, ["prune_lm_head=true"]))


if __name__ == "__main__":
    build(*sys.argv[1:])
