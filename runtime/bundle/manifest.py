"""The bundle: one folder that holds everything a deployment needs. The only place that knows its format.

    bundle/
      manifest.json   format, producers, sha256 and size of every file, image rule, prompt template, tokenizer,
                      encoder and decoder with their precisions, KV-cache shape, which graphs were compared with PyTorch
      encoder/        fp32.onnx | fp16.onnx | int8.onnx (+ .data); kernels.onnx, for `runtime.kernels`; engines/, added
                      later, see runtime/bundle/engines.py
      decoder/        model.onnx (+ .data), fused for ONNX Runtime; *-kv16.onnx and *-kv8.onnx, the same with a KV cache
                      in float16 or int8; portable.onnx (+ .data) where one was asked for
      tokenizer/      tokenizer.json

The runtime believes nothing but the manifest. Bundles are written beside their place and renamed into it, the
manifest last, so that a killed writer leaves nothing that `open_bundle` accepts.
"""

import contextlib
import json
import os
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

from runtime.bundle.verify import MANIFEST, PARTIAL, check_files, check_hashes
from runtime.errors import UserError
from runtime.image.preprocess import ImageRule
from runtime.text.template import PromptTemplate

FORMAT = 1
NOT_CHECKED = "none"  # `checked` of a bundle whose graphs were compared with nothing
KV_DTYPES = ("float32", "float16")
CACHE_SUFFIXES = {"float16": "-kv16", "int8": "-kv8"}  # of graphs beside the decoder's, by the type of their KV cache
KV_SCALE_BYTES = 4  # behind the int8 codes of a key or value


@dataclass(frozen=True)
class EncoderPart:
    """file: the graph that is used; precision: of its weights; hidden_size: of an image embed;
    stride: pixels of one side to a visual token; kernels_file: the graph with this project's own operators
    (`runtime.kernels`) in INT8, made from the float32 one, or None."""

    file: str
    precision: str
    hidden_size: int
    stride: int
    kernels_file: str | None = None


@dataclass(frozen=True)
class DecoderPart:
    """file, precision: as for the encoder; portable_file: the graph of standard operators, or None; prefill_file: the
    same graph as `file` with the same weights, whose products are computed in float32 rather than in 8 bits, or None;
    kernels_file: the same with this project's own operators (`runtime.kernels`), or None. sampler_file: the graph that
    draws tokens on a GPU, or None.

    layers, kv_heads, head_dim, context_length: the KV cache is, a layer, a key and a value of
    [batch, kv_heads, context_length, kv_width] in `kv_dtype` (a numpy name). vocab_size: width of the logits.
    """

    file: str
    precision: str
    layers: int
    kv_heads: int
    head_dim: int
    context_length: int
    kv_dtype: str
    vocab_size: int
    portable_file: str | None = None
    prefill_file: str | None = None
    kernels_file: str | None = None
    sampler_file: str | None = None

    @property
    def kv_width(self) -> int:
        """Elements that the KV cache holds of a key or value: in int8, `runtime.kernels` keep its scale behind it."""
        return self.head_dim + KV_SCALE_BYTES if self.kv_dtype == "int8" else self.head_dim


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    folder: Path
    name: str
    image: ImageRule
    prompt: PromptTemplate
    tokenizer: dict[str, Any]
    encoder: EncoderPart
    decoder: DecoderPart
    files: dict[str, Any]  # of the manifest: path inside the bundle -> its sha256 and size
    # Graphs that the export compared with PyTorch -> their largest relative error; NOT_CHECKED, or None where unknown
    checked: dict[str, float] | str | None = None

    def path(self, file: str) -> Path:
        return self.folder / file

    def sha256(self, file: str) -> str | None:
        """The manifest's hash of a file; None for one that is not the bundle's."""
        return self.files.get(file, {}).get("sha256")

    def decoder_with_cache(self, kv_dtype: str) -> DecoderPart | None:
        """The decoder with its KV cache in this type; None where the bundle has no such graph."""
        part = self.decoder
        if part.kv_dtype == kv_dtype:
            return part
        if kv_dtype not in CACHE_SUFFIXES:
            return None
        names = ("file", "prefill_file", "kernels_file")
        rewritten = {name: cache_file(getattr(part, name) or "", kv_dtype) for name in names}
        there = {name: file if file in self.files else None for name, file in rewritten.items()}
        if there["file"] is None:
            return None
        return replace(part, kv_dtype=kv_dtype, **there)

    def encoder_file(self, precision: str) -> str | None:
        """The encoder graph of a precision, a path inside the bundle; None where it has none."""
        file = f"encoder/{precision}.onnx"
        return file if file in self.files else None


