"""What quantizing either part of a bundle shares: the source is checked and copied, the outcome summarized."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.evaluation import SOURCE, Loss
from export.bundle_writer import check_place
from runtime.bundle.manifest import Bundle
from runtime.bundle.verify import MANIFEST
from runtime.errors import UserError

REPORT = "calib"  # folder in the bundle
SECTIONS = ("image", "prompt", "tokenizer", "encoder", "decoder")  # of the manifest


@dataclass(frozen=True)
class Outcome:
    """A quantized bundle.

    Args:
        warnings: each names a tensor or says that a budget is not met.
        loss: of the new bundle.
        excluded: groups kept in higher precision.
        questions, tokens: how many the loss is measured on.
    """

    warnings: list[str]
    loss: Loss
    excluded: tuple[str, ...]
    questions: int
    tokens: int


def check_source(bundle: Bundle, out: Path) -> None:
    """Raises UserError without a float32 encoder to compare with, and where `out` is the bundle itself or no bundle."""
    if SOURCE not in bundle.files:
        raise UserError(f"{bundle.folder} has no {SOURCE}; export it with --precision fp32")
    check_place(out)
    if out.resolve() == bundle.folder.resolve():
        raise UserError(f"--out {out} is the bundle itself, whose engines would be lost; choose another")


def manifest_of(bundle: Bundle) -> dict[str, Any]:
    return json.loads((bundle.folder / MANIFEST).read_text(encoding="utf-8"))


def copy_bundle(bundle: Bundle, folder: Path, skip: Callable[[str], bool]) -> dict[str, Any]:
    """Copy a bundle's files, except those that `skip` says; returns the manifest's sections."""
    for name in bundle.files:
        if not skip(name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path(name), folder / name)  # not linked: onnx refuses linked weights
    manifest = manifest_of(bundle)
    return {name: manifest[name] for name in SECTIONS}
