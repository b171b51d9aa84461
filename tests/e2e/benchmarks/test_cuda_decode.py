"""The GPU benchmark of decoders, tried out on the CPU: small, in float32, all libraries with the same ids."""

import json
from importlib.util import find_spec

from tests.support.commands import run_module

SMALL = ("--layers", 2, "--hidden", 64, "--intermediate", 128, "--heads", 4, "--vocab", 300)


def test_the_peers_compute_the_same(tmp_path):
    file = tmp_path / "cuda_decode.json"
    peers = ["transformers", "transformers-static"]
    if find_spec("onnxruntime_genai"):  # in no environment that has onnxruntime by `make setup`
        peers.append("ort-genai")
    arguments = (
        "--device",
        "cpu",
        "--precisions",
        "fp32",
        "--prompt",
        24,
        "--steps",
        8,
        "--rounds",
        2,
        "--peers",
        *peers,
    )
    done = run_module("benchmarks.cuda_decode", *arguments, *SMALL, "--json", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [(row["work"], row["peer"]) for row in rows] == [(w, p) for w in ("prefill", "decode") for p in peers]
    for row in rows:
        assert row["ours"] > 0 and row["theirs"] > 0
        assert row["ratio_least"] <= row["ratio"] <= row["ratio_most"]
        if row["work"] == "decode":
            assert row["same"] == 8, row
