"""Hidden states and logits of an exported decoder against PyTorch's, layer by layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import torch
from onnx import helper
from tqdm import tqdm

from export.graphs.layers import Feed, Run, run_by_layer
from export.graphs.pieces import open_piece
from export.graphs.variants import DOMAIN
from export.parity import TOLERANCES, Difference, compare
from runtime import kernels
from runtime.graph_io import ATTENTION_MASK, IMAGE_EMBEDS, INPUT_IDS, LOGITS, WRITE_INDICES
from train.model import Checkpoint, load_language_state
from train.model.streamed import StreamedDecoder


@dataclass(frozen=True)
class DecoderReference:
    """What PyTorch computes in float32: a prompt with two images, a second turn, three single steps.

    Args:
        calls: token IDs of each; -1 - k stands for image embedding k.
        images: embeddings [9, D].
        states: hidden states [S, D] of all calls' positions, before the first layer and after each.
        logits: of each call's last position, [calls, V].
    """

    calls: dict[str, list[int]]
    images: np.ndarray
    states: list[np.ndarray]
    logits: np.ndarray

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Computed one layer at a time."""
        config = checkpoint.llama_config
        llama, calls = StreamedDecoder(config, load_language_state(checkpoint)), _calls(config.vocab_size)
        ids = np.concatenate(list(calls.values()))
        tokens = llama.embed(np.maximum(ids, 0).tolist()).numpy()  # [S, D]
        images = np.random.default_rng(1).standard_normal((9, tokens.shape[1]), np.float32) * tokens.std()
        embeddings = torch.from_numpy(np.where(ids[:, None] < 0, images[-1 - np.minimum(ids, -1)], tokens))
        layers = llama.hidden_states(embeddings)
        bar = tqdm(layers, "PyTorch", config.num_hidden_layers, unit="layer", disable=None)
        states = [embeddings.numpy(), *(state.numpy() for state in bar)]
        last = torch.from_numpy(states[-1][np.cumsum([len(call) for call in calls.values()]) - 1])
        return cls(calls, images, states, llama.logits(last).numpy())


def check_decoder(
    checkpoint: Checkpoint, file: Path, precision: str, graph: str = "fused", reference: DecoderReference | None = None
) -> list[Difference]:
    """Compare a graph with PyTorch, layer by layer.

    A float graph computes on its own hidden states. What rounded weights lose grows from layer to layer, so there each
    layer is given PyTorch's, and what it adds to them is compared.

    Args:
        graph: fused, portable, prefill or kernels (a fused one with the operators of `runtime.kernels`).
        reference: of the checkpoint, for several graphs; None computes it.

    Returns:
        The layer and call that differ most, or the first that differ too much, and the logits of each call.
    """
    reference = reference or DecoderReference.of(checkpoint)
    model = onnx.load(str(file), load_external_data=False)
    layers = len(reference.states) - 1
    is_rounded, sums = ("layer", precision) in TOLERANCES, _residual_sums(model, layers)
    tolerance = TOLERANCES["decoder", precision]
    libraries = [str(kernels.library())] if any(node.domain == DOMAIN for node in model.graph.node) else []

    def opened(piece: onnx.ModelProto) -> Run:
        session = open_piece(piece, file.parent, libraries)
        return lambda feed: list(map(np.asarray, session.run(None, feed)))

    feeds = _feeds(model, list(reference.calls.values()), reference.images)
    pieces = run_by_layer(model, feeds, opened, {name for names in sums for name in names})
    next(pieces)  # the embeddings
    ends = np.cumsum([len(call) for call in reference.calls.values()])[:-1]
    rows = []
    for i in tqdm(range(layers), graph, unit="layer", disable=None):
        before, after = (np.split(state, ends) for state in reference.states[i : i + 2])
        for what, given, expected, values in zip(reference.calls, before, after, next(pieces), strict=True):
            found = sum(values[name][0].astype(np.float32) for name in sums[i])
            if is_rounded:
                rows.append(
                    compare(f"layer {i}, {what}", found - given, expected - given, TOLERANCES["layer", precision])
                )
                _replace_sum(values, sums[i], expected)
            else:
                rows.append(compare(f"layer {i}, {what}", found, expected, tolerance))
    logits = [
        compare(f"{graph} {precision} logits, {what}", values[LOGITS][0, -1], expected, tolerance)
        for what, values, expected in zip(reference.calls, next(pieces), reference.logits, strict=True)
    ]
    return [next((row for row in rows if not row.ok), max(rows, key=lambda row: row.error)), *logits]


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


def _replace_sum(values: Feed, names: list[str], state: np.ndarray) -> None:
    """Let the tensors of `names` sum up to `state` [S, D]."""
    for name in names:
        values[name] = np.zeros_like(values[name])
    values[names[0]] = state[None].astype(values[names[0]].dtype)


def _residual_sums(model: onnx.ModelProto, layers: int) -> list[list[str]]:
    """For each layer, the tensors whose sum is the hidden state after it."""
    nodes = {node.name: node for node in model.graph.node}
    if "model.layers.0.mlp_residual" in nodes:  # portable
        return [list(nodes[f"model.layers.{i}.mlp_residual"].output) for i in range(layers)]
    norms = [f"/model/layers.{i}/input_layernorm" for i in range(1, layers)]
    norms.append(f"/model/layers.{layers}/final_norm_layernorm")
    return [list(nodes[f"{name}/SkipLayerNorm"].input[:2]) for name in norms]
