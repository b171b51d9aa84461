"""How fast documents are drawn: pages a second of one process, for each preset.

    python -m benchmarks.documents

Each page is drawn, degraded and asked about, as training gets it; nothing is written to disk. `dense` are the pages of
random strings that stage 0 takes most of its pages from, at 256x256.
"""

import statistics
import time
from collections.abc import Callable

from benchmarks import record
from train.synth import PRESETS, Document, render
from train.synth.dense import dense_page

WARM_UP, PAGES, ROUNDS = 100, 100, 3


def main() -> None:
    sources: dict[str, Callable[[int], Document]] = {
        "dense-256": lambda index: dense_page(index, "train", 0, (256, 256), 14, 48, 0.5)
    }
    sources |= {name: lambda index, o=options: render(index, "train", 0, o) for name, options in PRESETS.items()}
    rows = []
    for name, draw in sources.items():
        for index in range(WARM_UP):  # fills the glyph caches
            draw(index)
        rates, characters = [], []
        for number in range(ROUNDS):
            begin = time.perf_counter()
            pages = [draw(WARM_UP + number * PAGES + index) for index in range(PAGES)]
            rates.append(PAGES / (time.perf_counter() - begin))
            characters += [len(page.page.characters) for page in pages]
        rows.append(
            {
                "pages": name,
                "pages_per_s": round(statistics.median(rates), 1),
                "slowest": round(min(rates), 1),
                "fastest": round(max(rates), 1),
                "characters": round(statistics.fmean(characters)),
            }
        )
        print(rows[-1], flush=True)
    record.write("documents", rows)


if __name__ == "__main__":
    main()
