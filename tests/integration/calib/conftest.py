"""Pictures to calibrate on, a dataset of questions about them, and an encoder small enough to try things on."""

import json

import numpy as np
import pytest
from PIL import Image

from export.encoder import export_encoder
from tests.integration.export.test_encoder import tiny


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """20 pictures of several shapes: patches of colour and lines, and noise."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for i in range(20):
        height, width = random.integers(80, 400, 2)
        pixels = np.kron(random.integers(0, 256, (5, 5, 3)), np.ones((height // 5, width // 5, 1)))
        pixels[:: 7 + i] = 0
        pixels = np.clip(pixels + random.normal(0, 5 * (i % 3), pixels.shape), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def dataset(pictures):
    """The pictures with two questions each, whose answers are a word and a box."""
    records = []
    for file in sorted(pictures.glob("*.png")):
        turns = [
            ("human", "<image>\nWhat is it?"),
            ("gpt", "stripes"),
            ("human", "Where?"),
            ("gpt", "[0.1,0.1,0.5,0.5]"),
        ]
        conversations = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": file.stem, "image": file.name, "conversations": conversations})
    file = pictures / "questions.json"
    file.write_text(json.dumps(records))
    return file


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """A float32 graph with a few channels a stage."""
    file = tmp_path_factory.mktemp("tiny") / "fp32.onnx"
    export_encoder(tiny(), file, "fp32")
    return file
