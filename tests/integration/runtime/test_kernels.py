"""This project's operators against float64, against ONNX Runtime's MatMulNBits, and in the decoders that have them."""

import dataclasses
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.graphs.block_formats import BLOCK, Blocks, nearest, with_offsets
from export.graphs.kernel_scales import GROUP, kernel_scales
from export.graphs.load import open_graph
from export.graphs.matmul_nbits import quantize_weights
from export.graphs.variants import DOMAIN, write_kernels, write_variants
from runtime import kernels
from runtime.backends import ort_decoder
from runtime.backends import select as decoders
from runtime.backends.ort_session import open_session
from runtime.backends.ort_slots import Slots
from runtime.backends.select import Backends, open_components
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from tests.support.bundles import exported

needs_kernels = pytest.mark.usefixtures("built")
INSTRUCTIONS = {"reference": set(), "avx2": {"avx2"}, "avx_vnni": {"avx_vnni"}, "avx512_vnni": {"avx512_vnni"}}


def open_copy(name: str, folder: Path) -> Path:
    """A library that computes with the instruction set `name`; each copy chooses once, for its first graph."""
    copy = folder / f"{name}.so"
    shutil.copy(kernels.library(), copy)
    with pytest.MonkeyPatch.context() as context:
        context.setenv("CONVLLAVA_KERNELS", name)
        open_session(write(folder, "BlockMatMul", [blocks_of(8, 32, 4, True)], 32, 4), 1, operators=copy)
    return copy


