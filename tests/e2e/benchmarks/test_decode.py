"""The decode benchmark: peers in processes of their own do the same work and find the same ids."""

import argparse
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import decode
from benchmarks.limits import DecoderFiles, _product, decoder_limit
from benchmarks.peers import turns
from benchmarks.peers.decoders import PEERS, Decoding, Peer
from benchmarks.peers.turns import Running
from export.cli import open_checkpoint
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.bundle.manifest import open_bundle
from tests.support.commands import run_module

STEPS = 12


@pytest.fixture(scope="module")
def spec(conformance, conformance_bundle):
    ids = np.random.default_rng(0).integers(3, 400, 64).tolist()
    return {
        "bundle": str(conformance_bundle),
        "checkpoint": str(conformance / "checkpoint"),
        "threads": 1,
        "capacity": 64,
        "products": "auto",
        "ids": ids,
        "hidden": 128,
    }


@pytest.fixture(scope="module")
def greedy(spec):
    """The first ids after 20 of the spec's, by the runtime in this process."""
    bundle = open_bundle(spec["bundle"])
    sequence = OnnxDecoder(bundle.path(bundle.decoder.file), bundle.decoder).start(64)
    token, found = sequence.forward_greedy(spec["ids"][:20]), []
    for _ in range(STEPS):
        token = sequence.forward_greedy([token])
        found.append(token)
    return found


@pytest.mark.parametrize("name", ["ours", "transformers", "transformers-static"])
def test_a_peer_decodes_greedily_after_any_context(spec, greedy, name, tmp_path, conformance):
    checkpoint = open_checkpoint(str(conformance / "checkpoint"))
    worker = Running("decoders", name, spec | {"folders": decode.folders(checkpoint, tmp_path, [name])})
    for context in (20, 30, 20):  # as prefilled, longer, and gone back
        found = worker.ask("decode", context=context, steps=STEPS)
        assert found["seconds"] > 0
        assert len(found["ids"]) == STEPS
        assert (found["ids"] == greedy) == (context == 20)
    assert worker.ask("prefill", tokens=16)["seconds"] > 0
    assert worker.ask("decode", context=20, steps=STEPS)["ids"] == greedy, "embeds are forgotten"
    assert 50 < worker.ask("prefill", tokens=16)["mib"] < 4000
    if PEERS[name].batches:
        assert worker.ask("decode", context=20, steps=STEPS, batch=3)["ids"] == greedy
        assert worker.ask("decode", context=20, steps=STEPS)["ids"] == greedy
    worker.close()


def test_a_worker_that_cannot_start_is_an_error(spec):
    with pytest.raises(RuntimeError, match=r"ours ended with 1: (.*\n)*.*nowhere"):
        Running("decoders", "ours", spec | {"bundle": "nowhere"})


def test_every_peer_has_a_decoder_of_its_weights():
    assert {decode.precision_of(name) for name in PEERS if name != "ours"} == {"fp32", "int4"}
    assert decode.same([1, 2, 3], [1, 2, 4]) == 2
    assert decode.same([1, 2], [1, 2]) == 2


class Fake:
    """Takes known seconds: `slow` ones in the first round, which warms up."""

    def __init__(self, seconds: float, ids: list[int]):
        self.load_s, self._seconds, self._ids, self.turns = 0.5, seconds, ids, 0

    def ask(self, work: str, **arguments) -> dict:
        self.turns += 1
        rounds = 3
        slow = 100 if (self.turns - 1) % (rounds + 1) == 0 else 1
        return {"seconds": self._seconds * slow, "mib": 7} | ({"ids": self._ids} if work == "decode" else {})


def test_a_ratio_above_one_means_that_ours_is_faster():
    ours = {"fp32": Fake(2.0, [1, 2, 3]), "int4": Fake(0.5, [1, 2, 4])}
    theirs = {
        "transformers": Fake(4.0, [1, 2, 3]),
        "llama.cpp-q4_0": Fake(0.4, [1, 9, 4]),
        "optimum": Fake(1, [1, 2, 3]),
    }
    args = SimpleNamespace(tokens=[64], contexts=[128], batches=[8], rounds=3)
    beside = {name: decode.precision_of(name) for name in theirs}
    rows = {(row["work"], row["batch"], row["peer"]): row for row in decode.measured(ours, theirs, beside, args)}
    prefill = rows["prefill", 1, "transformers"]
    assert (prefill["ours"], prefill["theirs"], prefill["ratio"], prefill["metric"]) == (2000, 4000, 2, "ms")
    slower = rows["decode", 1, "llama.cpp-q4_0"]
    assert (slower["ours"], slower["theirs"], slower["ratio"]) == (decode.STEPS / 0.5, decode.STEPS / 0.4, 0.8)
    assert (slower["precision"], slower["same"], rows["decode", 1, "transformers"]["same"]) == ("int4", 1, 3)
    assert rows["decode", 8, "llama.cpp-q4_0"]["ours"] == 8 * decode.STEPS / 0.5
    assert ("decode", 8, "optimum") not in rows, "it has no batches here"


