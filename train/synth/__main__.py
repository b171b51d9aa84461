"""Write documents to a folder.

python -m train.synth --out documents --pages 1000 --split train --seed 0 --preset page-1536 --workers 16
"""

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

from runtime.command import run
from train.synth.document import KINDS
from train.synth.generate import PRESETS
from train.synth.split import SPLITS
from train.synth.write import FORMATS, Job, write


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    options = PRESETS[arguments.preset]
    job = Job(
        arguments.split,
        arguments.seed,
        arguments.pages,
        replace(options, questions=arguments.questions or options.questions),
        arguments.format,
        arguments.one_turn,
        tuple(arguments.kinds),
        arguments.fewest,
    )
    start = time.perf_counter()
    records = write(job, arguments.out, arguments.workers)
    seconds = time.perf_counter() - start
    print(f"{arguments.out}: {records} records of {job.pages} pages, {job.pages / seconds:.1f} pages/s")
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m train.synth", description="Write drawn documents to a folder.")
    parser.add_argument("--out", type=Path, required=True, help="new folder: documents.json and images/")
    parser.add_argument("--pages", type=_count, required=True)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preset", choices=PRESETS, default="page-1536", help="sizes of pages and text")
    parser.add_argument("--workers", type=_count, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--format", choices=FORMATS, default="png", help="of the images")
    parser.add_argument("--one-turn", action="store_true", help="a record for each question, not for each page")
    parser.add_argument(
        "--kinds", nargs="+", default=(), choices=KINDS, metavar="KIND", help=f"of questions: {', '.join(KINDS)}"
    )
    parser.add_argument("--questions", type=_count, help="the most that are asked of a page (default: the preset's)")
    parser.add_argument("--fewest", type=_count, default=1, help="pages with fewer questions are left out (default: 1)")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 and more, found {value}")
    return value


if __name__ == "__main__":
    run(main)