@pytest.fixture(scope="module")
def reference(built, tmp_path_factory) -> Path:
    return open_copy("reference", tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def instructions(request, built, tmp_path_factory) -> Path:
    """The library with each instruction set that the processor has, and the compiler knew."""
    if missing := INSTRUCTIONS[request.param] - kernels.processor_flags():
        pytest.skip(f"the processor has no {', '.join(sorted(missing))}")
    return open_copy(request.param, tmp_path_factory.mktemp(request.param))


FORMATS = {"INT4": (4, False), "INT4_OFFSETS": (4, True), "INT8": (8, False)}  # bits, zero points


def blocks_of(rows: int, columns: int, bits: int, zeros: bool, seed: int = 0) -> Blocks:
    """Random blocks of a matrix [columns, rows], every level among them. Scales of 4 bits without zero points are whole
    multiples of a unit of the row, as those of `SymmetricGrid`."""
    random = np.random.default_rng(seed)
    count = columns // BLOCK
    levels = random.integers(0, 2**bits, (rows, count, BLOCK), np.uint8)
    scales = random.uniform(0.001, 0.01, (rows, count)).astype(np.float32)
    if bits == 4 and not zeros:
        multiples = random.integers(-127, 128, (rows, count)).astype(np.float32)
        multiples[:, 0] = 127
        scales = multiples * np.float32(2.0**-16) * random.integers(1, 9, (rows, 1)).astype(np.float32)
    return Blocks(bits, levels, scales, random.integers(0, 2**bits, (rows, count), np.uint8) if zeros else None)


def inputs_of(blocks: Blocks, columns: int) -> list[np.ndarray]:
    """An operator's codes, scales and units."""
    tensors = blocks.tensors()
    codes = tensors[f"Q{blocks.bits}"]
    return [codes, *kernel_scales(blocks.bits, codes, blocks.scales, tensors.get("zeros"), columns // BLOCK)]


def dense(blocks: Blocks, sign: int = -1) -> np.ndarray:
    """[N, K] float64: scale * level - scale * zero point; with the sign +1, the sum of what is rounded."""
    zeros = 2 ** (blocks.bits - 1) if blocks.zeros is None else blocks.zeros[..., None].astype(np.float64)
    weights = (blocks.levels.astype(np.float64) + sign * zeros) * blocks.scales[..., None].astype(np.float64)
    return np.abs(weights.reshape(len(weights), -1)) if sign > 0 else weights.reshape(len(weights), -1)


def kernels_weights(blocks: Blocks) -> np.ndarray:
    """[N, K] float64, read from an operator's inputs."""
    rows, count = blocks.levels.shape[:2]
    _, scales, units = inputs_of(blocks, count * BLOCK)
    kind = np.int8 if scales.shape[-1] == GROUP else np.float16
    numbers = scales.view(kind).reshape(-1, count, scales.shape[-1] // np.dtype(kind).itemsize // GROUP, GROUP)
    numbers = numbers.transpose(2, 0, 3, 1).reshape(numbers.shape[2], -1, count)[:, :rows].astype(np.float64)
    codes = blocks.levels.astype(np.float64)
    if len(numbers) == 1:
        weights = numbers[0][..., None] * (codes - 2 ** (blocks.bits - 1))
    else:
        weights = numbers[0][..., None] * codes + numbers[1][..., None]
    return (weights * units[:rows, None, None].astype(np.float64)).reshape(rows, -1)


def rounded(x: np.ndarray, activation_bits: int = 8) -> np.ndarray:
    """Activations [M, K] as the kernels see them, float64: 127 levels a block, 16384 times as many of 24 bits."""
    most = np.float32(127 if activation_bits == 8 else 127 * 128 * 128)
    blocked = x.reshape(len(x), x.shape[1] // BLOCK, BLOCK)
    largest = np.abs(blocked).max(-1, keepdims=True)
    factor = np.divide(most, largest, out=np.zeros_like(largest), where=largest > 0)
    levels = np.rint(blocked * factor).astype(np.float64)
    return (levels * (largest / most)).reshape(x.shape)


def write(tmp_path, operator: str, matrices: list[Blocks], columns: int, bits: int, aside: bool = False):
    """A graph of one operator. aside: its weights lie in a file beside it."""
    tensors = {
        f"{at}/{place}": value for at, b in enumerate(matrices) for place, value in enumerate(inputs_of(b, columns))
    }
    node = helper.make_node(operator, ["x", *tensors], ["y"], domain=DOMAIN, K=columns, bits=bits)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", None])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "kernels.onnx"
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, file, save_as_external_data=aside, location="kernels.onnx.data", size_threshold=0)
    return file


def session(file, activation_bits: int = 8, library: Path | None = None):
    return open_session(file, 2, operators=library or kernels.library(), activation_bits=activation_bits)


def run(file, x: np.ndarray, activation_bits: int = 8, library: Path | None = None) -> np.ndarray:
    return session(file, activation_bits, library).run(None, {"x": x[None]})[0][0]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 20),
    format=st.sampled_from(list(FORMATS.values())),
    count=st.integers(0, 19),
    is_gated=st.booleans(),
)
def test_matmuls_are_float64s(instructions, reference, seed, rows, blocks, format, count, is_gated):
    """With 8-bit activations, of what these are rounded to; with 24-bit ones, of x itself. Rows of x do not depend on
    each other, and the instruction sets do not differ in a bit."""
    (bits, zeros), columns = format, 32 * blocks
    matrices = [blocks_of(rows, columns, bits, zeros, seed + at) for at in range(1 + is_gated)]
    file = write(instructions.parent, "GatedBlockMatMul" if is_gated else "BlockMatMul", matrices, columns, bits)
    x = np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)
    for activation_bits in (8, 24):
        found = run(file, x, activation_bits, instructions)
        np.testing.assert_array_equal(found, run(file, x, activation_bits, reference))
        np.testing.assert_array_equal(found[-1:], run(file, x[-1:], activation_bits, instructions))
        seen = rounded(x) if activation_bits == 8 else x.astype(np.float64)
        products = [seen @ kernels_weights(matrix).T for matrix in matrices]
        sizes = [np.abs(seen) @ dense(matrix, +1).T for matrix in matrices]
        if is_gated:
            (gate, up), (gate_size, up_size) = products, sizes
            products = [gate / (1 + np.exp(-gate)) * up]
            sizes = [gate_size * (np.abs(up) + up_size) + np.abs(gate) * up_size]
        assert (np.abs(found - products[0]) <= 1e-5 * sizes[0]).all()


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 40),
    format=st.sampled_from(list(FORMATS.values())),
    exponent=st.integers(-90, 90),
)
def test_the_kernels_weights_are_those_of_matmul_nbits(seed, rows, blocks, format, exponent):
    """But for the rounding of scales and offsets to float16; symmetric ones of 4 bits exactly."""
    given = blocks_of(rows, 32 * blocks, *format, seed)
    scaled = Blocks(given.bits, given.levels, given.scales * np.float32(2.0**exponent), given.zeros)
    found, expected, size = kernels_weights(scaled), dense(scaled), dense(scaled, +1)
    if format == FORMATS["INT4"]:
        np.testing.assert_array_equal(found, expected)
        assert inputs_of(scaled, 32 * blocks)[1].shape == ((rows + 15) // 16, blocks, GROUP)
    else:
        assert (np.abs(found - expected) <= 2.0**-10 * size + 1e-45).all()


def test_symmetric_scales_that_are_no_multiples_get_offsets():
    given = blocks_of(20, 96, 4, True)
    symmetric = Blocks(4, given.levels, given.scales)
    assert (np.abs(kernels_weights(symmetric) - dense(symmetric)) <= 2.0**-10 * dense(symmetric, +1)).all()


@needs_kernels
def test_an_unknown_instruction_set_is_refused(tmp_path):
    with pytest.raises(UserError, match="CONVLLAVA_KERNELS: this processor, or this build, has no avx1024"):
        open_copy("avx1024", tmp_path)


@needs_kernels
def test_other_numbers_of_activation_bits_are_refused(tmp_path):
    file = write(tmp_path, "BlockMatMul", [blocks_of(8, 32, 4, True)], 32, 4)
    for bits in (0, 4, 16):
        with pytest.raises(UserError, match="activation_bits"):
            session(file, bits)


@pytest.mark.parametrize("activation_bits", [8, 24])
def test_extremes(tmp_path, instructions, activation_bits):
    """Zeros, sums at the edge of 16 bits, scales that float16 has no room for, and matrices of nothing."""
    levels = np.full((16, 3, BLOCK), 15, np.uint8)
    scales = np.full((16, 3), 1.0, np.float32)
    highest = Blocks(4, levels, scales, np.zeros((16, 3), np.uint8))
    ones = np.ones((2, 96), np.float32)
    for factor in (2.0**-40, 1.0, 2.0**40):
        blocks = Blocks(4, levels, (scales * factor).astype(np.float32), highest.zeros)
        file = write(tmp_path, "BlockMatMul", [blocks], 96, 4)
        for x in (ones, -ones, 1e-20 * ones, 1e20 * ones):
            np.testing.assert_allclose(
                run(file, x, activation_bits, instructions), rounded(x, activation_bits) @ dense(blocks).T, rtol=1e-6
            )
        assert not run(file, 0 * ones, activation_bits, instructions).any()
    strange = ones.copy()
    lowest = Blocks(8, np.zeros((16, 3, BLOCK), np.uint8), scales)  # -128
    for blocks, operator in ((highest, "BlockMatMul"), (lowest, "BlockMatMul"), (highest, "GatedBlockMatMul")):
        file = write(tmp_path, operator, [blocks] * (1 + (operator[0] == "G")), 96, blocks.bits)
        expected = run(file, ones, activation_bits, instructions)[1]
        for value in (np.nan, np.inf, -np.inf):
            strange[0, 40] = value
            found = run(file, strange, activation_bits, instructions)
            assert not np.isfinite(found[0]).any(), "nothing is made up from what is no number"
            np.testing.assert_array_equal(found[1], expected)
    for factor in (1e-38, 1e-37):  # next to nothing, yet no division by it
        tiny = Blocks(4, levels, (scales * factor).astype(np.float32), highest.zeros)
        found = run(write(tmp_path, "BlockMatMul", [tiny], 96, 4), ones, activation_bits, instructions)
        assert np.abs(found).max() < 1e-33
    file = write(tmp_path, "BlockMatMul", [lowest], 96, 8)
    np.testing.assert_allclose(
        run(file, -ones, activation_bits, instructions), rounded(-ones, activation_bits) @ dense(lowest).T, rtol=1e-6
    )
    nothing = Blocks(4, levels, 0 * scales, highest.zeros)
    assert not run(write(tmp_path, "BlockMatMul", [nothing], 96, 4), ones, activation_bits, instructions).any()


@needs_kernels
def test_silu_is_float64s(tmp_path):
    """Element by element: a gate of one column, an `up` that is 1, scales that float16 has."""
    levels, zeros = np.zeros((8, 1, BLOCK), np.uint8), np.zeros((8, 1), np.uint8)
    levels[:, 0, 0] = 1
    gate, up = (Blocks(4, levels, np.full((8, 1), 2.0**-10, np.float32), zeros) for _ in range(2))
    up.scales[:] = 1
    file = write(tmp_path, "GatedBlockMatMul", [gate, up], 32, 4)
    opened = session(file)
    for value in np.concatenate([np.linspace(-85, 85, 500), np.geomspace(1e-6, 1, 40), -np.geomspace(1e-6, 1, 40)]):
        x = np.zeros((1, 1, 32), np.float32)
        x[..., 0] = value * 1024
        gates = rounded(x[0])[0, 0] / 1024
        expected = gates / (1 + np.exp(-gates)) * rounded(x[0])[0, 0]
        rtol = 5e-7 + 1e-7 * abs(value)  # what float32 leaves of the exponent
        np.testing.assert_allclose(opened.run(None, {"x": x})[0][0, 0], expected, rtol=rtol)


@needs_kernels
def test_several_sessions_and_threads_at_once(tmp_path):
    blocks = [blocks_of(40, 96, 4, True, seed) for seed in range(2)]
    x = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    sessions = [session(write(tmp_path / str(at), "BlockMatMul", [b], 96, 4)) for at, b in enumerate(blocks)]
    expected = [opened.run(None, {"x": x[None]})[0] for opened in sessions]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(at, pool.submit(sessions[at].run, None, {"x": x[None]})) for at in [0, 1] * 50]
        for at, job in jobs:
            np.testing.assert_array_equal(job.result()[0], expected[at])


