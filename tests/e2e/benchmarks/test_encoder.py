"""The encoder benchmark: peers encode the same image to the same embeds, and its figures are what they say."""

import numpy as np
import pytest
import torch

from benchmarks import encoder
from benchmarks.peers.encoders import PEERS
from benchmarks.peers.turns import Running, in_turn
from tests.support.commands import run_module
from train.model import Checkpoint, load_image_encoder


@pytest.fixture(scope="module")
def spec(conformance, conformance_bundle):
    graph, checkpoint = conformance_bundle / "encoder/fp32.onnx", conformance / "checkpoint"
    return {"graph": str(graph), "stride": 64, "checkpoint": str(checkpoint), "threads": 1}


def test_peers_find_the_same_embeds(spec):
    workers = {name: Running("encoders", name, spec) for name in PEERS}
    answers = in_turn(workers, 2, "encode", height=192, width=256)
    for worker in workers.values():
        worker.close()
    assert {name: len(taken) for name, taken in answers.items()} == dict.fromkeys(PEERS, 2)
    rows = encoder.rows_of(answers, 192, 256, 0.5)
    assert [row["peer"] for row in rows] == ["openvino", "torch", "torch-compile"]
    for row in rows:
        assert row["error"] <= 1e-5, row
        assert row["reached"] > 0, row
        assert (row["context"], row["metric"], row["limit"]) == ("192x256", "ms", 0.5)


def test_other_embeds_are_told():
    one = [{"seconds": 1.0, "mib": 1, "values": [3.0, 4.0]}]
    other = [{"seconds": 3.0, "mib": 1, "values": [3.0, 4.5]}]
    (row,) = encoder.rows_of({"ours": one, "torch": other}, 64, 64, 250.0)
    assert (row["ours"], row["theirs"], row["ratio"], row["error"], row["reached"]) == (1000, 3000, 3, 0.1, 0.25)


def test_operations_are_those_of_convolutions_and_products(conformance):
    """Of the stem and one linear layer by hand; of the whole by the size of the image."""
    config = Checkpoint.open(conformance / "checkpoint").encoder_config
    stem = torch.nn.Conv2d(3, config.widths[0], 4, 4)
    assert encoder.operations(stem, 64, 128) == 2 * 16 * 32 * config.widths[0] * 3 * 16
    whole = load_image_encoder(Checkpoint.open(conformance / "checkpoint"))
    small, large = (encoder.operations(whole, side, side) for side in (128, 256))
    assert large == pytest.approx(4 * small, rel=1e-6)
    assert small > 1e6


def test_sizes_are_height_and_width():
    assert encoder.size("768x3072") == (768, 3072)
    done = run_module("benchmarks.encoder", "--sizes", "768")
    assert done.returncode == 2
    assert "--sizes" in done.stderr
    assert np.prod(encoder.size("256x1024")) == 512**2


def test_a_bundle_of_another_model_is_refused(conformance_bundle):
    done = run_module("benchmarks.encoder", "--bundle", conformance_bundle)
    assert done.returncode == 2
    assert "name its own by --checkpoint" in done.stderr
