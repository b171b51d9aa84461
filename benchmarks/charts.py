"""Draws results files as PNG files beside them, and the logs of the demo model's training as one. Each picture carries
the hash of what it was drawn from."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.record import RESULTS

SOURCE = "Source"  # PNG's own word for where a picture comes from
CURVES = Path(__file__).parents[1] / "train" / "runs" / "convllava-smol" / "curves.png"
TOLD = ("told_apart", "characters_right/stride_64")  # what a run may log of how much it tells right, 0 to 1

Line = dict[Any, float]  # x -> y


def lines(rows: list[dict], x: str, peer_key: str, our_key: str) -> dict[str, Line]:
    """What is drawn of rows that each compare ours with a peer: a line for each library and precision."""
    found: dict[str, Line] = {}
    for row in rows:
        found.setdefault(f"ours, {row['precision']}", {})[row[x]] = row[our_key]
        found.setdefault(f"{row['peer']}, {row['precision']}", {})[row[x]] = row[peer_key]
    return found


def draw_encoder(rows: list[dict], figure: Any) -> None:
    def shaped(row: dict) -> dict:
        height, width = map(int, row["context"].split("x"))
        shape = "square" if height == width else f"1:{width / height:g}"
        return row | {"megapixels": height * width / 1e6, "precision": shape}  # all are of one precision

    rows = [shaped(row) for row in rows]
    _panels(figure, [("megapixels", "megapixels", rows)])


def draw_decode(rows: list[dict], figure: Any) -> None:
    from benchmarks.decode import BATCH_CONTEXT

    prefill = [row for row in rows if row["work"] == "prefill"]
    decode = [row for row in rows if row["work"] == "decode"]
    batches = [row for row in decode if row["context"] == BATCH_CONTEXT]
    contexts = [row for row in decode if row["batch"] == 1 and row["context"] != BATCH_CONTEXT]
    panels = [("context", "positions prefilled", prefill), ("context", "positions before the step", contexts)]
    panels.append(("batch", f"sequences after {BATCH_CONTEXT} positions", batches))
    _panels(figure, [panel for panel in panels if panel[2]])


def _panels(figure: Any, panels: list[tuple[str, str, list[dict]]]) -> None:
    """Speed above, peak memory below. panels: (key of x, its title, rows)."""
    from matplotlib.ticker import LogFormatter

    axes = figure.subplots(2, len(panels), squeeze=False)
    colours: dict[str, str] = {}
    for column, (x, title, shown) in enumerate(panels):
        for axis, keys in zip(axes[:, column], (("theirs", "ours"), ("peer_peak_mib", "peak_mib")), strict=True):
            for name, line in lines(shown, x, *keys).items():
                colour = colours.setdefault(name, f"C{len(colours)}")
                style = {"color": colour, "lw": 2.5 if name.startswith("ours") else 1, "ms": 4, "label": name}
                axis.plot(*zip(*sorted(line.items()), strict=True), "o-" if "1:" not in name else "s--", **style)
            axis.set(xlabel=title, xscale="log", yscale="log")
            ticks = sorted({row[x] for row in shown})
            axis.set_xticks(ticks, [f"{tick:.2g}" if isinstance(tick, float) else str(tick) for tick in ticks])
            axis.xaxis.minorticks_off()
            for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                which(LogFormatter(minor_thresholds=(2, 0.5)))
            axis.grid(alpha=0.3)
        axes[0, column].set_ylabel(shown[0]["metric"])
        axes[1, column].set_ylabel("peak memory, MiB")
    known = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(known.values(), known.keys(), loc="outside right center", fontsize="small")


def draw_first_token(rows: list[dict], figure: Any) -> None:
    """Bars of the encoder's part and of the rest."""
    bars: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row["work"] == "first_token":
            what = row["image"] if "ConvNeXt" in row["image"] else f"ours, {row['precision']}, the image {row['image']}"
            bars[what] = (row["encode_ms"], row["ours"])
            if not row["peer"].startswith("ours"):
                bars[f"{row['peer']}, {row['precision']}"] = (row["peer_encode_ms"], row["theirs"])
    axis = figure.subplots()
    encode, rest = zip(*((part, max(whole - part, 0)) for part, whole in bars.values()), strict=True)
    axis.barh(list(bars), encode, label="until the image is encoded")
    axis.barh(list(bars), rest, left=encode, label="from there to the first token")
    axis.set(xlabel="ms", xscale="log" if max(encode) > 100 * min(sum(pair) for pair in bars.values()) else "linear")
    axis.invert_yaxis()
    axis.grid(alpha=0.3, axis="x")
    axis.legend()


