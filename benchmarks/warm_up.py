"""What training at half the resolution first is worth, at the same cost.

    python -m benchmarks.warm_up [--steps 1000] [--precision bf16]

Two runs of stage 0 on the demo model, from the same untrained weights: one at 256x256 throughout; one that spends half
of its pixels on the same kind of pages at 128x128, text half as large, and the other half at 256x256. Both end at
256x256 and at a learning rate of nothing; every page is drawn for one step alone, so that what the last of them are
told right says how well others would be.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks import record
from export.cli import BUILD
from train.model.demo import demo_checkpoint
from train.recipe import PRECISIONS
from train.synth.fonts import SIZES

SIDE, SMALLEST, LARGEST, BATCH = 256, 20, 48, 16
LAST = 100  # steps that are looked at
RIGHT = "characters_right/"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_up", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help=f"of {SIDE}x{SIDE}; default: 1000")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    args = parser.parse_args()
    if args.steps < 2 * LAST or args.steps % 2:
        parser.error(f"--steps is {args.steps}, expected an even number from {2 * LAST} on")
    demo_checkpoint(BUILD)
    rows = [trained(name, phases, args.precision) for name, phases in plans(args.steps).items()]
    record.write("warm_up", rows)


def plans(steps: int) -> dict[str, list[dict]]:
    """Phases of the same number of pixels: `steps` at full size, or half of it at half the side first."""
    return {
        f"{SIDE} throughout": [phase(1, steps)],
        f"{SIDE // 2}, then {SIDE}": [phase(2, 2 * steps), phase(1, steps // 2)],
    }


def phase(smaller: int, steps: int) -> dict:
    """Pages `smaller` times as small as the final ones."""
    assert SMALLEST // smaller >= SIZES[0], "no text as small as that is drawn"
    sizes = {"min_px": SMALLEST // smaller, "max_px": LARGEST // smaller}
    return {"side": SIDE // smaller, **sizes, "dense": 0.7, "steps": steps}


def trained(name: str, phases: list[dict], precision: str) -> dict:
    """A row: how long a run took, and the share of characters that each stage tells at its end."""
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        steps = sum(given["steps"] for given in phases)
        recipe = {
            "task": "local",
            "checkpoint": str(BUILD / "convllava-smol"),
            "out": folder,
            "train": ["encoder"],
            "learning_rate": 2e-3,
            "weight_decay": 0.01,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "steps": steps,
            "warmup_ratio": 0.025,
            "save_every": steps,
            "log_every": 10,
            "precision": precision,
            "workers": 1,
            "local": {"phases": phases},
        }
        file = Path(folder, "recipe.yaml")
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "train", str(file)], check=True)
        seconds = time.perf_counter() - begin
        lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if line["step"] > steps - LAST]
    right = {key.removeprefix(RIGHT): statistics.fmean(line[key] for line in last) for key in last[0] if RIGHT in key}
    row = {"resolution": name, "pages": steps * BATCH, "minutes": round(seconds / 60, 1)}
    row |= {stride: round(share, 3) for stride, share in right.items()}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
