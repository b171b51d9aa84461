"""A bundle once more with its decoder's weights in the format of GPTQ, 4.25 bits: as fast, and rounded to the nearest.

python -m benchmarks.released.rounded CHECKPOINT BUNDLE OUT
"""

import sys
from pathlib import Path

from onnx import TensorProto

from calib.bundle import copy_bundle, manifest_of
from export.bundle_writer import new_bundle, write_manifest
from export.decoder.fused import fused_graph
from export.decoder.surgery import add_next_token, merge_image_embeds
from export.graphs.kv_precision import write_cache_variants
from export.graphs.matmul_nbits import quantize_weights
from export.graphs.variants import write_variants
from runtime.bundle.manifest import CACHE_SUFFIXES, open_bundle
from train.model import Checkpoint, load_language_state


def main() -> None:
    source, bundle, out = sys.argv[1:]
    checkpoint, like = Checkpoint.open(source), open_bundle(bundle)
    with new_bundle(Path(out)) as folder:
        kept = like.decoder.sampler_file
        sections = copy_bundle(like, folder, lambda name: name.startswith("decoder/") and name != kept)
        file = folder / like.decoder.file
        file.parent.mkdir(exist_ok=True)
        model, read = fused_graph(checkpoint.llama_config, load_language_state(checkpoint), TensorProto.FLOAT)
        merge_image_embeds(model)
        add_next_token(model)
        quantize_weights(model, read, file, 4, "rtn", head_bits=4)
        variants = write_variants(file)
        for kv_dtype in CACHE_SUFFIXES:
            write_cache_variants([file, *variants.values()], kv_dtype)
        sections["decoder"] |= {key: path.relative_to(folder).as_posix() for key, path in variants.items()}
        write_manifest(folder, like.name, manifest_of(like)["producers"], sections)


if __name__ == "__main__":
    main()