@needs_kernels
@pytest.mark.parametrize("method", ["rtn", "q4_1"])
def test_a_graph_computes_what_onnx_runtime_does_and_in_fewer_nodes(tmp_path, method):
    """MatMulNBits at accuracy level 4 rounds activations too; with the means of blocks it rounds those once more."""
    random = np.random.default_rng(0)
    shapes = {"gate": (64, 96), "up": (64, 96), "down": (96, 64), "head": (64, 128)}
    weights = {name: random.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "gate"], ["g"], name="gate"),
        helper.make_node("MatMul", ["x", "up"], ["u"], name="up"),
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["g", "s"], ["silu"]),
        helper.make_node("Mul", ["silu", "u"], ["h"]),
        helper.make_node("MatMul", ["h", "down"], ["d"], name="down"),
        helper.make_node("MatMul", ["d", "head"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "s", 64])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "s", 128])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "plain.onnx")
    quantize_weights(*open_graph(tmp_path / "plain.onnx"), tmp_path / "model.onnx", 4, method)
    write_kernels(tmp_path / "model.onnx", tmp_path / "ours.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "ours.onnx", load_external_data=False).graph.node]
    assert sorted(kinds) == ["BlockMatMul", "BlockMatMul", "GatedBlockMatMul"]
    x = random.standard_normal((1, 6, 64)).astype(np.float32)
    (found,) = session(tmp_path / "ours.onnx").run(None, {"x": x})
    (theirs,) = open_session(tmp_path / "model.onnx", 2).run(None, {"x": x})
    assert relative(found, theirs) < 0.02
    restore = with_offsets if method == "q4_1" else lambda matrix: nearest(matrix, 4)
    whole = {name: _restored(restore(matrix), len(matrix)) for name, matrix in weights.items() if name != "head"}
    gates, ups = x[0] @ whole["gate"], x[0] @ whole["up"]
    exact = (gates / (1 + np.exp(-gates)) * ups) @ whole["down"] @ dense(nearest(weights["head"], 8)).T
    assert relative(found[0], exact) < 0.02, "activations in 8 bits are all that it loses"
    assert relative(found[0], exact) < 1.5 * relative(theirs[0], exact)
    (fine,) = session(tmp_path / "ours.onnx", 24).run(None, {"x": x})
    assert relative(fine[0], exact) < (1e-5 if method == "rtn" else 1e-3), "but for float16 offsets"


def _restored(blocks: Blocks, columns: int) -> np.ndarray:
    """[K, N]: what the blocks stand for, the columns for the means spread over theirs."""
    stored = dense(blocks)
    weights, means = stored[:, :columns], stored[:, columns:][:, : columns // BLOCK]
    return (weights + np.repeat(means, BLOCK, 1) / BLOCK if means.size else weights).T


@needs_kernels
def test_what_does_not_fit_is_said_when_the_graph_is_opened(tmp_path):
    blocks = blocks_of(16, 64, 4, True)
    file = write(tmp_path, "BlockMatMul", [blocks], 64, 4)
    with pytest.raises(Exception, match="K columns"):
        run(file, np.zeros((1, 32), np.float32))
    for columns, reason in ((48, "blocks of 32"), (96, "as many blocks"), (32, "scales and units for each block")):
        refused(file, reason, lambda node, columns=columns: set_attribute(node, "K", columns))
    refused(file, "expected 4 bits with scales of 8", lambda node: set_attribute(node, "bits", 8))
    refused(file, "two matrices of one size", two_matrices(file, blocks_of(24, 64, 4, True)))
    refused(file, "two matrices of one size and format", two_matrices(file, blocks_of(16, 64, 4, False)))


def set_attribute(node: onnx.NodeProto, name: str, value: int) -> None:
    next(attribute for attribute in node.attribute if attribute.name == name).i = value


def two_matrices(file: Path, up: Blocks):
    """A change of the node of a BlockMatMul that makes it gated, with `up`."""

    def change(node: onnx.NodeProto) -> list[onnx.TensorProto]:
        node.op_type = "GatedBlockMatMul"
        names = [f"1/{at}" for at in range(3)]
        node.input.extend(names)
        columns = up.levels.shape[1] * BLOCK
        return [numpy_helper.from_array(value, name) for name, value in zip(names, inputs_of(up, columns), strict=True)]

    return change


def refused(file: Path, reason: str, change) -> None:
    model = onnx.load(file)
    model.graph.initializer.extend(change(model.graph.node[0]) or [])
    onnx.save(model, file.with_name("changed.onnx"))
    with pytest.raises(UserError, match=reason):
        session(file.with_name("changed.onnx"))


@needs_kernels
@pytest.mark.parametrize("place", range(3))
def test_weights_that_are_an_input_are_refused(place, tmp_path):
    file = write(tmp_path, "BlockMatMul", [blocks_of(16, 64, 4, True)], 64, 4)
    model = onnx.load(file)
    tensor = model.graph.initializer.pop(place)
    model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, file)
    with pytest.raises(UserError, match="expected constant codes"):
        session(file)


MAPPED = """
import sys, pathlib, numpy as np
from runtime import kernels
from runtime.backends.ort_session import open_session

def private() -> int:
    rows = pathlib.Path("/proc/self/status").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(("RssAnon", "RssShmem")))

before = private()
session = open_session(pathlib.Path(sys.argv[1]), 1, operators=kernels.library())
session.run(None, {"x": np.ones((1, 1, 4096), np.float32)})
print(private() - before)
"""


@needs_kernels
def test_weights_are_mapped_and_not_copied(tmp_path):
    """8 MiB of codes: opened and read, they are no memory of the process's own."""
    file = write(tmp_path, "BlockMatMul", [blocks_of(4096, 4096, 4, False)], 4096, 4, aside=True)
    done = subprocess.run([sys.executable, "-c", MAPPED, str(file)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4096, "KiB"


def test_inputs_that_are_no_multiple_of_a_block_are_left_to_onnx_runtime(tmp_path):
    """All or nothing: what a sequence gets would else depend on how many others there are."""
    weights = np.random.default_rng(0).standard_normal((80, 64)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "body"], ["h"], name="body"),
            helper.make_node("MatMul", ["h", "head"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "s", 80])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "s", 64])],
        [numpy_helper.from_array(weights, "body"), numpy_helper.from_array(weights[:64], "head")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "plain.onnx")
    quantize_weights(*open_graph(tmp_path / "plain.onnx"), tmp_path / "model.onnx", 4, "rtn")
    assert write_variants(tmp_path / "model.onnx") == {"prefill_file": tmp_path / "prefill.onnx"}
    assert not (tmp_path / "kernels.onnx").exists()


