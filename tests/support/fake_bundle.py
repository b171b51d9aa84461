"""A bundle whose graphs are a few bytes, for tests of its format."""

from pathlib import Path

from export.bundle_writer import new_bundle, write_manifest
from runtime.bundle.engines import FORMAT, engine_folder, write_report
from runtime.bundle.manifest import Bundle
from runtime.bundle.verify import file_sha256
from runtime.text.template import VICUNA_V1

FILES = ("encoder/fp32.onnx", "decoder/model.onnx", "decoder/model.onnx.data", "tokenizer/tokenizer.json")
SECTIONS = {
    "image": {
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "aspect": "pad", "resolution": 256, "multiple": 64,
        "max_visual_tokens": 576,
    },
    "prompt": VICUNA_V1.to_dict(),
    "tokenizer": {"file": "tokenizer/tokenizer.json"},
    "encoder": {"file": "encoder/fp32.onnx", "precision": "fp32", "hidden_size": 128, "stride": 64},
    "decoder": {
        "file": "decoder/model.onnx", "precision": "fp32", "layers": 3, "kv_heads": 4, "head_dim": 32,
        "context_length": 4096, "kv_dtype": "float32", "vocab_size": 512,
    },
}  # fmt: skip


def write_fake_bundle(folder: Path, name: str = "fake") -> Path:
    with new_bundle(folder) as out:
        for file in FILES:
            (out / file).parent.mkdir(exist_ok=True)
            (out / file).write_bytes(file.encode() * 10)
        write_manifest(out, name, {}, SECTIONS)
    return folder


def put_engine(bundle: Bundle, name: str = "rtx-sm89-fp16", content: bytes = b"an engine", **changes: object) -> Path:
    """An engine file with a report that fits it."""
    flavour, target, precision = name.split("-")
    file = engine_folder(bundle.folder, "encoder") / f"{name}.engine"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    source = "encoder/fp32.onnx"
    report = {
        "format": FORMAT, "flavour": flavour, "version": "1.7.1.116", "version_compatible": False, "target": target,
        "precision": precision, "profiles": [{}], "engine": {"size": len(content), "sha256": file_sha256(file)},
        "onnx": {"file": source, "sha256": {source: bundle.sha256(source)}},
    }  # fmt: skip
    write_report(file, report | changes)
    return file
