"""Llama -> one ONNX graph with a KV cache that takes token ids and image embeds alike.

    python -m export.decoder [--checkpoint DIR] [--precision fp32|fp16|int8|int4|w4a16] [--graph fused|portable]
                             [--out DIR]

fused: ONNX Runtime GenAI's model builder (GroupQueryAttention with the rotary embedding inside, MatMulNBits), for ONNX
Runtime; the cache is updated in place and only the last position gets logits.
portable: our own graph of ONNX's standard operators (`export.llama`), which TensorRT can parse; fp32 and fp16, where
nodes that overflow FP16 stay in FP32 (`export.half`). Its cache is updated in place too, and has a fixed capacity.

Both start from token ids only. Neither can begin with an image, so `merge_image_embeds` adds an input: image_embeds
[N, D]; an id of -1 - k in input_ids stands for its row k. int8 and int4 round the weights alone (`calib.blocks`);
w4a16 is for GPUs: 4 bits around zero by the model builder, all else in float16.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from calib.blocks import quantise_weights
from export.cli import BUILD, Difference, ParityError, compare, name_of, open_checkpoint, report, run
from export.half import half_graph
from export.llama import SMALL, llama_graph
from runtime import kernels
from runtime.bundle import DecoderPart
from runtime.decoder import NEXT_TOKEN, Decoder, KVCache, Sequence, allocate
from runtime.device import Cpu
from runtime.errors import UserError
from runtime.session import bind_input, bind_output, input_dtype, open_session
from train.model import Checkpoint, load_language_state

CAPACITY_HELP = "positions of the portable graph's KV cache; default: the model's context"
LEAST_CAPACITY = 32  # what `check_decoder` asks of a graph
GRAPHS = ("fused", "portable")
# precision -> builder's precision and execution provider. fp16 is written for CUDA, the provider that computes in it;
# on a CPU ONNX Runtime runs the same graph by way of float32. The builder rounds to 4 bits by itself: ONNX Runtime's
# quick products on a GPU have no offsets as `calib.blocks` has them.
BUILDER = {"fp32": ("fp32", "cpu"), "fp16": ("fp16", "cuda"), "w4a16": ("int4", "cuda")}
HALF = ("fp16", "w4a16")  # with activations in float16
# precision -> bits and method of `calib.blocks`, which rounds the weights of the float32 graph
BLOCKS = {"int8": (8, "rtn"), "int4": (4, "q4_1")}
PRECISIONS = (*BUILDER, *BLOCKS)
# Relative error of the logits against PyTorch in float32. Weight-only quantisation has no fixed error: these bounds
# catch a broken graph, and accuracy is for a task's questions to tell.
BOUNDS = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.1, "int4": 0.8, "w4a16": 0.8}


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
        built = Path(scratch, file.name)
        if graph == "fused":
            source = Path(scratch, "llama")
            write_llama(checkpoint, source)
            quietly(_build_fused, source, built.parent, "fp32" if precision in BLOCKS else precision)
            model = onnx.load(str(built), load_external_data=False)
            merge_image_embeds(model)
            add_next_token(model)
            onnx.save(model, str(built))
            if precision in BLOCKS:
                whole, built = built, Path(scratch, "blocks", built.name)
                quantise_weights(whole, built, *BLOCKS[precision])
        else:
            capacity = checkpoint.llama_config.max_position_embeddings if capacity is None else capacity
            _build_portable(checkpoint, built, precision, capacity)
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


def decoder_part(
    checkpoint: Checkpoint,
    precision: str,
    file: str,
    **others: str | None,
) -> DecoderPart:
    """What the manifest says of a fused graph at `file`, a path inside the bundle. others: `DecoderPart`'s other files,
    by name."""
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


def merge_image_embeds(model: onnx.ModelProto) -> None:
    """Give a token-id decoder the input image_embeds [num_image_embeds, hidden], in place.

    Where input_ids [B, S] is below 0, row -1 - id of image_embeds takes the token embedding's place. Finds the one
    node that looks `input_ids` up in the embedding table; raises ValueError if there is not exactly one.
    """
    graph = model.graph
    lookups = [
        node for node in graph.node if node.op_type in ("Gather", "GatherBlockQuantized") and "input_ids" in node.input
    ]
    if len(lookups) != 1:
        raise ValueError(f"expected one look-up of input_ids in the embedding table, found {len(lookups)}")
    lookup = lookups[0]
    hidden, element = _hidden_size(graph), _float_type(graph)
    merged, lookup.output[0] = lookup.output[0], "image_merge/token_embeds"
    lookup.input[list(lookup.input).index("input_ids")] = "image_merge/token_ids"
    constants = {
        "image_merge/zero": np.array(0, np.int64),
        "image_merge/minus_one": np.array(-1, np.int64),
        "image_merge/last_axis": np.array([-1], np.int64),
        "image_merge/blank": np.zeros((1, hidden), helper.tensor_dtype_to_np_dtype(element)),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    n = "image_merge/{}".format
    before = [
        helper.make_node("Less", ["input_ids", n("zero")], [n("is_image")]),
        helper.make_node("Where", [n("is_image"), n("zero"), "input_ids"], [n("token_ids")]),
    ]
    after = [
        helper.make_node("Sub", [n("minus_one"), "input_ids"], [n("row_of_id")]),
        helper.make_node("Where", [n("is_image"), n("row_of_id"), n("zero")], [n("row")]),
        # The blank row keeps the look-up valid where there is no image at all
        helper.make_node("Concat", ["image_embeds", n("blank")], [n("rows")], axis=0),
        helper.make_node("Gather", [n("rows"), n("row")], [n("embeds")], axis=0),  # [B, S, hidden]
        helper.make_node("Unsqueeze", [n("is_image"), n("last_axis")], [n("is_image_row")]),
        helper.make_node("Where", [n("is_image_row"), n("embeds"), n("token_embeds")], [merged]),
    ]
    nodes = list(graph.node)
    at = nodes.index(lookup)
    for node in before + after:
        node.name = node.output[0] + "/" + node.op_type
    del graph.node[:]
    graph.node.extend([*before, *nodes[: at + 1], *after, *nodes[at + 1 :]])
    graph.input.insert(1, helper.make_tensor_value_info("image_embeds", element, ["num_image_embeds", hidden]))


def add_next_token(model: onnx.ModelProto) -> None:
    """Give a decoder the output next_token [batch, 1, 1] int64, the likeliest by logits [batch, 1, vocab], in place.

    So that greedy decoding takes one number off the device at each step instead of all logits. Of equal logits the
    lowest id wins. TopK rather than ArgMax, because ONNX Runtime has it for float16 on CUDA.
    """
    one = numpy_helper.from_array(np.array([1], np.int64), "next_token/one")
    model.graph.initializer.append(one)
    model.graph.node.append(
        helper.make_node("TopK", ["logits", one.name], ["next_token/logit", NEXT_TOKEN], name="next_token/TopK")
    )
    model.graph.output.append(helper.make_tensor_value_info(NEXT_TOKEN, onnx.TensorProto.INT64, ["batch_size", 1, 1]))


def _hidden_size(graph: onnx.GraphProto) -> int:
    """From the final or first normalisation's weight, which every Llama graph keeps as a vector of that length."""
    for tensor in graph.initializer:
        if tensor.name.endswith(("input_layernorm.weight", "norm.weight")) and len(tensor.dims) == 1:
            return tensor.dims[0]
    raise ValueError("no layer norm weight in the graph to read the hidden size from")


