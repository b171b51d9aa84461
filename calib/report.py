"""The report of a quantized part in its bundle: JSON, Markdown and a chart of the sensitivities."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from calib.evaluation import Loss
from calib.sensitivity import Step

COLUMNS = {
    "sqnr_db": "SQNR of the image embeds, dB",
    "differing": "next tokens that differ, %",
    "perplexity": "perplexity of the answers",
    "anls": "ANLS lost, points",
    "grounding": "grounding lost, points",
}


def write_encoder_report(
    folder: Path, about: dict, alone: dict[str, Loss], sets: list[Step], rounds: list[Step]
) -> None:
    """Write encoder-PRECISION.json and .md; .png where there are sensitivities.

    Args:
        about: how the encoder was made.
        alone: the loss by group, each quantized alone; empty where it was not measured.
        sets: candidates, by SQNR.
        rounds: sets whose loss was measured; the last is the encoder's.
    """
    taken = rounds[-1]
    content = about | {
        "alone": [{"group": name, **rounded(loss)} for name, loss in alone.items()],
        "sets": [{"left": list(step.excluded), "sqnr_db": _number(step.sqnr_db)} for step in sets],
        "rounds": [{"left": list(step.excluded), **rounded(step.loss)} for step in rounds],
        "left_in_higher_precision": list(taken.excluded),
        "loss": rounded(taken.loss),
    }
    name = f"encoder-{content['precision']}"
    _write(folder, name, content, _markdown(content))
    if alone:
        _plot(alone, taken.excluded, folder / f"{name}.png")


def write_decoder_report(folder: Path, about: dict, rows: dict[str, Loss]) -> None:
    """Write decoder.json and decoder.md. rows: what was measured -> its loss."""
    losses = [{"measured": name, **rounded(loss)} for name, loss in rows.items()]
    content = about | {"losses": losses}
    lines = [
        f"# {content['precision']} decoder",
        "",
        f"{content['method']}, {content['calibration_prompts']} prompts to calibrate, {about['bytes'] / 1e6:.1f} MB. "
        f"{_measured(content) if rows else 'What is lost was not measured.'}",
        "",
        *(_table("", [(row["measured"], row) for row in losses]) if rows else []),
    ]
    _write(folder, "decoder", content, "\n".join(lines) + "\n")


def _measured(content: dict) -> str:
    float32 = content["float32"]["perplexity"]
    return (
        f"The loss is over {content['questions']} questions, {content['next_tokens']} next tokens in all; the "
        f"perplexity of the answers to float32 is {'unknown' if float32 is None else round(float32, 2)}."
    )


def _write(folder: Path, name: str, content: dict, markdown: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")


def rounded(loss: Loss | None) -> dict[str, float | None]:
    assert loss is not None
    return {name: _number(value) for name, value in asdict(loss).items()}


def _number(value: float | None) -> float | None:
    """None for an SQNR without noise, which JSON has no number for, and for what was not measured."""
    return round(value, 2) if value is not None and math.isfinite(value) else None


def _markdown(content: dict) -> str:
    left = ", ".join(content["left_in_higher_precision"]) or "nothing"
    lines = [
        f"# {content['precision']} encoder",
        "",
        f"{content['calibration_images']} images to calibrate ({content['method']}); the loss is over "
        f"{content['questions']} questions about {'others' if content['held_out'] else 'some of the same'}, "
        f"{content['next_tokens']} next tokens in all. Left in higher precision: {left}.",
        "",
        *_table("", [("the encoder of this bundle", content["loss"])]),
        "",
        *_table("left in higher precision", _by_left(content["rounds"])),
    ]
    if content["sets"]:
        lines += ["", *_table("left in higher precision: worst groups first", _by_left(content["sets"]))]
    if content["alone"]:
        lines += ["", *_table("quantised alone", [(row["group"], row) for row in content["alone"]])]
    return "\n".join(lines) + "\n"


def _by_left(rows: list[dict]) -> list[tuple[str, dict]]:
    return [(", ".join(row["left"]) or "nothing", row) for row in rows]


def _table(title: str, rows: list[tuple[str, dict]]) -> list[str]:
    shown = [name for name in COLUMNS if any(row.get(name) is not None for _, row in rows)]
    cells = [[name, *("" if row[column] is None else str(row[column]) for column in shown)] for name, row in rows]
    head = [[title, *(COLUMNS[name] for name in shown)], ["---"] * (len(shown) + 1)]
    return [f"| {' | '.join(line)} |" for line in head + cells]


def _plot(alone: dict[str, Loss], left: tuple[str, ...], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, colours = list(alone), ["tab:orange" if name in left else "tab:blue" for name in alone]
    lost = "points of ANLS lost" if any(loss.anls is not None for loss in alone.values()) else COLUMNS["differing"]
    figure = Figure((10, 0.3 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].barh(names, [loss.sqnr_db for loss in alone.values()], color=colours)
    axes[0].set_xlabel(COLUMNS["sqnr_db"])
    axes[1].barh(names, [loss.budgeted for loss in alone.values()], color=colours)
    axes[1].set_xlabel(lost)
    axes[0].invert_yaxis()
    figure.suptitle("Each group alone quantised (orange: left in higher precision)")
    FigureCanvasAgg(figure).print_png(str(file))
