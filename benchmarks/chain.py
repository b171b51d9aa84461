"""The whole chain on the demo model: `runtime/infer.py` on the photograph, for each precision of the decoder.

    python -m benchmarks.chain [--json FILE]

Every run is a process of its own, as a user starts it, in rounds through all precisions; medians are recorded. Pages
of mapped weights that are resident count towards the peak memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import record
from export.bundle import export_bundle
from export.cli import BUILD, open_checkpoint
from runtime.bundle.verify import MANIFEST

ROOT = Path(__file__).parents[1]
PRECISIONS = ("fp32", "int8", "int4")
ROUNDS = 5
PROMPT = "Write one sentence about coffee."
FIGURES = ("preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_s", "load_ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chain", description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/chain.json")
    args = parser.parse_args()
    bundles = {precision: bundle_of(precision) for precision in PRECISIONS}
    runs: dict[str, list[dict]] = {precision: [] for precision in PRECISIONS}
    for _ in range(ROUNDS + 1):
        for precision, bundle in bundles.items():
            runs[precision].append(infer(bundle))
    rows = []
    for precision, answers in runs.items():
        timed = answers[1:]  # the first round fills the page cache and takes the hashes
        row = {"encoder": "fp32", "decoder": precision, "visual_tokens": timed[0]["visual_tokens"]}
        row |= {key: round(statistics.median(answer["timings"][key] for answer in timed), 1) for key in FIGURES}
        row["peak_memory_mib"] = round(statistics.median(answer["peak_memory_mib"] for answer in timed))
        row["text"] = timed[0]["text"]
        rows.append(row)
        print(row, flush=True)
    record.write("chain", rows, args.json)


def bundle_of(precision: str) -> Path:
    """The demo model's bundle with this precision of the decoder, made where it is not there."""
    checkpoint = open_checkpoint(None)
    bundle = BUILD / "bundle" / f"{checkpoint.folder.name}-{precision}"
    if not (bundle / MANIFEST).is_file():
        export_bundle(checkpoint, bundle, checkpoint.resolution, decoder_precision=precision)
    return bundle


def infer(bundle: Path) -> dict:
    command = [sys.executable, "runtime/infer.py", "--bundle", str(bundle), "--image", "assets/coffee.jpg"]
    command += ["--prompt", PROMPT, "--max-new-tokens", "64", "--json"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