def cache_file(file: str, kv_dtype: str) -> str:
    """Name of the graph with a KV cache of another type, a key of `CACHE_SUFFIXES`, beside the decoder graph `file`."""
    return f"{file.removesuffix('.onnx')}{CACHE_SUFFIXES[kv_dtype]}.onnx"


def open_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read and verify a bundle.

    Raises UserError: no such bundle, unfinished export, manifest of another format or with a wrong key, file missing
    or altered. Each file's sha256 is taken once and remembered by its size and times in the user's cache folder.
    """
    with opening(folder) as bundle:
        return bundle


@contextlib.contextmanager
def opening(folder: str | os.PathLike[str]) -> Generator[Bundle]:
    """`open_bundle` for whoever has work of its own meanwhile: files whose sha256 is not known are read beside it, and
    one that was altered is an error at its end, in the place of whatever that has led to."""
    bundle = read_bundle(folder)
    given_up = threading.Event()
    with ThreadPoolExecutor(1) as reader:
        checked = reader.submit(check_hashes, bundle.folder, bundle.files, given_up)
        try:
            yield bundle
        except Exception:
            checked.result()
            raise
        except BaseException:  # whoever interrupts a start waits for the file at hand alone
            given_up.set()
            raise
        checked.result()


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """As `open_bundle`, but of the files only sizes are compared with the manifest's."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for section in ("image", "prompt", "tokenizer", "encoder", "decoder", "files"):
        if not isinstance(manifest.get(section), dict):
            raise UserError(f"{folder / MANIFEST}: no section {section!r}; the bundle is damaged, export it again")
    check_files(folder, manifest["files"])
    bundle = Bundle(
        folder,
        str(manifest.get("name", folder.name)),
        ImageRule.from_dict(manifest["image"]),
        PromptTemplate.from_dict(manifest["prompt"]),
        manifest["tokenizer"],
        _part(EncoderPart, manifest["encoder"], folder),
        _part(DecoderPart, manifest["decoder"], folder),
        manifest["files"],
        _checked(manifest, folder),
    )
    decoder = bundle.decoder
    graphs = (
        bundle.encoder.kernels_file,
        decoder.portable_file,
        decoder.prefill_file,
        decoder.kernels_file,
        decoder.sampler_file,
    )
    optional = [file for file in graphs if file is not None]
    for file in (bundle.encoder.file, bundle.tokenizer.get("file"), decoder.file, *optional):
        if not isinstance(file, str) or file not in manifest["files"]:
            raise UserError(f"{folder / MANIFEST}: names {file!r}, which is not among its files; export it again")
    if bundle.decoder.kv_dtype not in KV_DTYPES:
        raise UserError(f"{folder / MANIFEST}: kv_dtype is {bundle.decoder.kv_dtype!r}, expected one of {KV_DTYPES}")
    if bundle.image.multiple != bundle.encoder.stride:
        raise UserError(
            f"{folder / MANIFEST}: images are multiples of {bundle.image.multiple}, the encoder's stride is "
            f"{bundle.encoder.stride}; export it again"
        )
    return bundle


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such bundle; python -m export.bundle --checkpoint DIR --out {folder} makes one")
    if PARTIAL in folder.resolve().name or not file.is_file():
        raise UserError(f"{folder}: no {MANIFEST}, so not a finished bundle; export it again")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise UserError(f"{file}: no bundle manifest (it names no format)")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{file}: manifest of format {manifest['format']!r}, this runtime reads format {FORMAT}; "
            "export the bundle with the same version of the project"
        )
    return cast(dict[str, Any], manifest)


def _checked(manifest: dict[str, Any], folder: Path) -> dict[str, float] | str | None:
    checked: Any = manifest.get("checked")
    errors: list[Any] = list(cast(dict[str, Any], checked).values()) if isinstance(checked, dict) else []
    known = checked is None or checked == NOT_CHECKED or isinstance(checked, dict)
    if not known or not all(type(error) in (int, float) for error in errors):
        raise UserError(
            f"{folder / MANIFEST}: checked is {checked!r}, expected {NOT_CHECKED!r} or the largest error of each graph"
        )
    return cast(dict[str, float] | str | None, checked)


def _part(kind: type, section: dict[str, Any], folder: Path) -> Any:
    known = {field.name for field in fields(kind)}
    if unknown := section.keys() - known:
        raise UserError(f"{folder / MANIFEST}: unknown key {sorted(unknown)[0]!r} in {kind.__name__}")
    for name, expected in get_type_hints(kind).items():
        value: Any = section.get(name)
        # every number of a manifest counts something
        if not isinstance(value, expected) or (expected is int and (isinstance(value, bool) or value < 1)):
            wanted = "a number above 0" if expected is int else getattr(expected, "__name__", expected)
            raise UserError(f"{folder / MANIFEST}: {kind.__name__} needs {name!r} as {wanted}, found {value!r}")
    return kind(**section)
