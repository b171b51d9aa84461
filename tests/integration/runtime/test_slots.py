"""Sequences that are decoded together find what each finds alone, whoever comes and goes beside them."""

import resource
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime.backends.ort_slots import Slots
from runtime.device.memory import Cpu
from runtime.errors import InvalidLogitsError
from runtime.generate.kv_cache import allocate

PROMPTS = ([1, 20, 30, 40, 50], [1, 9], [1, *range(60, 90)], [1, 7, -1, -2, 8])
STEPS = 12


@pytest.fixture(scope="module", params=["fp32", "int8"])
def decoder(conformance_bundle, request):
    if request.param == "int8":
        request.getfixturevalue("built")
    return runtime.load(conformance_bundle, backends=runtime.Backends(kv_precision=request.param)).decoder


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)


@pytest.fixture(scope="module")
def alone(decoder, images):
    """The first ids after each prompt, and the logits after the last of them, of a sequence of its own."""
    found = []
    for prompt in PROMPTS:
        sequence = decoder.start(64)
        ids = [sequence.forward_greedy(prompt, images)]
        while len(ids) < STEPS:
            ids.append(sequence.forward_greedy(ids[-1:]))
        found.append((ids, sequence.forward(ids[-1:]).copy()))
    return found


def test_rows_of_different_lengths_are_decoded_as_alone(decoder, images, alone):
    slots = Slots(decoder, len(PROMPTS), 64)
    ids = [[slot.forward_greedy(prompt, images)] for slot, prompt in zip(slots, PROMPTS, strict=True)]
    for step in range(STEPS):
        following = slots.step([row[-1] for row in ids])
        if step < STEPS - 1:
            for row, token in zip(ids, following, strict=True):
                row.append(token)
    assert ids == [expected for expected, _ in alone]
    logits = slots.logits(len(PROMPTS))
    for found, (_, expected) in zip(logits, alone, strict=True):
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    assert following == logits.argmax(axis=1).tolist()
    assert lengths(slots) == [len(prompt) + STEPS for prompt in PROMPTS]


def lengths(slots):
    return [slots[i].length for i in range(len(slots))]


def test_sequences_join_and_leave_between_steps(decoder, images, alone):
    """Three slots for four prompts: the second leaves early, the third takes its place, the fourth comes in late."""
    slots = Slots(decoder, 3, 64)
    ids = {name: [slots[name].forward_greedy(PROMPTS[name], images)] for name in range(3)}
    running = [0, 1, 2]  # who is in which slot

    def step(times):
        for _ in range(times):
            for name, token in zip(running, slots.step([ids[name][-1] for name in running]), strict=True):
                ids[name].append(token)

    step(3)
    slots.swap(2, 1)
    running = [0, 2]
    assert slots[2].cache.length == len(PROMPTS[1]) + 3
    slots[2].rewind(0)
    step(2)
    ids[3] = [slots[2].forward_greedy(PROMPTS[3], images)]  # beside slots that are under way
    running = [0, 2, 3]
    step(6)
    for name, found in ids.items():
        assert found == alone[name][0][: len(found)], name
    assert [len(found) for found in ids.values()] == [12, 4, 12, 7]


def test_a_cache_takes_memory_only_where_it_is_filled():
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    before = resident()
    layers = allocate(4, (8, 3, 8192, 64), np.float32, Cpu())
    for array in (array for pair in layers for array in pair):
        array[:, :, :16] = 1
        assert not array[0, 0, 16:32].any()
    assert resident() - before < 40, "of 384 MiB"


def test_rows_of_nothing_leave_other_slots_as_they_are(decoder, images, alone):
    """A step computes three rows, whether one, two or three slots take part; a full one loses its last position."""
    slots = Slots(decoder, 2, 40, min_rows=3)
    ids = [[slot.forward_greedy(prompt, images)] for slot, prompt in zip(slots, PROMPTS[:2], strict=True)]
    for _ in range(4):
        ids[0] += slots.step([ids[0][-1]])
    while len(ids[1]) < STEPS:
        ids[1] += slots.step([ids[0][-1], ids[1][-1]])[1:]
        slots[0].rewind(slots[0].cache.length - 1)
    assert ids[0] == alone[0][0][:5]
    assert ids[1] == alone[1][0]
    slots[1].rewind(0)
    slots[1].forward(list(range(3, 43)))
    slots.step([ids[0][-1]])
    assert slots[1].cache.length == 39


def test_a_row_of_no_numbers_is_told_from_the_others(decoder, images, alone):
    slots = Slots(decoder, 3, 64)
    tokens = [slot.forward_greedy(PROMPTS[0], images) for slot in (slots[i] for i in range(len(slots)))]
    broken = slots[1]
    values = broken.cache.layers[0][1]
    values[:] = -1 if values.dtype == np.int8 else np.nan  # four bytes of -1 are a float32 NaN, too
    first, nothing, third = slots.step(tokens)
    assert first == third == alone[0][0][1]
    assert nothing is None
    with pytest.raises(InvalidLogitsError):
        broken.forward_greedy([5])


def test_a_full_slot_stops_all_and_nothing_is_fed(decoder):
    slots = Slots(decoder, 2, 8)
    slots[0].forward([1, 2, 3])
    slots[1].forward([1, 2, 3, 4, 5, 6, 7, 8])
    with pytest.raises(ValueError, match="9 positions do not fit a KV cache of 8"):
        slots.step([4, 9])
    assert lengths(slots) == [3, 8]
    slots.step([4])
    assert slots[0].cache.length == 4


@pytest.mark.parametrize("tokens", [[], [1, 2, 3]])
def test_as_many_tokens_as_there_are_slots_at_most(decoder, tokens):
    with pytest.raises(ValueError, match=f"{len(tokens)} tokens for 2 slots"):
        Slots(decoder, 2, 8).step(tokens)


def test_a_copy_goes_on_as_what_it_was_copied_from(decoder, images, alone):
    """Also from a shorter beginning of it, and two that are swapped are each other."""
    slots = Slots(decoder, 2, 64)
    slots[0].forward(PROMPTS[2])
    slots.copy(0, 1, 10)
    assert slots[1].cache.length == 10
    first = slots[1].forward_greedy(PROMPTS[2][10:])
    assert first == alone[2][0][0]
    slots[0].rewind(0)
    slots[0].forward(PROMPTS[0])
    slots.swap(0, 1)
    assert lengths(slots) == [len(PROMPTS[2]), len(PROMPTS[0])]
    assert slots.step([first, alone[0][0][0]]) == [alone[2][0][1], alone[0][0][1]]