def draw_serve(rows: list[dict], figure: Any) -> None:
    """Of the sweep over rates of requests: a line each for batching and none, medians and 99th percentiles."""
    from matplotlib.ticker import LogFormatter, ScalarFormatter

    axes = figure.subplots(1, 3)
    panels = (("tokens/s", ("tokens_per_s",)), ("first token, ms", ("first_p50_ms", "first_p99_ms")),
              ("between tokens, ms", ("gap_p50_ms", "gap_p99_ms")))  # fmt: skip
    sweep = [row for row in rows if row["work"] == "sweep"]
    for axis, (title, keys) in zip(axes, panels, strict=True):
        for number, batch in enumerate(sorted({row["batch"] for row in sweep}, reverse=True)):
            for key, style in zip(keys, ("o-", "o:"), strict=False):
                points = sorted((row["rate"], row[key]) for row in sweep if row["batch"] == batch)
                name = f"{batch} at once{', 99 %' if 'p99' in key else ''}"
                axis.plot(*zip(*points, strict=True), style, color=f"C{number}", label=name)
        axis.set(xlabel="requests a second", ylabel=title, yscale="linear" if title == "tokens/s" else "log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(LogFormatter(minor_thresholds=(2, 0.5)) if title != "tokens/s" else ScalarFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")


def draw_curves(logs: dict[str, list[dict]], figure: Any) -> None:
    """A panel for each run: the loss, and in grey behind it the share that is told right, where that is logged."""
    columns = 4
    axes = figure.subplots(math.ceil(len(logs) / columns), columns, squeeze=False)
    for axis in axes.flat[len(logs) :]:
        axis.set_axis_off()
    for axis, (name, rows) in zip(axes.flat, logs.items(), strict=False):
        axis.set_title(name, fontsize="small")
        axis.tick_params(labelsize="x-small")
        if told := next((key for key in TOLD if key in rows[0]), None):
            behind = axis.twinx()
            behind.plot([row["step"] for row in rows], [row[told] for row in rows], color="0.75", lw=0.8)
            behind.set(ylim=(0, 1))
            behind.tick_params(labelsize="x-small", colors="0.5")
            axis.set_zorder(behind.get_zorder() + 1)
            axis.patch.set_visible(False)
        known = [row for row in rows if row["loss"] is not None]
        axis.plot([row["step"] for row in known], [row["loss"] for row in known], lw=0.8)
        axis.grid(alpha=0.3)


DRAWN: dict[str, tuple[Callable[[list[dict], Any], None], tuple[float, float]]] = {
    "decode": (draw_decode, (15, 7)),
    "encoder": (draw_encoder, (8, 7)),
    "first_token": (draw_first_token, (10, 4.5)),
    "serve": (draw_serve, (13, 4)),
}


def outdated() -> Iterator[Path]:
    """Pictures that are missing or were drawn from another state of their results file."""
    for name in DRAWN:
        file, picture = RESULTS / f"{name}.json", RESULTS / f"{name}.png"
        if file.is_file() and _is_outdated(picture, [file]):
            yield picture
    if _is_outdated(CURVES, _logs()):
        yield CURVES


def _is_outdated(picture: Path, sources: Sequence[Path]) -> bool:
    return not picture.is_file() or Image.open(picture).info.get(SOURCE) != _digest(sources)


def _logs() -> list[Path]:
    return sorted(CURVES.parent.glob("*.jsonl"))


def draw(picture: Path) -> None:
    from matplotlib.figure import Figure

    if picture == CURVES:
        sources, figure = _logs(), Figure((14, 12), layout="constrained")
        logs = {log.stem: list(map(json.loads, log.read_text(encoding="utf-8").splitlines())) for log in sources}
        draw_curves(logs, figure)
        figure.suptitle("loss by step, and in grey what is told right")
    else:
        sources = [picture.with_suffix(".json")]
        function, size = DRAWN[picture.stem]
        content = json.loads(sources[0].read_text(encoding="utf-8"))
        figure = Figure(size, layout="constrained")
        function(content["rows"], figure)
        figure.suptitle(f"{content['machine']['processor']}, {content['machine']['cores']} cores, {content['date']}")
    figure.savefig(picture, dpi=80 if picture == CURVES else 100, metadata={SOURCE: _digest(sources)})


def _digest(files: Sequence[Path]) -> str:
    content = [file.read_bytes() for file in files]
    if len(files) > 1:  # then their names are drawn, too
        content += [file.name.encode() for file in files]
    return hashlib.sha256(b"".join(content)).hexdigest()