@needs_kernels
def test_an_old_processor_gets_them_only_where_the_scalar_reference_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("flags : fpu sse2 avx\n")
    assert kernels.unavailable(tmp_path / "cpuinfo") == "the processor has no avx2, f16c, fma"
    monkeypatch.setenv("CONVLLAVA_KERNELS", "reference")
    assert kernels.unavailable(tmp_path / "cpuinfo") is None


@pytest.fixture(scope="module", params=["int4", "int8"])
def bundle(request):
    return open_bundle(exported("--res", 256, "--decoder-precision", request.param))


@needs_kernels
def test_a_decoder_is_as_near_to_float32_products_as_onnx_runtimes(bundle):
    """Of the same weights. Both round activations to 8 bits."""
    ours, plain = (open_components(bundle, Backends(decoder=name)).decoder for name in ("kernels", "onnx"))
    assert ours.kernels and ours.batch_invariant and not plain.kernels and not plain.batch_invariant
    exact = ort_decoder.OnnxDecoder(bundle.path(bundle.decoder.prefill_file), bundle.decoder)
    sequences = [decoder.start(256) for decoder in (exact, ours, plain)]
    ids, errors = np.random.default_rng(0).integers(3, 400, 100).tolist(), []
    for _ in range(32):
        expected, *found = (sequence.forward(ids) for sequence in sequences)
        errors.append([relative(logits, expected) for logits in found])
        ids = [int(expected.argmax())]
    our_error, their_error = np.mean(errors, 0)
    assert our_error < 0.1 and our_error < 1.3 * their_error


