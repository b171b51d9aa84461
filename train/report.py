"""What a run says: a progress bar, `log.jsonl`, TensorBoard scalars, `malformed.jsonl`, and `curve.png` at its end."""

import json
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from train.errors import TooManySkipped
from train.recipe import Recipe
from train.state import write_atomically
from train.types import Progress, StepResult


class Report:
    """Follows a run; writes on the main process only.

    A run that goes on continues the files of the one before. What that one wrote about steps after its last checkpoint
    is dropped, as those steps are done again.

    log.jsonl: a line for each logged step: step, loss, lr, grad_norm, images/s, tokens/s, samples (trained on so far),
    malformed (skipped so far) and the task's metrics. malformed.jsonl: a line for each skipped record.
    """

    def __init__(self, recipe: Recipe, main: bool, progress: Progress, total: int):
        self._recipe, self._main, self._out = recipe, main, Path(recipe.out)
        self._seen = set(progress.skipped)
        self._images = self._tokens = 0
        self._since = time.perf_counter()
        if not main:
            return
        for name in ("log.jsonl", "malformed.jsonl"):
            _forget_after(self._out / name, progress.step)
        self._board = SummaryWriter(self._out / "tensorboard", purge_step=progress.step + 1)
        self._bar = tqdm(total=total, initial=progress.step, unit="step", dynamic_ncols=True)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            self._bar.close()
            self._board.close()

    def step(self, progress: Progress, result: StepResult) -> None:
        """Note one step; adds its records and its skipped ones to `progress`. Raises TooManySkipped."""
        progress.samples += result.samples
        self._images += result.images
        self._tokens += result.tokens
        self._note_skipped(progress, result)
        if self._main:
            self._bar.update()
            if progress.step % self._recipe.log_every == 0:
                self._log(progress, result)

    def plot(self) -> None:
        """Loss and learning rate over the steps, from the log."""
        if not self._main:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows = _rows(self._out / "log.jsonl")
        figure = Figure(figsize=(8, 6), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, key in zip(figure.subplots(2, sharex=True), ("loss", "lr"), strict=True):
            points = [row for row in rows if row[key] is not None]
            axis.plot([row["step"] for row in points], [row[key] for row in points])
            axis.set_ylabel({"loss": "loss", "lr": "learning rate"}[key])
            axis.grid(alpha=0.3)
        axis.set_xlabel("step")
        figure.savefig(self._out / "curve.png", dpi=120)

    def _note_skipped(self, progress: Progress, result: StepResult) -> None:
        for name, reason in ((_printable(name), _printable(reason)) for name, reason in result.skipped):
            if name in self._seen:  # in an earlier epoch
                continue
            self._seen.add(name)
            progress.skipped.append(name)
            if self._main:
                _append(self._out / "malformed.jsonl", {"step": progress.step, "record": name, "reason": reason})
                self._bar.write(f"skipped {name}: {reason}")
            if len(progress.skipped) > self._recipe.malformed_limit:
                raise TooManySkipped(
                    f"{len(progress.skipped)} malformed records, more than malformed_limit "
                    f"({self._recipe.malformed_limit}); the last is {name}: {reason}; {self._out / 'malformed.jsonl'} "
                    "lists them all"
                )

    def _log(self, progress: Progress, result: StepResult) -> None:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        row = {
            "step": progress.step,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "images/s": round(self._images / seconds, 3),
            "tokens/s": round(self._tokens / seconds, 1),
            "samples": progress.samples,
            "malformed": len(progress.skipped),
            **result.metrics,
        }
        self._images = self._tokens = 0
        _append(self._out / "log.jsonl", row)
        for key, value in row.items():
            if key != "step" and value is not None:
                self._board.add_scalar(key, value, progress.step)
        shown = {key: f"{row[key]:.4g}" for key in ("loss", "images/s", "tokens/s") if row[key] is not None}
        self._bar.set_postfix(shown)


def _printable(text: str) -> str:
    """With half a surrogate pair, which JSON may hold, as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a killed process left unfinished is none."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _forget_after(file: Path, step: int) -> None:
    kept = [row for row in _rows(file) if row["step"] <= step]
    if file.is_file():
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in kept))
