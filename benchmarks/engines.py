"""What the builder of TensorRT for RTX makes of the demo model, and of the released encoder's shape, without a GPU.

    python -m benchmarks.engines

Layers, bytes and build time as the engines' reports have them. No engine is executed.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import record
from benchmarks.export_encoder import RESOLUTION, random_checkpoint
from export.cli import BUILD
from export.engine import build_engine
from export.tensorrt.build import Options
from export.tensorrt.source import Source, source_of, source_of_file
from runtime.bundle.engines import read_report
from runtime.bundle.manifest import open_bundle

PAGES = 64  # that quantised encoders are calibrated on


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, source, options in engines(Path(folder)):
            report = read_report(build_engine(source, options))
            rows.append(
                {
                    "model": model,
                    "part": options.part,
                    "precision": options.precision,
                    "target": options.target,
                    "network_layers": len(report["network_layers"]),
                    "engine_layers": len(report["engine_layers"]),
                    "kept_in_fp32": len(report["kept_in_fp32"]),
                    "weights_mb": round(report["memory"]["weights_bytes"] / 1e6, 1),
                    "activations_mb": round(report["memory"]["activation_bytes"] / 1e6, 1),
                    "engine_mb": round(report["engine"]["size"] / 1e6, 1),
                    "build_s": report["build_seconds"],
                }
            )
            print(rows[-1], flush=True)
    record.write("engines", rows)


def engines(folder: Path) -> Iterator[tuple[str, Source, Options]]:
    """(model, where it comes from, what to build) of each engine; sources are made when their turn comes."""
    run("export.bundle", "--portable-decoder", "--out", folder / "fp32")
    run("train.synth", "--out", folder / "pages", "--pages", PAGES, "--preset", "page-1536")
    for precision, more in (("int8", ["--depthwise"]), ("fp8", [])):
        arguments = ("--bundle", folder / "fp32", "--data", folder / "pages", "--precision", precision, *more)
        run("calib.quantize", *arguments, "--questions", 1, "--out", folder / precision)
    for precision, bundle in (("fp16", "fp32"), ("int8", "int8"), ("fp8", "fp8")):
        for target in ("sm89", "sm120"):
            options = Options("encoder", precision, target=target)
            yield "convllava-smol", source_of(open_bundle(folder / bundle), options), options
    options = Options("decoder", target="sm89")
    yield "convllava-smol", source_of(open_bundle(folder / "fp32"), options), options
    checkpoint = random_checkpoint(BUILD / "random-large")
    run("export.encoder", "--checkpoint", checkpoint, "--res", RESOLUTION, "--out", folder / "large")
    options = Options(target="sm89")
    yield "ConvNeXt-L, fifth stage", source_of_file(folder / "large" / "fp32.onnx"), options


def run(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
