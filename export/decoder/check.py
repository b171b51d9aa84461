"""Hidden states and logits of an exported decoder against PyTorch's, layer by layer."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper
from tqdm import tqdm

from export.graphs.layers import Feed, Run, run_by_layer
from export.graphs.pieces import open_piece
from export.parity import TOLERANCES, Difference, compare
from runtime import kernels
from runtime.graph_io import ATTENTION_MASK, IMAGE_EMBEDS, INPUT_IDS, LOGITS, WRITE_INDICES
from train.model import Checkpoint, load_language_state
from train.model.streamed import StreamedDecoder


def check_decoder(checkpoint: Checkpoint, file: Path, precision: str, graph: str = "fused") -> list[Difference]:
    """Compare a graph with PyTorch: a prompt with two images, a second turn, three single steps.

    Both sides are computed one layer at a time, each from its own hidden states; PyTorch in float32.

    Args:
        graph: fused, portable, prefill or kernels (a fused one with the operators of `runtime.kernels`).

    Returns:
        The layer and call that differ most, or the first that differ too much, and the logits of each call.
    """
    reference = StreamedDecoder(checkpoint.llama_config, load_language_state(checkpoint))
    calls = _calls(checkpoint.llama_config.vocab_size)
    ids = np.concatenate(list(calls.values()))
    embeddings = reference.embed(np.maximum(ids, 0).tolist()).numpy()  # [positions, hidden]
    images = np.random.default_rng(1).standard_normal((9, embeddings.shape[1]), np.float32) * embeddings.std()
    embeddings = torch.from_numpy(np.where(ids[:, None] < 0, images[-1 - np.minimum(ids, -1)], embeddings))
    ends = np.cumsum([len(call) for call in calls.values()])

    model = onnx.load(str(file), load_external_data=False)
    tolerance, layers = TOLERANCES["decoder", precision], checkpoint.llama_config.num_hidden_layers
    sums = _residual_sums(model, layers)
    libraries = [str(kernels.library())] if graph == "kernels" else []

    def opened(piece: onnx.ModelProto) -> Run:
        session = open_piece(piece, file.parent, libraries)
        return lambda feed: list(map(np.asarray, session.run(None, feed)))

    pieces = run_by_layer(
        model, _feeds(model, list(calls.values()), images), opened, {name for names in sums for name in names}
    )
    next(pieces)  # the embeddings
    worst, expected = None, embeddings
    with tqdm(total=layers, desc="compare", unit="layer", disable=None) as bar:
        for i, expected in enumerate(reference.hidden_states(embeddings)):
            for (what, ids), end, values in zip(calls.items(), ends, next(pieces), strict=True):
                found = sum(values[name][0].astype(np.float32) for name in sums[i])
                row = compare(f"layer {i}, {what}", found, expected[end - len(ids) : end], tolerance)
                if worst is None or (worst.ok and not row.error <= worst.error):
                    worst = row
            bar.update()
    last = reference.logits(expected[ends - 1])
    logits = [
        compare(f"{graph} {precision} logits, {what}", values[LOGITS][0, -1], row, tolerance)
        for what, values, row in zip(calls, next(pieces), last, strict=True)
    ]
    return [*([worst] if worst else []), *logits]


def _calls(vocabulary: int) -> dict[str, list[int]]:
    """Token IDs; -1 - k stands for image embedding k."""
    tokens = np.random.default_rng(0).integers(3, vocabulary, 16).tolist()
    return {
        "prompt with two images": [*tokens[:4], *range(-1, -6, -1), *tokens[4:6], *range(-6, -10, -1), *tokens[6:9]],
        "second turn": tokens[9:13],
        "step 1": [tokens[13]],
        "step 2": [tokens[14]],
        "step 3": [tokens[15]],
    }


def _feeds(model: onnx.ModelProto, calls: list[list[int]], images: np.ndarray) -> list[Feed]:
    """Inputs of each call but the KV cache."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    images = images.astype(helper.tensor_dtype_to_np_dtype(types[IMAGE_EMBEDS]))
    feeds, length = [], 0
    for ids in calls:
        feed = {INPUT_IDS: np.array([ids], np.int64), IMAGE_EMBEDS: images if min(ids) < 0 else images[:0]}
        if WRITE_INDICES in types:
            feed[WRITE_INDICES] = np.array([length], np.int64)
        else:
            feed[ATTENTION_MASK] = np.ones((1, length + len(ids)), np.int64)
        feeds.append(feed)
        length += len(ids)
    return feeds


def _residual_sums(model: onnx.ModelProto, layers: int) -> list[list[str]]:
    """For each layer, the tensors whose sum is the hidden state after it."""
    nodes = {node.name: node for node in model.graph.node}
    if "model.layers.0.mlp_residual" in nodes:  # portable
        return [list(nodes[f"model.layers.{i}.mlp_residual"].output) for i in range(layers)]
    norms = [f"/model/layers.{i}/input_layernorm" for i in range(1, layers)]
    norms.append(f"/model/layers.{layers}/final_norm_layernorm")
    return [list(nodes[f"{name}/SkipLayerNorm"].input[:2]) for name in norms]
