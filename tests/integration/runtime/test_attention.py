"""CachedAttention, this project's attention over a KV cache in int8, against float64 and GroupQueryAttention."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.graphs.kv_precision import quantize_cache
from runtime import kernels
from runtime.backends.ort_session import bind_input, bind_output, open_session
from runtime.device.memory import Cpu
from runtime.errors import UserError

INSTRUCTIONS = {"reference": set(), "avx2": {"avx2"}, "avx512_vnni": {"avx512_vnni"}}
POSITIONS = 700  # of the rotary tables
SCALE_BYTES = 4


def write(file: Path, heads: int, kv_heads: int, head_dim: int) -> Path:
    """A graph of GroupQueryAttention alone, with its cache in int8."""
    frequencies = 10000.0 ** (-np.arange(head_dim // 2) / (head_dim // 2))
    angles = np.arange(POSITIONS)[:, None] * frequencies
    past, present = (["batch", kv_heads, length, head_dim] for length in ("past", "present"))
    node = helper.make_node(
        "GroupQueryAttention",
        ["qkv", "", "", "past_key_values.0.key", "past_key_values.0.value", "last", "total", "cos", "sin"],
        ["y", "present.0.key", "present.0.value"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=1,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(
                "qkv", TensorProto.FLOAT, ["batch", "new", (heads + 2 * kv_heads) * head_dim]
            ),
            *(
                helper.make_tensor_value_info(f"past_key_values.0.{k}", TensorProto.FLOAT, past)
                for k in ("key", "value")
            ),
            helper.make_tensor_value_info("last", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("total", TensorProto.INT32, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "new", heads * head_dim]),
            *(helper.make_tensor_value_info(f"present.0.{k}", TensorProto.FLOAT, present) for k in ("key", "value")),
        ],
        [
            numpy_helper.from_array(np.cos(angles).astype(np.float32), "cos"),
            numpy_helper.from_array(np.sin(angles).astype(np.float32), "sin"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    file.parent.mkdir(exist_ok=True)
    onnx.save(model, file.with_name("float.onnx"))
    assert quantize_cache(model)
    model.graph.input.pop()  # `total`, which CachedAttention does not read
    onnx.save(model, file)
    return file


class Attention:
    """A graph of one CachedAttention, and caches of `batch` sequences that it updates in place."""

    def __init__(self, file: Path, library: Path | None, batch: int, capacity: int, kv_heads: int, head_dim: int):
        self.session = open_session(file, 2, operators=library or kernels.library())
        shape = (batch, kv_heads, capacity, head_dim + SCALE_BYTES)
        self.caches = {kind: np.zeros(shape, np.int8) for kind in ("key", "value")}
        self.lengths = np.zeros(batch, np.int32)

    def run(self, qkv: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Attention of new positions [batch, new, width] of the sequences `rows`."""
        self.lengths[rows] += qkv.shape[1]
        last = self.lengths[rows] - 1
        heads = self.session.get_outputs()[0].shape[2]
        y = np.empty((*qkv.shape[:2], heads), np.float32)
        binding, cpu = self.session.io_binding(), Cpu()
        bind_input(binding, "qkv", qkv, cpu)
        bind_input(binding, "last", last, cpu)
        bind_output(binding, "y", y, cpu)
        for kind, cache in self.caches.items():
            bind_input(binding, f"past_key_values.0.{kind}", cache[rows], cpu)
            bind_output(binding, f"present.0.{kind}", cache[rows], cpu)
        self.session.run_with_iobinding(binding)
        return y

    def cached(self, kind: str) -> np.ndarray:
        """What the cache holds, float64 [batch, kv_heads, capacity, head_dim]."""
        cache = self.caches[kind]
        scales = np.ascontiguousarray(cache[..., -SCALE_BYTES:]).view(np.float32)
        return cache[..., :-SCALE_BYTES].astype(np.float64) * scales


