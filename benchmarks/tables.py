"""Writes the figures of README and docs/verification.md from the results files, and draws charts.

    python -m benchmarks.tables [--check]

They stand between `<!-- table NAME -->` and `<!-- end -->`.
--check changes nothing and exits with 1 where a page says something else than the files, or a chart was drawn from
another state of its file.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from benchmarks import charts
from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "verification.md")
ACCURACY = [
    ("split", "pages"),
    ("res", "resolution"),
    ("visual_tokens", "visual tokens"),
    ("anls", "ANLS"),
    ("exact_match", "exact match"),
    ("iou50", "grounding, IoU ≥ 0.5"),
    ("questions", "questions"),
    ("grounding_questions", "of these, for boxes"),
]
CHAIN = [
    ("decoder", "decoder"),
    ("visual_tokens", "visual tokens"),
    ("preprocess_ms", "preprocess, ms"),
    ("encode_ms", "encode, ms"),
    ("prefill_ms", "prefill, ms"),
    ("ttft_ms", "first token, ms"),
    ("decode_tokens_per_s", "decode, tokens/s"),
    ("load_ms", "load, ms"),
    ("peak_memory_mib", "peak memory, MiB"),
]
DECODE = [
    ("work", "work"),
    ("peer", "peer"),
    ("precision", "weights"),
    ("batch", "sequences"),
    ("context", "positions"),
    ("metric", "in"),
    ("ours", "ours"),
    ("theirs", "theirs"),
    ("ratio", "times as fast"),
    ("same", "same ids, of 32"),
    ("limit", "the machine's limit"),
    ("reached", "our share of it"),
    ("peak_mib", "our memory, MiB"),
    ("peer_peak_mib", "theirs, MiB"),
]
# name of a results file -> (row's key, title) of the columns shown
COLUMNS = {
    "accuracy": ACCURACY,
    "accuracy_320": ACCURACY,
    "accuracy_documents": ACCURACY,
    "calibration": [
        ("quantiser", "quantiser"),
        ("sqnr_db", "SQNR of the image embeds, dB"),
        ("differing", "next tokens that differ, %"),
        ("anls", "ANLS"),
        ("seconds", "quantise, s"),
    ],
    "chain": CHAIN,
    "chain_vnni": CHAIN,
    "decode": DECODE,
    "decode_avx2": DECODE,
    "decode_kernels24": DECODE,
    "decoder_graphs": [
        ("graph", "graph"),
        ("precision", "precision"),
        ("size_mb", "size, MB"),
        ("nodes", "nodes"),
        ("export_s", "export, s"),
        ("load_ms", "load, ms"),
        ("prefill_ms", "prefill 614, ms"),
        ("decode_tokens_per_s", "decode, tokens/s"),
        ("relative_error", "error of the logits"),
        ("text_perplexity", "perplexity of text"),
    ],
    "decoder_weights": [
        ("precision", "precision"),
        ("method", "method"),
        ("operators", "operators"),
        ("size_mb", "size, MB"),
        ("anls", "ANLS"),
        ("text_perplexity", "perplexity of text"),
        ("answer_perplexity", "perplexity of answers"),
        ("differing", "next tokens that differ, %"),
        ("decode_tokens_per_s", "decode, tokens/s"),
        ("seconds", "quantise, s"),
    ],
    "documents": [
        ("pages", "preset"),
        ("pages_per_s", "pages/s, one process"),
        ("characters", "characters a page"),
    ],
    "engine_decoders": [
        ("graph", "graph"),
        ("nodes", "ONNX nodes"),
        ("network_layers", "TensorRT layers"),
        ("engine_layers", "after fusion"),
        ("kv_cache_updates", "KV-cache updates"),
        ("weights_mb", "weights, MB"),
        ("engine_mb", "engine, MB"),
        ("build_s", "build, s"),
        ("prefill_ms", "prefill 614 on a CPU, ms"),
        ("decode_tokens_per_s", "decode on a CPU, tokens/s"),
        ("relative_error", "error of the logits"),
    ],
    "encoder": [
        ("context", "image"),
        ("peer", "peer"),
        ("ours", "ours, ms"),
        ("theirs", "theirs, ms"),
        ("ratio", "times as fast"),
        ("error", "difference of the embeds"),
        ("limit", "the machine's limit, ms"),
        ("reached", "our share of it"),
        ("peak_mib", "our memory, MiB"),
        ("peer_peak_mib", "theirs, MiB"),
    ],
    "encoder_speed": [
        ("runtime", "runtime"),
        ("precision", "precision"),
        ("encode_ms", "encode 1536x1536, ms"),
    ],
    "engines": [
        ("model", "model"),
        ("part", "part"),
        ("precision", "precision"),
        ("target", "target"),
        ("network_layers", "layers"),
        ("engine_layers", "after fusion"),
        ("kept_in_fp32", "kept in FP32"),
        ("weights_mb", "weights, MB"),
        ("activations_mb", "activations, MB"),
        ("engine_mb", "engine, MB"),
        ("build_s", "build, s"),
    ],
    "export_encoder": [
        ("precision", "precision"),
        ("seconds", "export and checks, s"),
        ("peak_memory_gib", "peak memory, GiB"),
        ("files_gb", "files, GB"),
    ],
    "first_token.loads": [
        ("peer", "peer"),
        ("precision", "decoder"),
        ("ours", "ours, ms"),
        ("theirs", "theirs, ms"),
        ("ratio", "times as fast"),
        ("peak_mib", "our memory, MiB"),
        ("peer_peak_mib", "theirs, MiB"),
    ],
    "first_token": [
        ("image", "the image"),
        ("peer", "peer"),
        ("precision", "decoder"),
        ("ours", "ours, ms"),
        ("theirs", "theirs, ms"),
        ("ratio", "times as fast"),
        ("same", "same token"),
        ("limit", "the machine's limit, ms"),
        ("reached", "our share of it"),
        ("peak_mib", "our memory, MiB"),
        ("peer_peak_mib", "theirs, MiB"),
    ],
    "hostile": [
        ("requests_of", "requests of"),
        ("load", "load"),
        ("requests", "requests"),
        ("failed", "failed"),
        ("p50_s", "p50, s"),
        ("p95_s", "p95, s"),
        ("longest_s", "longest, s"),
    ],
    "load": [
        ("decoder", "decoder"),
        ("start", "start"),
        ("seconds", "process until it can be asked, s"),
        ("load_ms", "of these, `import runtime` and `runtime.load`, ms"),
        ("own_mib", "memory of its own, MiB"),
        ("shared_mib", "of the bundle's files, shared with another process, MiB"),
    ],
    "quantised": [
        ("left", "groups left in float32"),
        ("sqnr_db", "SQNR of the image embeds, dB"),
        ("differing", "next tokens that differ, %"),
        ("perplexity", "perplexity of the answers"),
    ],
    "released": [
        ("work", "work"),
        ("context", "positions or image"),
        ("peer", "peer"),
        ("format", "ours"),
        ("metric", "in"),
        ("ours", "ours"),
        ("theirs", "theirs"),
        ("ratio", "times as fast"),
        ("reached", "our share of the machine's limit"),
        ("perplexity", "our perplexity"),
        ("peer_perplexity", "theirs"),
        ("anls", "our ANLS"),
        ("peer_anls", "theirs"),
        ("peak_mib", "our memory, MiB"),
        ("peer_peak_mib", "theirs, MiB"),
        ("reason", "not measured"),
    ],
    "released_chain": [
        ("step", "step"),
        ("seconds", "seconds"),
        ("peak_gib", "peak memory, GiB"),
        ("mapped_gib", "beside it, mapped files, GiB"),
    ],
    "serve": [
        ("what", "load"),
        ("metric", "in"),
        ("ours", "measured"),
        ("against", "against"),
        ("theirs", "which is"),
        ("ratio", "times as good"),
    ],
    "soak": [
        ("phase", "phase"),
        ("requests", "requests"),
        ("failures", "failures"),
        ("asked_for_failures", "failures that were asked for"),
        ("p50_s", "p50, s"),
        ("p99_s", "p99, s"),
        ("longest_gap_s", "longest gap between tokens, s"),
    ],
    "soak.kinds": [
        ("request", "what clients do"),
        ("requests", "times"),
        ("failures", "failures"),
        ("p50_s", "p50, s"),
        ("p99_s", "p99, s"),
    ],
    "soak.memory": [
        ("memory", "memory"),
        ("begin_mib", "after warm-up, MiB"),
        ("end_mib", "at the end, MiB"),
        ("slope_percent", "slope, %"),
        ("most_mib", "most, MiB"),
    ],
    "warm_up": [
        ("resolution", "resolution of training"),
        ("pages", "pages"),
        ("minutes", "minutes"),
        ("stride_8", "told at stride 8"),
        ("stride_16", "16"),
        ("stride_32", "32"),
        ("stride_64", "64"),
    ],
}
# name -> which rows are shown, where the charts have them all
SHOWN = {
    **dict.fromkeys(
        ("decode", "decode_avx2", "decode_kernels24"),
        lambda row: (
            (row["work"], row["batch"], row["context"])
            in {("prefill", 1, 640), ("decode", 1, 128), ("decode", 1, 640), ("decode", 1, 4096), ("decode", 8, 256)}
        ),
    ),
    "encoder": lambda row: row["context"] in ("768x768", "1536x1536"),
    "serve": lambda row: row["work"] != "sweep",
}


def table(name: str, results: str) -> str:
    """The results file as a Markdown table with its machine and command below. name: of the file; behind a dot the key
    of its rows, if that is not `rows`. results: the folder that has it, from where the page is."""
    file, _, key = name.partition(".")
    content = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    keys, titles = zip(*COLUMNS[name], strict=True)
    rows = filter(SHOWN.get(name), content[key or "rows"])
    lines = [titles, ["---"] * len(titles), *([_text(row[key]) for key in keys] for row in rows)]
    machine, versions = content["machine"], content["versions"]
    instructions = f" ({', '.join(found)})" if (found := machine.get("instructions")) else ""
    source = (
        f"`{content['command']}`, {content['date']}, {machine['processor']}{instructions}, {machine['cores']} cores, "
        f"onnxruntime {versions['onnxruntime']}, torch {versions['torch']}; "
        f"[results file]({results}/{file}.json)"
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{source}"


def _text(value: object) -> str:
    return f"{value:.1e}" if isinstance(value, float) and 0 < abs(value) < 0.01 else str(value)


def filled(page: Path) -> str:
    """A page's text with each marked place filled from its file."""
    results = os.path.relpath(RESULTS, page.parent)
    return re.sub(
        r"(<!-- table ([\w.]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{table(match[2], results)}\n{match[3]}",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether pages and charts are up to date")
    check = parser.parse_args().check
    pages = {page: text for page in PAGES if (text := filled(page)) != page.read_text(encoding="utf-8")}
    pictures = list(charts.outdated())
    if check and (pages or pictures):
        what = ", ".join(file.name for file in (*pages, *pictures))
        print(f"not what benchmarks/results/ says: {what}; run `make tables`", file=sys.stderr)
        return 1
    if not check:
        for page, text in pages.items():
            page.write_text(text, encoding="utf-8")
        for picture in pictures:
            charts.draw(picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
