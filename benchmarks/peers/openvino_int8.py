"""NNCF's post-training quantization of an image encoder, in the environment that `make peers` makes for llama.cpp.

python -m benchmarks.peers.openvino_int8 GRAPH FOLDER

writes FOLDER/encoder.xml. It is calibrated on random images, which is enough to measure its speed and no more.
"""

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino

IMAGES, SIDE = 4, 512


def main() -> None:
    graph, folder = map(Path, sys.argv[1:])
    random = np.random.default_rng(0)
    images = [random.standard_normal((1, 3, SIDE, SIDE), np.float32) for _ in range(IMAGES)]
    model = openvino.Core().read_model(graph)
    quantized = nncf.quantize(model, nncf.Dataset(images), subset_size=IMAGES)
    folder.mkdir()
    openvino.save_model(quantized, folder / "encoder.xml")


if __name__ == "__main__":
    main()
