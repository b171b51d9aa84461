"""Checkpoints of a run, from which it goes on as if it had not stopped.

    out/
      step-000100/          the released layout, and beside the weights:
        training/
          progress.json     step (which decides the data's position and the learning rate), skipped records, recipe
          trainable.safetensors  what is trained, as it is: float32, adapters apart, auxiliary heads
          optimizer.pt      AdamW's moments
          random.pt         states of the random generators, by process
      final/                the released layout alone

A folder is written under a name ending in `.partial`, flushed to disk and renamed, so that under its own name it is
whole, whenever the process is killed.
"""

import json
import os
import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.distributed import (
    World,
    load_model_state,
    load_optimizer_state,
    whole_model_state,
    whole_optimizer_state,
)
from train.errors import RecipeError
from train.model.checkpoint.tensors import load_tensors, save_tensors
from train.recipe import Recipe, differences
from train.types import Progress, Task

PARTIAL = ".partial"
_STEP = re.compile(r"step-(\d+)")


def checkpoints(out: Path) -> list[Path]:
    """Whole checkpoints under `out`, oldest first."""
    found = {int(match[1]): folder for folder in out.glob("step-*") if (match := _STEP.fullmatch(folder.name))}
    return [found[step] for step in sorted(found)]


def check_same_run(out: Path, recipe: Recipe) -> None:
    """Raises RecipeError where `out` holds a run of another recipe, naming the keys, or weights of no run."""
    file = out / "recipe.json"
    if not file.is_file():
        if is_finished(out):
            raise RecipeError(f"out: {out / 'final'} is of no run, as {file} is missing; give another out")
        return
    if keys := differences(json.loads(file.read_text(encoding="utf-8")), recipe.to_dict()):
        raise RecipeError(
            f"out: {out} holds a run of a recipe with other {', '.join(keys)}; give another out, or the recipe it "
            f"began with ({file})"
        )


def is_finished(out: Path) -> bool:
    return (out / "final").is_dir()


def check_same_folder(out: Path, world: World) -> None:
    """Raises RecipeError where processes find other checkpoints, as on machines that do not share `out`."""
    found = world.gather(sorted(folder.name for folder in [*out.glob("step-*"), *out.glob("final")]))
    if any(names != found[0] for names in found):
        raise RecipeError(f"out: {out} is not the same folder for all processes; give one that all machines share")


@dataclass(frozen=True)
class Run:
    """What one run's checkpoints are made from and read back into."""

    task: Task
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    world: World

    @property
    def out(self) -> Path:
        return Path(self.recipe.out)

    def resume(self) -> Progress:
        """Take up the newest checkpoint, where there is one; clear away what a killed run left half written."""
        if self.world.main:
            for leftover in self.out.glob(f"*{PARTIAL}"):
                shutil.rmtree(leftover)
            self.out.mkdir(parents=True, exist_ok=True)
            write_atomically(self.out / "recipe.json", json.dumps(self.recipe.to_dict(), indent=2) + "\n")
        self.world.barrier()
        folders = checkpoints(self.out)
        if not folders:
            return Progress()
        if self.world.main:
            print(f"resuming from {folders[-1]}")
        return self._load(folders[-1] / "training")

    def save(self, progress: Progress) -> None:
        """Write `step-N`, then remove the oldest beyond `recipe.keep`."""
        weights = whole_model_state(self.task.model)
        optimizer = whole_optimizer_state(self.task.model, self.optimizer)
        generators = self.world.gather(random_state())
        if self.world.main:
            folder = self.out / f"step-{progress.step:06d}"
            partial = folder.with_name(folder.name + PARTIAL)
            self.task.save(partial, weights)
            training = partial / "training"
            training.mkdir()
            trained = {name for name, parameter in self.task.model.named_parameters() if parameter.requires_grad}
            save_tensors(
                {name: weights[name].detach().cpu().contiguous() for name in sorted(trained)},
                training / "trainable.safetensors",
            )
            save_object(optimizer, training / "optimizer.pt")
            save_object(generators, training / "random.pt")
            text = json.dumps(asdict(progress) | {"recipe": self.recipe.to_dict()}, indent=2)
            (training / "progress.json").write_text(text + "\n", encoding="utf-8")
            _publish(partial, folder)
            for old in checkpoints(self.out)[: -self.recipe.keep]:
                _remove(old)
        self.world.barrier()

    def finish(self) -> None:
        """Write `final`."""
        weights = whole_model_state(self.task.model)
        if self.world.main:
            partial = self.out / f"final{PARTIAL}"
            self.task.save(partial, weights)
            _publish(partial, self.out / "final")
        self.world.barrier()

    def _load(self, training: Path) -> Progress:
        load_model_state(self.task.model, load_tensors(training / "trainable.safetensors"))
        stored = torch.load(training / "optimizer.pt", map_location="cpu", weights_only=True)
        load_optimizer_state(self.task.model, self.optimizer, stored)
        generators = torch.load(training / "random.pt", map_location="cpu", weights_only=True)
        if self.world.rank < len(generators):  # with more processes than before, the new ones begin with their seeds
            restore_random_state(generators[self.world.rank])
        content = json.loads((training / "progress.json").read_text(encoding="utf-8"))
        del content["recipe"]
        return Progress(**content)


def random_state() -> dict[str, Any]:
    """The states of the global generators of Python, numpy, torch and CUDA, as types that `weights_only` reads."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(stored: dict[str, Any]) -> None:
    random.setstate(stored["python"])
    name, keys, *rest = stored["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(stored["torch"])
    if stored["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(stored["cuda"])


def _publish(partial: Path, folder: Path) -> None:
    """Flush everything in `partial` to disk, then give it its name."""
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    partial.rename(folder)
    _flush(folder.parent)


def save_object(value: Any, file: Path) -> None:
    """torch.save. Raises OSError where there is no room, which torch says in a RuntimeError of many lines."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        raise OSError(f"{file}: could not be written; is the disk full? ({str(error).splitlines()[0]})") from error


def _remove(folder: Path) -> None:
    """Take the name away first: a folder under its own name is whole."""
    leftover = folder.with_name(folder.name + PARTIAL)
    folder.rename(leftover)
    shutil.rmtree(leftover)


def write_atomically(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".new")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    partial.replace(file)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
