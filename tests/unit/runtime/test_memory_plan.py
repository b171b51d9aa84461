"""What fits the memory of a machine: numbers alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.backends.memory_plan import CONTEXT_STEP, MAX_SLOTS, MIN_CONTEXT, PROCESS_BYTES, Costs, plan
from runtime.bundle.manifest import cache_file, open_bundle
from runtime.image.embedding_cache import DEFAULT_BYTES
from tests.support.fake_bundle import FILES, write_fake_bundle

GIB = 1 << 30
# Vicuna-7B in 4 bits with a ConvNeXt-L at 1536: a MiB a position in float32
LARGE = Costs(8 * GIB, 3 * GIB // 2, {"fp32": 1 << 20, "fp16": 1 << 19, "int8": 2 * 32 * 32 * (128 + 4)}, 4096)


def chosen(available: float, **options):
    found = plan(LARGE, int(available * GIB), **options)
    return found.slots, found.context, found.kv_precision


def test_a_large_machine_gets_everything():
    assert chosen(64) == (MAX_SLOTS, 4096, "fp32")
    assert plan(LARGE, 64 * GIB).cache_bytes == DEFAULT_BYTES
    assert plan(LARGE, None).kv_bytes == 8 * 4 * GIB


def test_slots_come_down_before_precision():
    assert chosen(23) == (3, 4096, "fp32")  # 13 GiB are left


def test_float16_where_two_slots_do_not_fit_in_float32():
    assert chosen(17) == (3, 4096, "fp16")


def test_the_context_is_cut_where_no_slot_fits():
    slots, context, precision = chosen(11.5)
    assert (slots, precision) == (1, "fp16")
    assert MIN_CONTEXT < context < 4096 and context % CONTEXT_STEP == 0
    assert plan(LARGE, int(11.5 * GIB)).fits


def test_what_cannot_fit_says_so():
    found = plan(LARGE, 8 * GIB)
    assert (found.slots, found.context, found.fits) == (1, MIN_CONTEXT, False)


def test_one_sequence_is_in_float32_as_long_as_it_fits():
    assert chosen(15.5, slots=1) == (1, 4096, "fp32")
    assert chosen(13, slots=1) == (1, 4096, "fp16")


def test_what_the_user_chose_stays():
    assert chosen(17, slots=8) == (8, 1728, "fp16")
    found = plan(LARGE, 17 * GIB, 8, 4096, "fp32", 1 << 20)
    assert (found.slots, found.context, found.kv_precision, found.cache_bytes) == (8, 4096, "fp32", 1 << 20)
    assert not found.fits
    assert found.total == LARGE.weights + LARGE.encoder + PROCESS_BYTES + (1 << 20) + 32 * GIB


def test_the_table_adds_up():
    found = plan(LARGE, 23 * GIB)
    sizes = [int(size.removesuffix(" MiB")) for _, size in found.rows()]
    assert sum(sizes[:-2]) == pytest.approx(sizes[-2], abs=3)
    assert sizes[-1] == 23 << 10


def test_eight_slots_in_int8():
    assert plan(LARGE, None, 8, 4096, "int8").kv_bytes <= 8.5 * GIB
    assert chosen(20, kv_precision="int8") == (MAX_SLOTS, 4096, "int8")


@given(
    st.integers(0, 64 * GIB),
    st.none() | st.integers(1, 64),
    st.none() | st.integers(1, 4096),
    st.sampled_from(["auto", "fp32", "fp16", "int8"]),
    st.none() | st.integers(0, GIB),
)
def test_whatever_is_not_chosen_fits_if_anything_does(available, slots, context, kv_precision, cache_bytes):
    found = plan(LARGE, available, slots, context, kv_precision, cache_bytes)
    assert slots in (None, found.slots) and context in (None, found.context)
    assert kv_precision in ("auto", found.kv_precision) and cache_bytes in (None, found.cache_bytes)
    precision = "fp16" if kv_precision == "auto" else kv_precision  # `auto` takes no int8
    assert found.kv_precision != "int8" or kv_precision == "int8"
    least = (slots or 1) * (context or MIN_CONTEXT) * LARGE.positions[precision]
    if LARGE.fixed + found.cache_bytes + least <= available:
        assert found.fits


def test_costs_are_those_of_the_manifest(tmp_path):
    bundle = open_bundle(write_fake_bundle(tmp_path / "bundle"))
    found = Costs.of(bundle)
    assert found.weights == sum(10 * len(file) for file in FILES[:3])  # all but the tokenizer
    assert found.positions == {"fp32": 2 * 3 * 4 * 32 * 4}
    assert bundle.decoder_with_cache("float16") is None


def test_graphs_with_other_caches_lie_beside():
    assert cache_file("decoder/model.onnx", "float16") == "decoder/model-kv16.onnx"
    assert cache_file("decoder/model.onnx", "int8") == "decoder/model-kv8.onnx"
