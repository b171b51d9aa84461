"""Checkpoint -> PyTorch modules."""

import itertools
from collections.abc import Callable, Iterable, Set
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from train.errors import CheckpointError
from train.model.checkpoint.layout import EMBEDDING, HEAD, PROJECTOR, Checkpoint
from train.model.checkpoint.tensors import StoredTensor, weight_file_for
from train.model.convllava import ConvLLaVA, ImageEncoder
from train.model.encoder import ConvNeXtEncoder
from train.model.names import timm_to_hf
from train.model.projector import build_projector


def load_image_encoder(checkpoint: Checkpoint, dtype: torch.dtype | None = torch.float32) -> ImageEncoder:
    """Encoder and projector alone, in evaluation mode; the language model's weights are not read.

    dtype: None keeps each stored one, so that parameters stay in the mapped files.
    Raises CheckpointError naming every key that is missing, unexpected or of the wrong shape.
    """
    config, folder = checkpoint.encoder_config, checkpoint.folder
    encoder = ConvNeXtEncoder(config, device="meta")
    kind, out_features = checkpoint.projector_type, checkpoint.llama_config.hidden_size
    try:
        with torch.device("meta"):
            projector = build_projector(kind, config.widths[-1], out_features)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: mm_projector_type: {error}") from None
    vision_folder, prefix = checkpoint.vision_source
    prefix = prefix and prefix + "vision_tower."
    for module, stored, source, key_of in (
        (encoder, checkpoint.vision_tensors(), vision_folder, lambda name: prefix + timm_to_hf(name)),
        (projector, checkpoint.projector_tensors(), folder, PROJECTOR.__add__),
    ):
        module.load_state_dict(_collect(module.state_dict(), stored, source, key_of, dtype), assign=True)
    return ImageEncoder(encoder, projector).eval()


def load_language_state(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The decoder's weights under Llama's names; dtype None keeps the stored one. Raises CheckpointError likewise.

    A tied `lm_head.weight` is not among them, stored or not: it is the embedding.
    """
    config, folder = checkpoint.llama_config, checkpoint.folder
    try:
        with torch.device("meta"):
            expected = LlamaForCausalLM(config).state_dict()
    except Exception as error:  # such as KeyError for an activation or a rope_type that transformers does not have
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot build a Llama from it: {type(error).__name__}: {error}"
        ) from error
    optional = {HEAD} if config.tie_word_embeddings else set()
    state = _collect(expected, checkpoint.language_tensors(), folder, str, dtype, optional)
    # transformers 4 would take the embedding for the head here, transformers 5 the stored head
    if optional and HEAD in state and not torch.equal(state.pop(HEAD), state[EMBEDDING]):
        raise CheckpointError(
            f"{weight_file_for(folder, HEAD)}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings in "
            f"{folder / 'config.json'} is true; make it false if the head was trained apart"
        )
    return state


def load_embedding(checkpoint: Checkpoint) -> Tensor:
    """The decoder's embedding alone, [vocabulary, hidden] float32. Raises CheckpointError likewise."""
    config = checkpoint.llama_config
    expected = {EMBEDDING: torch.empty(config.vocab_size, config.hidden_size, device="meta")}
    stored = (item for item in checkpoint.language_tensors() if item.name == EMBEDDING)
    return _collect(expected, stored, checkpoint.folder, str, torch.float32)[EMBEDDING]


def check_finite(*sources: Iterable[StoredTensor]) -> None:
    """Look for NaN and infinity in stored weights, a tensor at a time.

    Args:
        sources: such as `Checkpoint.language_tensors`.

    Raises:
        CheckpointError: naming the first tensor that has some, and how many.
    """
    first, others = "", 0
    for item in itertools.chain(*sources):
        tensor = item.tensor.half() if item.tensor.element_size() == 1 else item.tensor  # float8 has no aminmax
        if not tensor.is_floating_point() or not tensor.numel() or all(v.isfinite() for v in tensor.aminmax()):
            continue
        if first:
            others += 1
            continue
        nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        first = f"{item.file}: {item.key} has {nan} NaN and {infinite} infinite of {tensor.numel()} values"
    if first:
        more = f"; so have {others} other tensors" if others else ""
        raise CheckpointError(
            f"{first}{more}; the weights are damaged or training diverged, take an earlier checkpoint"
        )


def load_model(source: str | Path | Checkpoint, dtype: torch.dtype = torch.float32) -> ConvLLaVA:
    """The whole model, in evaluation mode. Raises CheckpointError as `load_image_encoder` does."""
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    state = load_language_state(checkpoint, dtype)
    decoder = LlamaForCausalLM.from_pretrained(None, config=checkpoint.llama_config, state_dict=state, dtype=dtype)
    return ConvLLaVA(load_image_encoder(checkpoint, dtype), decoder).eval()


def with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _collect(
    expected: dict[str, Tensor],
    stored: Iterable[StoredTensor],
    folder: Path,
    key_of: Callable[[str], str],
    dtype: torch.dtype | None,
    optional: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """The tensors by name, in `dtype` (None: as stored), after checking that they are exactly the expected ones.

    key_of: name -> key in the files of `folder`.
    """
    state, problems, seen = {}, [], set(optional)
    for item in stored:
        found = tuple(item.tensor.shape)
        if item.name not in expected:
            problems.append(f"{item.file}: unexpected key {item.key}: expected none, found shape {found}")
            continue
        seen.add(item.name)
        if found != (shape := tuple(expected[item.name].shape)):
            rows = item.name in (EMBEDDING, HEAD) and found[1:] == shape[1:]
            reason = f" ({found[0]} rows where vocab_size in config.json is {shape[0]})" if rows else ""
            problems.append(f"{item.file}: wrong shape of {item.key}: expected {shape}, found {found}{reason}")
        else:
            state[item.name] = item.tensor if dtype is None else item.tensor.to(dtype)
    for name, tensor in expected.items():
        if name not in seen:
            key, shape = key_of(name), tuple(tensor.shape)
            problems.append(f"{weight_file_for(folder, key)}: missing key {key}: expected shape {shape}, found none")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{'; '.join(problems[:5])}{more} (do these weights and their config.json belong together?)"
        )
    return state