def _float_type(graph: onnx.GraphProto) -> int:
    return next(value for value in graph.input if value.name.startswith("past_key")).type.tensor_type.elem_type


def write_llama(checkpoint: Checkpoint, folder: Path) -> None:
    """The language model alone as a Hugging Face folder, which is what both exporters read."""
    folder.mkdir(parents=True)
    config = checkpoint.llama_config
    config.architectures = ["LlamaForCausalLM"]
    if scale := _position_scale(checkpoint):
        config.rope_position_scale = scale  # the model builder's word for linear scaling
    state = {key: tensor.contiguous() for key, tensor in load_language_state(checkpoint).items()}
    config.dtype = next(iter(state.values())).dtype
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    # The exporters insist on some tokenizer; the real one reaches the bundle by another way
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)


def _position_scale(checkpoint: Checkpoint) -> float | None:
    """What linear rotary scaling multiplies positions by; None where there is none, or the exporters know it.

    Raises UserError for a kind that the graphs cannot have: dynamic scaling depends on the length reached.
    """
    scaling = checkpoint.config.get("rope_scaling") or checkpoint.config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return 1 / scaling["factor"]
    if kind not in ("default", "llama3"):
        raise UserError(
            f"{checkpoint.folder / 'config.json'}: rotary scaling {kind!r} cannot be exported, "
            "expected none, linear or llama3"
        )
    return None