def rotated(x: np.ndarray, first: int) -> np.ndarray:
    """[new, heads, head_dim] from position `first` on, float64."""
    half = x.shape[-1] // 2
    angles = (first + np.arange(len(x)))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = (np.concatenate([table] * 2, -1).astype(np.float32) for table in (np.cos(angles), np.sin(angles)))
    return x * cos.astype(np.float64) + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin.astype(np.float64)


def expected(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, length: int) -> np.ndarray:
    """Attention in float64.

    Args:
        queries: [new, heads, head_dim], rotated, of the positions up to `length`.
        keys, values: [kv_heads, length, head_dim].
    """
    new, heads, head_dim = queries.shape
    keys, values = (np.repeat(x[:, :length], heads // len(x), 0) for x in (keys, values))
    scores = np.einsum("nhd,hjd->hnj", queries, keys) / np.sqrt(head_dim)
    scores[:, np.arange(length) > (length - new + np.arange(new))[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hnj,hjd->nhd", weights / weights.sum(-1, keepdims=True), values).reshape(new, -1)


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def instructions(request, built, tmp_path_factory) -> Path:
    """The library with each instruction set that the processor has."""
    if missing := INSTRUCTIONS[request.param] - kernels.processor_flags():
        pytest.skip(f"the processor has no {', '.join(sorted(missing))}")
    folder = tmp_path_factory.mktemp(request.param)
    copy = folder / "kernels.so"
    shutil.copy(kernels.library(), copy)
    with pytest.MonkeyPatch.context() as context:  # a copy chooses once, for its first graph
        context.setenv("CONVLLAVA_KERNELS", request.param)
        open_session(write(folder / "first.onnx", 1, 1, 16), 1, operators=copy)
    return copy


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    head_dim=st.sampled_from([64, 80, 128]),
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=3),
    new=st.integers(1, 40),
)
def test_attention_is_float64s(instructions, seed, kv_heads, group, head_dim, lengths, new):
    """Over what the cache holds, for sequences of different lengths, in one call and each in its own."""
    heads = kv_heads * group
    random = np.random.default_rng(seed)
    file = write(instructions.parent / "attention.onnx", heads, kv_heads, head_dim)
    capacity = max(lengths) + new
    shape = (file, instructions, len(lengths), capacity, kv_heads, head_dim)
    together, alone = Attention(*shape), Attention(*shape)
    for i, length in enumerate(lengths):
        prompt = random.standard_normal((1, length, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
        for attention in (together, alone):
            attention.run(prompt, slice(i, i + 1))
    qkv = 2 * random.standard_normal((len(lengths), new, (heads + 2 * kv_heads) * head_dim)).astype(np.float32)
    found = together.run(qkv)
    keys, values = (together.cached(kind) for kind in ("key", "value"))
    for i, length in enumerate(lengths):
        np.testing.assert_array_equal(alone.run(qkv[i : i + 1], slice(i, i + 1))[0], found[i])
        given = qkv[i].reshape(new, -1, head_dim).astype(np.float64)
        exact = expected(rotated(given[:, :heads], length), keys[i], values[i], length + new)
        assert np.linalg.norm(found[i] - exact) <= 2e-5 * np.linalg.norm(exact)
        new_keys = rotated(given[:, heads : heads + kv_heads], length)
        for cached, exact in ((keys, new_keys), (values, given[:, heads + kv_heads :])):
            error = np.abs(cached[i, :, length : length + new].transpose(1, 0, 2) - exact)
            assert (error <= np.abs(exact).max(-1, keepdims=True) / 254 * 1.001).all()
    for kind in ("key", "value"):
        np.testing.assert_array_equal(together.caches[kind], alone.caches[kind])


def test_it_is_near_to_group_query_attention(built, tmp_path):
    """And a cache that is not shared is copied."""
    file = write(tmp_path / "attention.onnx", 6, 2, 64)
    quantized = open_session(file, 2, operators=kernels.library())
    exact = open_session(file.with_name("float.onnx"), 2)
    random = np.random.default_rng(0)
    kinds = [f"past_key_values.0.{kind}" for kind in ("key", "value")]
    ours = dict.fromkeys(kinds, np.zeros((1, 2, 0, 64 + SCALE_BYTES), np.int8))
    theirs = dict.fromkeys(kinds, np.zeros((1, 2, 0, 64), np.float32))
    length = 0
    for new in (300, 1, 20, 1):
        length += new
        feed = {
            "qkv": random.standard_normal((1, new, 10 * 64)).astype(np.float32),
            "last": np.array([length - 1], np.int32),
        }
        found, *present = quantized.run(None, feed | ours)
        ours = dict(zip(kinds, present, strict=True))
        wanted, *present = exact.run(None, feed | theirs | {"total": np.array(length, np.int32)})
        theirs = dict(zip(kinds, present, strict=True))
        assert 0 < np.linalg.norm(found - wanted) <= 0.015 * np.linalg.norm(wanted)


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_nan_is_not_lost_and_stays_where_it_belongs(instructions, part):
    file = write(instructions.parent / "attention.onnx", 2, 2, 32)
    attention, untouched = (Attention(file, instructions, 2, 20, 2, 32) for _ in range(2))
    qkv = np.random.default_rng(0).standard_normal((2, 10, 6 * 32)).astype(np.float32)
    expected = untouched.run(qkv)
    head = {"query": 0, "key": 2, "value": 4}[part]  # the first one
    qkv[1, 6, head * 32 + 3] = np.nan
    found = attention.run(qkv)
    touched = np.zeros(found.shape, bool)
    touched[1, 6 : 7 if part == "query" else 10, :32] = True
    assert np.isnan(found[touched]).all()
    np.testing.assert_array_equal(found[~touched], expected[~touched])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qkv": np.zeros((1, 2, 100), np.float32)}, "heads \\* head_dim"),
        ({"qkv": np.zeros((2, 2, 192), np.float32)}, "past keys and values"),
        ({"last": np.array([0], np.int32)}, "last position"),
        ({"last": np.array([12], np.int32)}, "last position"),
        ({"last": np.array([POSITIONS], np.int32)}, "last position"),
        ({"last": np.array([-(2**31)], np.int32)}, "last position"),
        ({"last": np.array([1, 1], np.int32)}, "last position of each"),
        ({"past_key_values.0.key": np.zeros((1, 2, 9, 36), np.int8)}, "past keys and values"),
        ({"past_key_values.0.value": np.zeros((1, 2, 10, 32), np.int8)}, "past keys and values"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(built, tmp_path, changes, reason):
    file = write(tmp_path / "attention.onnx", 2, 2, 32)
    model = onnx.load(file)
    for value in model.graph.input:  # so that the operator sees them
        value.type.tensor_type.ClearField("shape")
    onnx.save(model, file)
    session = open_session(file, 1, operators=kernels.library())
    feed = {
        "qkv": np.zeros((1, 2, 192), np.float32),
        "last": np.array([11], np.int32),
        **{f"past_key_values.0.{kind}": np.zeros((1, 2, 10, 36), np.int8) for kind in ("key", "value")},
    }
    session.run(None, feed)
    with pytest.raises(Exception, match=reason):
        session.run(None, feed | changes)


def test_heads_that_it_does_not_take(built, tmp_path):
    with pytest.raises(UserError, match="whole groups"):
        open_session(write(tmp_path / "attention.onnx", 3, 2, 32), 1, operators=kernels.library())
    model = onnx.load(write(tmp_path / "attention.onnx", 2, 2, 32).with_name("float.onnx"))
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past", "present")):
            value.type.tensor_type.shape.dim[3].dim_value = 24
    before = model.SerializeToString()
    assert not quantize_cache(model) and model.SerializeToString() == before
