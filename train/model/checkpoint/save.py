"""PyTorch modules -> checkpoint."""

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from train.model.checkpoint.layout import HEAD, PROJECTOR, TOKENIZER_FILES, Checkpoint
from train.model.checkpoint.load import load_image_encoder, load_language_state, with_prefix
from train.model.checkpoint.tensors import save_tensors
from train.model.convllava import ConvLLaVA
from train.model.names import timm_to_hf


def save_checkpoint(model: ConvLLaVA, like: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` in the released layout: `like`'s configurations and tokenizer files, the model's weights.

    dtype: of the weights on disk; None keeps the one each tensor has in `like`'s files, so that loading and saving
    again changes no bit. The folder appears whole or not at all. Raises FileExistsError if it is there already.
    """
    save_state(model.state_dict(), like, folder, dtype)


def save_image_encoder(changed: dict[str, Tensor], like: Checkpoint, folder: Path) -> None:
    """Write `like` once more to `folder`, with other weights for some of an `ImageEncoder`'s."""
    encoder = load_image_encoder(like).state_dict()
    if unknown := changed.keys() - encoder.keys():
        raise KeyError(min(unknown))
    state = {f"decoder.{name}": tensor for name, tensor in load_language_state(like).items()}
    save_state(state | {f"image_encoder.{name}": tensor for name, tensor in (encoder | changed).items()}, like, folder)


def save_state(state: dict[str, Tensor], like: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> None:
    """`save_checkpoint` of a ConvLLaVA's state_dict, which may be on any device."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a checkpoint is written to a new folder")
    main = with_prefix("decoder.", state)
    if like.config.get("tie_word_embeddings"):
        main.pop(HEAD, None)  # the embedding once more
    main |= {PROJECTOR + key: tensor for key, tensor in with_prefix("image_encoder.projector.", state).items()}
    tower = {timm_to_hf(key): tensor for key, tensor in with_prefix("image_encoder.encoder.", state).items()}
    if dtype is None:
        stored = {item.key: item.tensor.dtype for item in like.language_tensors()}
        stored |= {item.key: item.tensor.dtype for item in like.projector_tensors()}
        stored |= {timm_to_hf(item.name): item.tensor.dtype for item in like.vision_tensors()}
    else:
        stored = dict.fromkeys([*main, *tower], dtype)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "vision_tower").mkdir(parents=True)
    for tensors, target in ((main, partial), (tower, partial / "vision_tower")):
        tensors = {key: tensor.detach().to("cpu", stored[key]).contiguous() for key, tensor in tensors.items()}
        save_tensors(tensors, target / "model.safetensors")
    config = like.config | {"mm_vision_tower": "vision_tower"}
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(partial / "config.json", config)
    _write_json(partial / "vision_tower" / "config.json", like.vision_config)
    _write_json(partial / "vision_tower" / "preprocessor_config.json", like.preprocessor)
    for name in TOKENIZER_FILES:
        if (like.folder / name).is_file():
            shutil.copy(like.folder / name, partial / name)
    partial.rename(folder)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