@needs_kernels
def test_with_activations_in_24_bits_a_decoder_gives_the_ids_of_float32_products(bundle):
    """Each with its own ids, as they are used. The scales and offsets of asymmetric blocks are float16 in the kernels'
    graph: there, the same ids give nearly the same logits."""
    exact = ort_decoder.OnnxDecoder(bundle.path(bundle.decoder.prefill_file), bundle.decoder)
    parts = open_components(bundle, Backends(decoder="kernels24"))
    ours = parts.decoder
    assert parts.decoder_backend.runtime == "onnxruntime with kernels24"
    is_exact = bundle.decoder.precision == "int8"
    for seed in range(4):
        sequences, said = [decoder.start(256) for decoder in (exact, ours)], []
        prompt = np.random.default_rng(seed).integers(3, 400, 60).tolist()
        for sequence in sequences:
            ids = [sequence.forward_greedy(prompt)]
            while len(ids) < 48:
                token = sequence.forward_greedy(ids[-1:])
                ids.append(token if is_exact or not said else said[0][len(ids)])
            said.append(ids)
        assert said[0] == said[1]
        expected, found = (sequence.forward([5]) for sequence in sequences)
        assert relative(found, expected) < (2e-5 if is_exact else 0.02)


@needs_kernels
@pytest.mark.parametrize("products", ["kernels", "kernels24"])
def test_sequences_decoded_together_get_what_they_get_alone(bundle, products):
    decoder = decoders.open_decoder(bundle, Backends(decoder=products))
    prompts = [np.random.default_rng(seed).integers(3, 400, 5 + 7 * seed).tolist() for seed in range(3)]
    alone, slots = [], Slots(decoder, 3, 64)
    for slot, prompt in zip(slots, prompts, strict=True):
        sequence = decoder.start(64)
        tokens = [sequence.forward_greedy(prompt)]
        for _ in range(8):
            tokens.append(sequence.forward_greedy(tokens[-1:]))
        alone.append((tokens, sequence.forward(tokens[-1:]).copy()))
        slot.forward(prompt)
    for step in range(9):
        following = slots.step([tokens[step] for tokens, _ in alone])
        if step < 8:
            assert following == [tokens[step + 1] for tokens, _ in alone]
    np.testing.assert_array_equal(slots.logits(3), [logits for _, logits in alone])


