"""Llama -> one ONNX graph with a KV cache that takes token ids and image embeds alike.

fused: for ONNX Runtime (`export.decoder.fused`: GroupQueryAttention with the rotary embedding inside, MatMulNBits); the
cache is updated in place and only the last position gets logits.
portable: ONNX's standard operators (`export.decoder.llama`), which TensorRT can parse; fp32 and fp16,
where nodes that overflow FP16 stay in FP32 (`export.graphs.mixed_precision`). Its cache is updated in place too, and
has a fixed capacity.

Both start from token ids only. Neither can begin with an image, so `merge_image_embeds` adds an input: image_embeds
[N, D]; an id of -1 - k in input_ids stands for its row k. int8 and int4 round the weights alone
(`export.graphs.matmul_nbits`); w4a16 is for GPUs: 4 bits around zero, all else in float16.

Weights pass one at a time from the checkpoint's mapped files to the one beside the graph.
"""

import os
import tempfile
from pathlib import Path

import torch
from onnx import TensorProto
from transformers import LlamaConfig

from export.decoder.fused import fused_graph
from export.decoder.llama import llama_graph
from export.decoder.surgery import add_next_token, merge_image_embeds
from export.graphs.matmul_nbits import quantize_weights
from export.graphs.mixed_precision import half_decoder
from export.graphs.store import write_graph
from runtime.bundle.manifest import DecoderPart
from runtime.errors import UserError
from train.model import Checkpoint, load_language_state

CAPACITY_HELP = "positions of the portable graph's KV cache; default: the model's context"
LEAST_CAPACITY = 32  # what `check_decoder` asks of a graph
GRAPHS = ("fused", "portable")
HALF = ("fp16", "w4a16")  # with activations in float16
# precision -> bits and method of `export.graphs.matmul_nbits`, which rounds the weights of the float32 graph
BLOCKS = {"int8": (8, "rtn"), "int4": (4, "q4_1")}
ROUNDED = BLOCKS | {"w4a16": (4, "rtn")}  # the last in a float16 graph, for GPUs
PRECISIONS = ("fp32", "fp16", *ROUNDED)


def export_decoder(
    checkpoint: Checkpoint, folder: Path, precision: str, graph: str = "fused", capacity: int | None = None
) -> Path:
    """Write the graph (and its weights, `<file>.data`) into `folder`; returns `model.onnx` or `portable.onnx` there.

    capacity: positions of the portable graph's KV cache, by default the model's context length. What attention costs
    there grows with it, however few positions are filled.
    Raises UserError for an unknown precision or graph, a precision or capacity the graph cannot have, and a missing
    exporter.
    """
    check_options(precision, graph, capacity)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("model.onnx" if graph == "fused" else "portable.onnx")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        if graph == "fused":
            check_rotary(checkpoint)
            built = Path(scratch, file.name)
            write_fused(checkpoint.llama_config, load_language_state(checkpoint), precision, built)
        else:
            capacity = checkpoint.llama_config.max_position_embeddings if capacity is None else capacity
            built = _build_portable(checkpoint, Path(scratch), precision, capacity)
        for written in (Path(f"{built}.data"), built):  # weights before the graph that names them
            os.replace(written, folder / written.name)
    return file


def check_options(precision: str, graph: str = "fused", capacity: int | None = None) -> None:
    """Raises UserError as `export_decoder` would, before any work."""
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if graph not in GRAPHS:
        raise UserError(f"unknown graph {graph!r}, expected one of {', '.join(GRAPHS)}")
    if graph == "portable" and precision not in ("fp32", "fp16"):
        raise UserError(f"the portable graph comes in fp32 and fp16, not {precision}; --graph fused has that one")
    if capacity is not None and graph != "portable":
        raise UserError("a capacity is the portable graph's: the fused one has room for the model's context")
    if capacity is not None and capacity < LEAST_CAPACITY:
        raise UserError(f"a KV cache of {capacity} positions, expected {LEAST_CAPACITY} or more")


def decoder_part(checkpoint: Checkpoint, precision: str, file: str, **others: str | None) -> DecoderPart:
    """The manifest's section of a fused graph.

    Args:
        file: path of the graph in the bundle.
        others: paths of `DecoderPart`'s other graphs, by field.
    """
    llama = checkpoint.llama_config
    return DecoderPart(
        file=file,
        precision=precision,
        layers=llama.num_hidden_layers,
        kv_heads=llama.num_key_value_heads,
        head_dim=getattr(llama, "head_dim", None) or llama.hidden_size // llama.num_attention_heads,
        context_length=llama.max_position_embeddings,
        kv_dtype="float16" if precision in HALF else "float32",
        vocab_size=llama.vocab_size,
        **others,
    )


def write_fused(config: LlamaConfig, state: dict[str, torch.Tensor], precision: str, file: Path) -> None:
    """Write the fused graph to `file` and its weights beside it. config, state: see `GraphWriter`."""
    model, read = fused_graph(config, state, TensorProto.FLOAT16 if precision in HALF else TensorProto.FLOAT)
    merge_image_embeds(model)
    add_next_token(model)
    if precision in ROUNDED:
        quantize_weights(model, read, file, *ROUNDED[precision])
    else:
        write_graph(model, read, file)


def _build_portable(checkpoint: Checkpoint, folder: Path, precision: str, capacity: int) -> Path:
    check_rotary(checkpoint)
    file = folder / "portable.onnx"
    model, read = llama_graph(checkpoint.llama_config, load_language_state(checkpoint), capacity)
    merge_image_embeds(model)
    add_next_token(model)
    if precision == "fp16":
        model, read = half_decoder(model, read)
    write_graph(model, read, file)
    return file


def check_rotary(checkpoint: Checkpoint) -> None:
    """Raises UserError for rotary scaling without a fixed table of angles, such as one by the length reached."""
    scaling = checkpoint.config.get("rope_scaling") or checkpoint.config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise UserError(
            f"{checkpoint.folder / 'config.json'}: rotary scaling {kind!r} cannot be exported, "
            "expected none, linear or llama3"
        )
