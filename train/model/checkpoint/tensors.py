"""Reads tensors of .safetensors and .bin files, mapped, one at a time."""

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.errors import CheckpointError

# Keys that old exporters left in checkpoints and that no module needs
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor under `key` in `file`; `name` is what the module calls it, None if no module has a place for it."""

    name: str | None
    key: str
    tensor: Tensor
    file: Path


def weight_files(folder: Path) -> Path | None:
    """The file or the index of shards that holds the folder's weights; transformers' choice where there are several."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _shards(index: Path) -> dict[str, Path]:
    """key -> file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map from keys to files, expected the index of a sharded checkpoint")
    for key, name in weight_map.items():
        if name in ("", ".", "..") or Path(name).name != name or "\0" in name:
            raise CheckpointError(f"{index}: {key} lies in {name!r}, expected the name of a file beside the index")
    return {key: index.parent / name for key, name in weight_map.items()}


def weight_file_for(folder: Path, key: str) -> Path:
    """Where `key` should be: the only file, or its shard, or the index that does not have it."""
    weights = weight_files(folder)
    return _shards(weights).get(key, weights) if weights.suffix == ".json" else weights


def holds_tensors(folder: Path, prefix: str) -> bool:
    """Whether a key of the folder's weights begins with `prefix`; no value is read."""
    if not (weights := weight_files(folder)):
        return False
    keys = _shards(weights) if weights.suffix == ".json" else (key for key, _, _ in read_tensors(folder, prefix))
    return any(key.startswith(prefix) for key in keys)


def read_tensors(folder: Path, prefix: str = "") -> Iterator[tuple[str, Tensor, Path]]:
    """Every (key, tensor, file) of a folder whose key begins with `prefix`."""
    weights = weight_files(folder)
    if not weights:
        raise CheckpointError(f"{folder}: no weights, expected {WEIGHTS[0]}, {WEIGHTS[2]} or shards of one")
    for file in sorted(set(_shards(weights).values())) if weights.suffix == ".json" else [weights]:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, but {weights} names it; is the download complete?")
        if file.suffix == ".safetensors":
            yield from _read_safetensors(file, prefix)
        else:
            for key, tensor in _read_bin(file).items():
                if key.startswith(prefix):
                    yield key, tensor, file


def _read_safetensors(file: Path, prefix: str) -> Iterator[tuple[str, Tensor, Path]]:
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                if key.startswith(prefix):
                    yield key, tensors.get_tensor(key), file
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        reason = str(error).split("\n")[0]  # torch's own goes on with a stack
        raise CheckpointError(f"{file}: cannot be read as safetensors: {reason}; is the download complete?") from error


def load_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError where it is damaged, OSError where it is missing."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file. Raises OSError where there is no room."""
    try:
        save_file(tensors, file, {"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file}: could not be written; is the disk full? ({error})") from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    """A torch.save archive of tensors; anything else a pickle may hold is refused (`weights_only`)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:
        # torch's own words on a pickle tell how to run its code after all
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{file}: refused: its pickle asks for {asked[1]}, and a checkpoint may hold tensors only; have its "
                "author save it as safetensors"
            ) from None
        reason = "no valid pickle" if isinstance(error, UnpicklingError) else str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{file}: cannot be read as a torch file of tensors: {reason}; is the download complete?"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, expected a dictionary of tensors")
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise CheckpointError(f"{file}: {key!r} is a {type(value).__name__}, expected a dictionary of tensors")
    return {key: tensor.detach() for key, tensor in state.items()}


def _is_zip(file: Path) -> bool:
    """torch can map the zip format of version 1.6 and later, not the older one."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def read_json(file: Path) -> dict:
    """Raises CheckpointError for a file that is missing or no JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, expected a checkpoint's configuration") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return content
