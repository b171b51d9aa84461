"""Weights as .bin, of both of torch's formats. An archive's pickle is changed alone too: its checksum hides it."""

import io
import tempfile
import zipfile
from pathlib import Path

import atheris
import torch
from torch import _weights_only_unpickler

from train.model.checkpoint.tensors import read_tensors

_TEMPORARY = tempfile.TemporaryDirectory()
_FILE = Path(_TEMPORARY.name) / "pytorch_model.bin"
_PICKLE, _STORAGE = "archive/data.pkl", bytes(range(24))
# The part of torch that reads what is fuzzed
_weights_only_unpickler.Unpickler.load = atheris.instrument_func(_weights_only_unpickler.Unpickler.load)


def seeds() -> list[bytes]:
    tensor = torch.arange(6.0)
    found = []
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"a": tensor, "b": torch.nn.Parameter(tensor[2:4])}, file, _use_new_zipfile_serialization=zipped)
        found.append(file.getvalue())
    with zipfile.ZipFile(io.BytesIO(found[0])) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        found.append(archive.read(name))
    return found


def fuzz(content: bytes) -> None:
    if content.startswith(b"\x80\x02}"):  # a bare dictionary: the pickle of an archive
        content = _archive(content)
    _FILE.unlink(missing_ok=True)  # another inode: the one before may be mapped still
    _FILE.write_bytes(content)
    for _, tensor, _ in read_tensors(_FILE.parent):
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized:
            tensor.reshape(-1)[:16].tolist()


def _archive(pickled: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, held in ((_PICKLE, pickled), ("archive/version", b"3\n"), ("archive/data/0", _STORAGE)):
            archive.writestr(name, held)
    return file.getvalue()
