"""The GPU benchmark of encoders, tried out on the CPU: small, in float32, all libraries with the same embeds."""

import json

import pytest
import torch

from benchmarks.cuda_encoder import depthwise_bytes
from benchmarks.peers.cuda_encoders import random_encoder
from tests.support.commands import run_module

PEERS = ("torch", "torch-channels-last", "torch-compile")


def test_the_peers_compute_the_same(tmp_path):
    file = tmp_path / "cuda_encoder.json"
    arguments = ("--device", "cpu", "--sizes", "128x192", "--rounds", 1, "--peers", *PEERS)
    done = run_module(
        "benchmarks.cuda_encoder", *arguments, "--variant", "atto", "--fifth-stage", 1, 64, "--hidden", 48,
        "--json", file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["peer"] for row in rows] == list(PEERS)
    for row in rows:
        assert row["ours"] > 0 and row["theirs"] > 0
        assert 0 <= row["error"] < 1e-4, row
        if row["peer"] != "torch-compile":
            assert row["depthwise"] > 0


def test_what_depthwise_convolutions_read_and_write():
    encoder, sizes = random_encoder("atto", (2, 64), 48), []
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.register_forward_hook(lambda _, inputs, output: sizes.append(inputs[0].numel() + output.numel()))
    with torch.inference_mode():
        encoder(torch.zeros(1, 3, 128, 192))
    assert len(sizes) == 14
    assert depthwise_bytes(encoder, 128, 192) == pytest.approx(2 * sum(sizes))