def _build_fused(source: Path, out: Path, precision: str) -> None:
    try:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ImportError as error:
        raise UserError(f"--graph fused needs onnxruntime-genai, whose import failed: {error}") from error
    paths = ("llama", str(source), str(out), *BUILDER[precision], str(source.parent / "cache"))
    options = parse_extra_options(*paths, ["prune_lm_head=true"])
    create_model(*paths, **options)


def _build_portable(checkpoint: Checkpoint, file: Path, precision: str, capacity: int) -> None:
    _position_scale(checkpoint)  # refuses what has no fixed table of angles
    data = Path(f"{file}.data")
    model = llama_graph(checkpoint.llama_config, load_language_state(checkpoint), data, capacity)
    merge_image_embeds(model)
    add_next_token(model)
    onnx.save(model, str(file))
    if precision == "fp16":
        model, _ = half_graph(onnx.load(str(file)), "decoder")
        data.unlink()  # onnx appends to a file that is there
        onnx.save(model, str(file), save_as_external_data=True, location=data.name, size_threshold=SMALL)


def quietly(build, *arguments) -> None:
    """Run an exporter without its chatter; what it said comes out only if it fails."""
    said, verbosity = io.StringIO(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its handler keeps the real stderr
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build(*arguments)
    except UserError:
        raise
    except Exception:
        print(said.getvalue(), file=sys.stderr)
        raise
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_decoder(checkpoint: Checkpoint, file: Path, precision: str, graph: str = "fused") -> list[Difference]:
    """Logits of the graph against PyTorch's: a prompt with two images, a second turn, three single steps.

    graph: fused, portable or kernels (a fused one with the operators of `runtime.kernels`).

    PyTorch computes in float32 for a float32 graph, else in the checkpoint's own type, which the bounds leave room for:
    a 7B stored in float16 then needs 14 GB here instead of 27.
    """
    random = np.random.default_rng(0)
    state = load_language_state(checkpoint, torch.float32 if precision == "fp32" else None)
    dtype = state["model.embed_tokens.weight"].dtype
    llama = LlamaForCausalLM.from_pretrained(None, config=checkpoint.llama_config, state_dict=state, dtype=dtype)
    table = llama.get_input_embeddings().weight.detach().float().numpy()
    images = (random.standard_normal((9, table.shape[1])) * table.std()).astype(np.float32)
    tokens = random.integers(3, len(table), 16).tolist()
    calls = {
        "prompt with two images": [*tokens[:4], *range(-1, -6, -1), *tokens[4:6], *range(-6, -10, -1), *tokens[6:9]],
        "second turn": tokens[9:13],
        "step 1": [tokens[13]],
        "step 2": [tokens[14]],
        "step 3": [tokens[15]],
    }
    part = decoder_part(checkpoint, precision, file.name)
    if graph == "portable":
        forward = PortableSequence(file).forward
    else:
        forward = Decoder(file, part, operators=kernels.library() if graph == "kernels" else None).start(64).forward
    rows, past = [], None
    for what, ids in calls.items():
        embeds = np.stack([table[i] if i >= 0 else images[-1 - i] for i in ids])
        with torch.inference_mode():
            reference = llama(
                inputs_embeds=torch.from_numpy(embeds)[None].to(dtype), past_key_values=past, use_cache=True
            )
        past = reference.past_key_values
        found = forward(ids, images if min(ids) < 0 else None)
        rows.append(
            compare(f"{graph} {precision} logits, {what}", found, reference.logits[0, -1].float(), BOUNDS[precision])
        )
    return rows


class PortableSequence(Sequence):
    """The portable graph on ONNX Runtime's CPU provider, its `past` and `present` bound to the same memory."""

    def __init__(self, file: Path):
        self._session = open_session(file, None)
        shapes = {value.name: value.shape for value in (*self._session.get_inputs(), *self._session.get_outputs())}
        self._dtype, self._device = np.dtype(input_dtype(self._session, "image_embeds")), Cpu()
        layers = sum(name.startswith("past_key_values") for name in shapes) // 2
        shape = (1, *shapes["past_key_values.0.key"][1:])
        cache = KVCache(allocate(layers, shape, self._dtype, self._device))
        logits = self._device.zeros((1, 1, shapes["logits"][2]), self._dtype)
        super().__init__(cache, logits, self._device.zeros((1, 1, 1), np.int64))
        self._no_images = np.empty((0, shapes["image_embeds"][1]), self._dtype)
        self._binding = self._session.io_binding()
        for name, array in cache.tensors("past_key_values").items():
            bind_input(self._binding, name, array, self._device)
        for name, array in (cache.tensors("present") | {"logits": logits, NEXT_TOKEN: self._likeliest}).items():
            bind_output(self._binding, name, array, self._device)

    def restart(self) -> "PortableSequence":
        """Forget everything; returns itself."""
        self.rewind(0)
        return self

    def _run(self, ids: list[int], image_embeds: np.ndarray | None) -> None:
        total = self.cache.room_for(len(ids))
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "write_indices": np.array([self.cache.length], np.int64),
            "image_embeds": self._no_images if image_embeds is None else self._device.take(image_embeds, self._dtype),
        }
        for name, array in inputs.items():
            bind_input(self._binding, name, array, self._device)
        self._session.run_with_iobinding(self._binding)
        self.cache.length = total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m export.decoder", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="folder or Hub id in the released layout; default: the demo model")
    parser.add_argument("--precision", default="fp32", help=f"one of {', '.join(PRECISIONS)}; default: fp32")
    parser.add_argument("--graph", default="fused", help="fused (ONNX Runtime) or portable (standard operators)")
    parser.add_argument("--capacity", type=int, metavar="N", help=CAPACITY_HELP)
    parser.add_argument(
        "--out", type=Path, help="folder for the graph; default: build/decoder/<checkpoint>-<precision>"
    )
    args = parser.parse_args()
    check_options(args.precision, args.graph, args.capacity)
    checkpoint = open_checkpoint(args.checkpoint)
    out = args.out or BUILD / "decoder" / f"{name_of(checkpoint)}-{args.precision}"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
        file = export_decoder(checkpoint, Path(partial), args.precision, args.graph, args.capacity)
        if not report(check_decoder(checkpoint, file, args.precision, args.graph)):
            raise ParityError("the exported graph does not compute what the checkpoint does; nothing was written")
        size = 0
        for written in sorted(Path(partial).iterdir(), reverse=True):  # weights before the graph that names them
            size += written.stat().st_size
            shutil.move(written, out / written.name)
    print(f"{out / file.name}: {args.graph} {args.precision}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run(main)
