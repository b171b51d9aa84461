"""The KV cache: one allocation, written in place; chunks, single steps and images equal one forward in PyTorch."""

import numpy as np
import pytest
import torch

import runtime
from runtime.backends import ort_decoder
from runtime.backends import select as decoders
from runtime.backends.ort_sequence import MIN_DEQUANTIZED_PREFILL
from runtime.backends.select import Backends
from runtime.bundle.manifest import open_bundle
from tests.support.bundles import exported
from train.model import load_model


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


def test_new_positions_are_written_in_place(model):
    sequence = model.decoder.start(32)
    layers = sequence.cache.layers
    addresses = [array.ctypes.data for pair in layers for array in pair]
    sequence.forward([1, 20, 30])
    after_prefill = [array.copy() for pair in layers for array in pair]
    for length, token in enumerate((40, 50, 60), start=4):
        sequence.forward([token])
        assert sequence.cache.length == length
    assert [array.ctypes.data for pair in sequence.cache.layers for array in pair] == addresses
    for array, before in zip((array for pair in layers for array in pair), after_prefill, strict=True):
        assert np.abs(array[:, :, :6]).min(axis=(0, 1, 3)).all(), "every position up to the length is filled"
        assert not array[:, :, 6:].any(), "nothing is written past it"
        assert np.array_equal(array[:, :, :3], before[:, :, :3]), "what was there is not rewritten"


@pytest.mark.parametrize("capacity", [23, 24, 100, 4096])
def test_the_cache_size_does_not_matter(model, capacity):
    ids = [1, *range(10, 31)]
    expected = model.decoder.start(22).forward(ids)
    found = model.decoder.start(capacity).forward(ids)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("split", [1, 4, 8, 13])
def test_chunks_equal_one_forward_in_pytorch(model, conformance, split):
    """Also where a chunk's border falls inside an image."""
    llava = load_model(conformance / "checkpoint")
    random = np.random.default_rng(0)
    images = random.standard_normal((6, 128)).astype(np.float32)
    ids = [1, 40, 50, -1, -2, -3, 60, 70, -4, -5, -6, 80, 90, 100, 110]
    table = llava.decoder.get_input_embeddings().weight.detach()
    embeds = torch.stack([table[i] if i >= 0 else torch.from_numpy(images[-1 - i]) for i in ids])
    with torch.inference_mode():
        expected = llava.decoder(inputs_embeds=embeds[None]).logits[0, -1].numpy()
    sequence = model.decoder.start(16)
    sequence.forward(ids[:split], images)
    found = sequence.forward(ids[split:], images)
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_two_sequences_do_not_disturb_each_other(model):
    alone = model.decoder.start(16)
    alone.forward([1, 2, 3])
    expected = alone.forward([4]).copy()
    first, second = model.decoder.start(16), model.decoder.start(16)
    first.forward([1, 2, 3])
    second.forward([9, 8, 7, 6])
    assert np.array_equal(first.forward([4]), expected)


@pytest.fixture(scope="module")
def rounded_bundle():
    """With a decoder of 8 bits, and the graph for prompts beside it."""
    return open_bundle(exported("--res", 256, "--decoder-precision", "int8"))


@pytest.mark.parametrize("slow_bytes", [True, False])
def test_long_prompts_take_the_graph_for_them_where_bytes_are_slow(rounded_bundle, monkeypatch, slow_bytes):
    """It differs from the other by what that rounds of the activations, and steps after it find the same ids."""
    monkeypatch.setattr(decoders, "int8_sums_saturate", lambda: slow_bytes)
    decoder = decoders.open_decoder(rounded_bundle, Backends(decoder="onnx"))
    assert (decoder.prefill_session is not None) == slow_bytes
    ids = np.random.default_rng(0).integers(3, 400, MIN_DEQUANTIZED_PREFILL).tolist()
    plain = ort_decoder.OnnxDecoder(rounded_bundle.path(rounded_bundle.decoder.file), rounded_bundle.decoder)
    found, expected = decoder.start(256), plain.start(256)
    logits, plain_logits = found.forward(ids).copy(), expected.forward(ids).copy()
    assert np.array_equal(logits, plain_logits) == (not slow_bytes)
    assert np.linalg.norm(logits - plain_logits) <= 0.05 * np.linalg.norm(plain_logits)
    token = int(plain_logits.argmax())
    for _ in range(8):
        following = expected.forward_greedy([token])
        assert found.forward_greedy([token]) == following
        token = following
    found.rewind(0)
    expected.rewind(0)
    assert np.array_equal(found.forward(ids[:-1]), expected.forward(ids[:-1])), "too short for it"


def test_float_decoders_need_no_graph_for_prompts(model, monkeypatch):
    monkeypatch.setattr(decoders, "int8_sums_saturate", lambda: True)
    assert model.bundle.decoder.prefill_file is None
    assert decoders.open_decoder(model.bundle).prefill_session is None
