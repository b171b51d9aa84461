"""The KV cache: one allocation, written in place; chunks, single steps and images equal one forward in PyTorch."""

import numpy as np
import pytest
import torch

import runtime
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
