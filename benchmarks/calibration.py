"""INT8 encoders of several quantisers side by side: what they lose against float32, and how fast they are on a CPU.

    python -m benchmarks.calibration [--bundle DIR] [--data FOLDER]

The demo model after its alignment (it reads, but does not answer yet) on drawn documents, calibrated on 64 and measured
on 12 others. Encoders are timed at 1536 in rounds through all of them, so that a slow minute of the machine falls on
all; medians are recorded. NNCF's fast bias correction is on, as it comes.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from benchmarks import record
from calib.images import find_images, open_images, pixel_values
from calib.qdq import METHODS, calibrate, quantise
from calib.quantize import HELD_OUT, SOURCE, split
from calib.sensitivity import Evaluation
from export.cli import BUILD
from runtime.bundle import MANIFEST, open_bundle
from runtime.encoder import OnnxEncoder, OpenVinoEncoder

CARRIED = "train/runs/convllava-smol/align.safetensors"
SAMPLES, ROUNDS, SIDE = 64, 9, 1536


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, default=BUILD / "bundle" / "align", help="made where it is not there")
    parser.add_argument("--data", type=Path, default=BUILD / "data" / "calibration", help="drawn where it is not there")
    args = parser.parse_args()
    prepare(args.bundle, args.data)
    bundle = open_bundle(args.bundle)
    source, stride = bundle.path(SOURCE), bundle.encoder.stride
    chosen, held_out = split(open_images(find_images(args.data, SAMPLES + HELD_OUT)))
    feeds = list(pixel_values(chosen, bundle.image))
    evaluation = Evaluation(bundle, source, list(pixel_values(held_out, bundle.image)))
    with tempfile.TemporaryDirectory() as folder:
        files, rows = {}, []
        for name, make in quantisers(source).items():
            files[name] = Path(folder, f"{name}.onnx")
            begin = time.perf_counter()
            make(feeds, files[name])
            seconds = time.perf_counter() - begin
            loss = evaluation.loss(files[name])
            rows.append(
                {
                    "quantiser": name,
                    "sqnr_db": round(loss.sqnr_db, 1),
                    "differing": round(loss.differing, 2),
                    "seconds": round(seconds, 1),
                }
            )
            print(rows[-1], flush=True)
        record.write("calibration", rows)
        ours, nncf = files["ONNX Runtime, minmax"], files["NNCF"]
        encoders = {
            ("ONNX Runtime", "fp32"): OnnxEncoder(source, stride),
            ("ONNX Runtime", "int8"): OnnxEncoder(ours, stride),
            ("OpenVINO", "fp32"): OpenVinoEncoder(source, stride),
            ("OpenVINO", "bf16"): OpenVinoEncoder(source, stride, precision="bf16"),
            ("OpenVINO", "int8"): OpenVinoEncoder(ours, stride, precision="int8"),
            ("OpenVINO", "int8, rest bf16"): OpenVinoEncoder(ours, stride, precision="bf16"),
            ("OpenVINO", "int8 of NNCF"): OpenVinoEncoder(nncf, stride, precision="int8"),
        }
        speeds = time_in_turn(encoders)
    rows = [{"runtime": key[0], "precision": key[1], "encode_ms": ms} for key, ms in speeds.items()]
    record.write("encoder_speed", rows)


def prepare(bundle: Path, data: Path) -> None:
    """Make the bundle of the carried weights and draw the pages, where they are not there."""
    if not (bundle / MANIFEST).is_file():
        checkpoint = BUILD / "runs" / "convllava-smol" / "align" / "final"
        run("train.model.demo", "--unpack", CARRIED, checkpoint)
        run("export.bundle", "--checkpoint", checkpoint, "--out", bundle)
    if not data.is_dir():
        run("train.data.documents", "--out", data, "--pages", SAMPLES + HELD_OUT, "--preset", "page-1536")


def run(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def quantisers(source: Path) -> dict[str, Callable[[list[np.ndarray], Path], None]]:
    """name -> what writes an INT8 graph of `source` from calibration images."""

    def onnxruntime_by(method: str) -> Callable[[list[np.ndarray], Path], None]:
        return lambda feeds, target: quantise(source, target, calibrate(source, feeds, method)[0], "int8")

    def nncf(feeds: list[np.ndarray], target: Path) -> None:
        import nncf

        dataset = nncf.Dataset(feeds, lambda pixels: {"pixel_values": pixels})
        preset = nncf.QuantizationPreset.PERFORMANCE  # symmetric, as TensorRT has it
        onnx.save(nncf.quantize(onnx.load(source), dataset, preset=preset, subset_size=len(feeds)), target)

    return {f"ONNX Runtime, {method}": onnxruntime_by(method) for method in METHODS} | {"NNCF": nncf}


def time_in_turn(encoders: dict) -> dict[tuple[str, str], float]:
    """Median milliseconds of each encoder for one image of SIDE x SIDE; the first round warms up."""
    image = np.random.default_rng(0).standard_normal((3, SIDE, SIDE), dtype=np.float32)
    samples = {key: [] for key in encoders}
    for _ in range(ROUNDS + 1):
        for key, encoder in encoders.items():
            begin = time.perf_counter()
            encoder([image])
            samples[key].append((time.perf_counter() - begin) * 1000)
    return {key: round(statistics.median(taken[1:]), 1) for key, taken in samples.items()}


if __name__ == "__main__":
    main()
