"""Weights as .safetensors: the header's JSON is what is changed, behind a length that fits or, raw, does not."""

import struct
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save

from tests.fuzz.json_trees import changed
from train.model.checkpoint.tensors import read_tensors

_TEMPORARY = tempfile.TemporaryDirectory()
_FILE = Path(_TEMPORARY.name) / "model.safetensors"


def seeds() -> list[bytes]:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}
    others = {"c": torch.zeros(2, dtype=torch.bfloat16), "d": torch.tensor(1), "e": torch.empty(0)}
    return [save(tensors, {"format": "pt"}), save(others)]


def mutate(content: bytes, seed: int) -> bytes | None:
    size = struct.unpack_from("<Q", content)[0] if len(content) >= 8 else 0
    header = changed(content[8 : 8 + size], seed)
    return header and struct.pack("<Q", len(header)) + header + content[8 + size :]


def fuzz(content: bytes) -> None:
    _FILE.unlink(missing_ok=True)  # another inode: the one before may be mapped still
    _FILE.write_bytes(content)
    for _, tensor, _ in read_tensors(_FILE.parent):
        assert tensor.nbytes <= len(content)
        tensor.double().sum().item()
