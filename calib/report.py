"""What a quantised encoder costs, for programs, for people and as a picture: calib/ in its bundle."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from calib.sensitivity import Loss, Step


def write_report(folder: Path, about: dict, noise: dict[str, float], steps: list[Step]) -> None:
    """report.json and report.md; sensitivity.png where there are sensitivities.

    about: how it was made. noise: SQNR in dB by group, each quantised alone; empty where none was asked for. steps: of
    the search, the last of which holds.
    """
    folder.mkdir()
    content = about | {
        "sqnr_db_alone": {name: round(value, 2) for name, value in noise.items()},
        "steps": [{"left": list(step.left), **_rounded(step.loss)} for step in steps],
        "left_in_higher_precision": list(steps[-1].left),
        "loss": _rounded(steps[-1].loss),
    }
    (folder / "report.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(_markdown(content), encoding="utf-8")
    if noise:
        _plot(noise, steps[-1].left, folder / "sensitivity.png")


def _rounded(loss: Loss) -> dict[str, float]:
    """None for an SQNR without noise, which JSON has no number for."""
    return {name: round(value, 2) if math.isfinite(value) else None for name, value in asdict(loss).items()}


def _markdown(content: dict) -> str:
    left = content["left_in_higher_precision"]
    lines = [
        f"# {content['precision']} encoder",
        "",
        f"{content['calibration_images']} images to calibrate ({content['method']}), {content['evaluation_images']} to "
        f"evaluate{'' if content['held_out'] else ', the same ones'}. Left in higher precision: "
        f"{', '.join(left) or 'nothing'}.",
        "",
        "| left in higher precision | SQNR of the image embeds, dB | next tokens that differ, % |",
        "| --- | --- | --- |",
        *(f"| {', '.join(s['left']) or 'nothing'} | {s['sqnr_db']} | {s['differing']} |" for s in content["steps"]),
    ]
    if content["sqnr_db_alone"]:
        lines += ["", "| quantised alone | SQNR of the image embeds, dB |", "| --- | --- |"]
        lines += [f"| {name} | {value} |" for name, value in content["sqnr_db_alone"].items()]
    return "\n".join(lines) + "\n"


def _plot(noise: dict[str, float], left: tuple[str, ...], file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((8, 0.3 * len(noise) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    colours = ["tab:orange" if name in left else "tab:blue" for name in noise]
    axes.barh(list(noise), list(noise.values()), color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("SQNR of the image embeds with this group alone quantised, dB (orange: left in higher precision)")
    FigureCanvasAgg(figure).print_png(str(file))