@needs_kernels
def test_they_are_taken_by_themselves_only_where_they_are_known_to_be_faster(bundle, monkeypatch):
    for x86 in (True, False):
        monkeypatch.setattr(decoders, "is_x86", lambda x86=x86: x86)
        parts = open_components(bundle, Backends(encoder="onnx"))
        assert parts.decoder.kernels == x86
        assert parts.decoder_backend.file == ("decoder/kernels.onnx" if x86 else "decoder/model.onnx")
        assert parts.decoder_backend.reason == ""


def test_a_graph_of_an_earlier_version_is_left_to_onnx_runtime(bundle, tmp_path, monkeypatch):
    """It had no file of scales beside it."""
    shutil.copytree(bundle.folder, tmp_path / "old")
    (tmp_path / "old" / f"{bundle.decoder.kernels_file}.data").unlink()
    monkeypatch.setattr(decoders, "is_x86", lambda: True)
    with pytest.raises(UserError, match="export the bundle anew"):
        decoders.open_decoder(open_old(bundle, tmp_path / "old"), Backends(decoder="kernels"))
    assert "export the bundle anew" in decoders.kernels_missing(open_old(bundle, tmp_path / "old"))


def open_old(bundle, folder: Path):
    return dataclasses.replace(bundle, folder=folder)


def test_without_a_compiler_the_reason_is_told(bundle, conformance_bundle, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(kernels, "NEEDED", set())
    monkeypatch.setattr(decoders, "is_x86", lambda: True)
    parts = open_components(bundle, Backends(encoder="onnx"))
    assert not parts.decoder.kernels and "not built" in parts.decoder_backend.reason
    monkeypatch.setattr(decoders, "is_x86", lambda: False)
    assert open_components(bundle, Backends(encoder="onnx")).decoder_backend.reason == "", "they would not be taken"
    with pytest.raises(UserError, match="--decoder kernels: they were not built"):
        decoders.open_decoder(bundle, Backends(decoder="kernels"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="has no graph for them"):
        decoders.open_decoder(open_bundle(conformance_bundle), Backends(decoder="kernels"))