def test_limits_are_bytes_and_operations(conformance):
    """By hand for the conformance decoder."""
    c = open_checkpoint(str(conformance / "checkpoint")).llama_config
    limits = {"read_gb_per_s": 10.0, "matmul_gflop_per_s": 50.0, "bytes_gop_per_s": 200.0}
    weights = DecoderFiles(1_000_000, "fp32")
    row = {"work": "decode", "precision": "fp32", "batch": 1, "context": 100, "ours": 1000.0}
    cache = 100 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * 2 * 4
    found = decoder_limit(row, weights, c, limits)
    assert found["limit"] == pytest.approx(1e10 / (1_000_000 + cache), rel=1e-3)
    assert found["reached"] == pytest.approx(1000 / found["limit"], rel=1e-2)
    both = decoder_limit(row | {"batch": 2}, weights, c, limits)["limit"]
    assert both == pytest.approx(2e10 / (1_000_000 + 2 * cache), rel=1e-3)
    slow = limits | {"matmul_gflop_per_s": 1e-3}
    one, ten = (decoder_limit(row | {"batch": n}, weights, c, slow)["limit"] for n in (1, 10))
    assert one == ten < 1, "arithmetic is the limit of a slow processor, whatever the batch"
    numbers = sum(
        np.prod(shape)
        for shape in (
            (c.hidden_size, c.num_attention_heads * 32),
            (c.hidden_size, 2 * c.num_key_value_heads * 32),
            (c.num_attention_heads * 32, c.hidden_size),
            (3 * c.hidden_size, c.intermediate_size),
        )
    )
    operations = 2 * 100 * c.num_hidden_layers * (numbers + 100 * c.num_attention_heads * 32)
    operations += 2 * c.hidden_size * c.vocab_size
    prefill = row | {"work": "prefill", "ours": 5.0}
    found = decoder_limit(prefill, replace(weights, size=1), c, limits)
    assert found["limit"] == pytest.approx(operations / 50e9 * 1e3, abs=0.06)
    found = decoder_limit(prefill, DecoderFiles(1, "int4"), c, limits)
    assert found["limit"] == pytest.approx(operations / 200e9 * 1e3, abs=0.06)
    assert decoder_limit(prefill, DecoderFiles(10**9, "int4"), c, limits)["limit"] == 100, "once through the weights"


def test_the_product_that_is_timed_is_one():
    one = np.random.default_rng(0).standard_normal((24, 24)).astype(np.float32)
    (found,) = _product(one, 1).run(None, {"x": one})
    np.testing.assert_allclose(found, one.astype(np.float64) @ one, rtol=1e-4, atol=1e-4)


def test_no_peer_decodes_with_more_room_than_its_work():
    """A cache that was made for a longer context costs memory, and time where all of it is looked at."""

    class Noting(Peer):
        def __init__(self):
            self.reserved = []

        def prefill(self, ids, embeds=None):
            return 0

        def rewind(self, length):
            pass

        def reserve(self, positions, rows=1):
            self.reserved.append(positions)

    peer = Noting()
    work = Decoding(peer, {"ids": [0] * 64, "capacity": 64, "products": "auto", "hidden": 2})
    for context in (20, 20, 40, 30, 30):
        work.decode(context, 4)
    assert peer.reserved == [25, 45, 35]


def test_peers_that_are_not_installed_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(turns, "ENVIRONMENTS", Path("nowhere"))
    parser = argparse.ArgumentParser()
    left_out = ["llama.cpp-q4_0", "optimum", "ort-genai", "openvino+llama.cpp"]
    assert turns.installed(parser, [*left_out, "transformers"]) == ["transformers"]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" is left out: ")[0] for line in said] == left_out
    assert all("make peers" in line for line in said)
    with pytest.raises(SystemExit):
        turns.installed(parser, ["llama.cpp-q4_k"])


def test_the_command_line_names_the_peers():
    done = run_module("benchmarks.decode", "--peers", "vllm")
    assert done.returncode == 2
    assert "llama.cpp" in done.stderr
