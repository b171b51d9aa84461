"""A bundle once more with its decoder's weights rounded to the nearest of 4.25 bits, as fast as GPTQ's and no better.

python -m benchmarks.released.rounded CHECKPOINT BUNDLE OUT
"""

import sys
from pathlib import Path

from onnx import TensorProto

from calib.bundle import copy_bundle, manifest_of
from export.bundle_writer import new_bundle, write_manifest
from export.decoder.fused import fused_graph
from export.decoder.surgery import add_next_token, merge_image_embeds
from export.graphs.matmul_nbits import quantize_weights
from export.graphs.variants import write_variants
from runtime.bundle.manifest import open_bundle
from train.model import Checkpoint, load_language_state


def main() -> None:
    source, bundle, out = sys.argv[1:]
    checkpoint, like = Checkpoint.open(source), open_bundle(bundle)
    with new_bundle(Path(out)) as folder:
        sections = copy_bundle(like, folder, lambda name: Path(name).name.partition(".")[0] in DECODER_GRAPHS)
        file = folder / like.decoder.file
        model, read = fused_graph(checkpoint.llama_config, load_language_state(checkpoint), TensorProto.FLOAT)
        merge_image_embeds(model)
        add_next_token(model)
        quantize_weights(model, read, file, 4, "rtn")
        variants = {key: path.relative_to(folder).as_posix() for key, path in write_variants(file).items()}
        sections["decoder"] |= variants
        write_manifest(folder, like.name, manifest_of(like)["producers"], sections)


DECODER_GRAPHS = ("model", "prefill", "kernels")


if __name__ == "__main__":
    main()
