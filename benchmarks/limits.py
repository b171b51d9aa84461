"""What the machine can do at best, measured: the bounds that other figures stand next to."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from transformers import LlamaConfig

from runtime.bundle.manifest import Bundle

# operators that read a few rows of a table
LOOKED_UP = ("Gather", "GatherBlockQuantized", "GroupQueryAttention")


@dataclass(frozen=True)
class DecoderFiles:
    """What a bundle's decoder reads in a step: bytes, their precision, and bytes of a number in its KV cache."""

    size: int
    precision: str
    kv_itemsize: int = 4

    @classmethod
    def of(cls, bundle: Bundle) -> "DecoderFiles":
        file = bundle.path(bundle.decoder.kernels_file or bundle.decoder.file)
        return cls(step_bytes(file), bundle.decoder.precision, np.dtype(bundle.decoder.kv_dtype).itemsize)


def step_bytes(file: Path) -> int:
    """Bytes of the weights that a step of a decoder's graph reads whole: all but looked-up rows and angles."""
    graph = onnx.load(file, load_external_data=False).graph
    read = {name for node in graph.node if node.op_type not in LOOKED_UP for name in node.input}
    return sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
        if tensor.name in read
    )


def read_bandwidth(threads: int, megabytes: int = 2000, rounds: int = 9) -> float:
    """GB/s of summing an array larger than any cache, the best of the rounds."""
    values = torch.ones(megabytes * 250_000)
    return megabytes / 1e3 / _least(values.sum, threads, rounds)


def matmul_rate(threads: int, size: int = 2048, rounds: int = 9) -> float:
    """GFLOP/s of a float32 product of square matrices, the best of the rounds by PyTorch and by ONNX Runtime, of which
    now this and now that one knows the processor better."""
    one = torch.randn(size, size)
    values, session = one.numpy(), _product(one.numpy(), threads)
    ways = (lambda: one @ one, lambda: session.run(None, {"x": values}))
    return 2 * size**3 / 1e9 / min(_least(way, threads, rounds) for way in ways)


def _product(values: np.ndarray, threads: int) -> onnxruntime.InferenceSession:
    """x -> x @ values, of square matrices."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, values.shape) for name in "xy")
    node = helper.make_node("MatMul", ["x", "values"], ["y"])
    graph = helper.make_graph([node], "product", [x], [y], [numpy_helper.from_array(values, "values")])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def machine_limits(threads: int) -> dict[str, float]:
    """All three that bound a decoder, by the names that results files give them."""
    limits = {"read_gb_per_s": read_bandwidth(threads), "matmul_gflop_per_s": matmul_rate(threads)}
    return limits | {"bytes_gop_per_s": bytes_rate(threads)}


def bytes_rate(threads: int, size: int = 2048, rounds: int = 9) -> float:
    """10^9 operations a second of a product of square matrices of signed bytes, the best of the rounds."""
    one = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    return 2 * size**3 / 1e9 / _least(lambda: torch._int_mm(one, one), threads, rounds)


def language_operations(config: LlamaConfig, tokens: int) -> int:
    """Of prefilling so many positions, with logits for the last one alone: multiplications and additions."""
    width, layers, attended = config.hidden_size, config.num_hidden_layers, config.num_attention_heads * config.head_dim
    matrices = width * (2 * attended + 2 * config.num_key_value_heads * config.head_dim + 3 * config.intermediate_size)
    return 2 * tokens * layers * (matrices + attended * tokens) + 2 * width * config.vocab_size


def products_rate(precision: str, limits: dict[str, float]) -> float:
    """Operations a second of products with a decoder's weights: those of 4 and 8 bits may meet inputs in 8."""
    least = limits["matmul_gflop_per_s"]
    return 1e9 * (max(least, limits["bytes_gop_per_s"]) if precision in ("int4", "int8") else least)


def prefill_ms(config: LlamaConfig, tokens: int, part: DecoderFiles, limits: dict[str, float]) -> float:
    """The least time of prefilling so many positions."""
    reading = part.size / (1e9 * limits["read_gb_per_s"])
    return 1e3 * max(reading, language_operations(config, tokens) / products_rate(part.precision, limits))


def decoder_limit(row: dict, part: DecoderFiles, config: LlamaConfig, limits: dict[str, float]) -> dict[str, float]:
    """Columns of a row about a prefill or decode steps: what the machine allows at best, and our share of it."""
    tokens, batch = row["context"], row["batch"]
    if row["work"] == "prefill":
        limit = prefill_ms(config, tokens, part, limits)
        return {"limit": round(limit, 1), "reached": round(limit / row["ours"], 3)}
    layers, attended = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    cache = 2 * layers * config.num_key_value_heads * config.head_dim * part.kv_itemsize * tokens
    # a step of one sequence; `language_operations` has one position attend to itself
    operations = language_operations(config, 1) + 2 * layers * attended * (2 * tokens - 1)
    reading = (part.size + cache * batch) / (1e9 * limits["read_gb_per_s"])
    seconds = max(reading, batch * operations / products_rate(part.precision, limits))
    return {"limit": round(batch / seconds, 1), "reached": round(row["ours"] * seconds / batch, 3)}


def _least(work, threads: int, rounds: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)
    finally:
        torch.set_num_threads(before)
