"""The loop on a task of its own: a linear regression on made-up data, small enough for a float64 reference."""

import contextlib
import json
import math
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train import loop, state
from train.distributed import World
from train.errors import DivergedError, NothingLearnt, RecipeError, TooManySkipped
from train.model.checkpoint.tensors import save_tensors
from train.recipe import Recipe
from train.types import Loss, Skipped

ALONE = World(0, 1, torch.device("cpu"))


@dataclass
class Points:
    x: Tensor
    y: Tensor
    skipped: list[Skipped] = field(default_factory=list)
    images: int = 0
    tokens: int = 7

    @property
    def samples(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> "Points":
        return Points(self.x.to(device), self.y.to(device), self.skipped)


class Regression:
    """Squared error of a linear map with dropout; step s has the points that generator s draws."""

    steps_in_epoch = None

    def __init__(self, recipe: Recipe, skip: dict[int, list[str]] | None = None, dropout: float = 0.0):
        self.recipe, self.skip = recipe, skip or {}
        self.model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(dropout), nn.Linear(2, 1))

    def parameter_groups(self) -> list[dict]:
        return [{"params": list(self.model.parameters()), "weight_decay": self.recipe.weight_decay}]

    def steps(self, first: int, last: int) -> Iterator[list[Points]]:
        for step in range(first, last):
            points = torch.Generator().manual_seed(step)
            x = torch.randn(self.recipe.global_batch, 3, generator=points)
            y = torch.randn(self.recipe.global_batch, 1, generator=points)
            size = self.recipe.micro_batch
            batches = [Points(x[at : at + size], y[at : at + size]) for at in range(0, len(x), size)]
            batches[0].skipped = [Skipped(name, "broken") for name in self.skip.get(step, [])]
            yield batches

    def loss(self, batch: Points) -> Loss:
        error = self.model(batch.x) - batch.y
        return Loss((error**2).sum(), len(batch.x), {"bias": (error.sum().item(), len(batch.x))})

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        folder.mkdir()
        save_file({name: tensor.detach().clone() for name, tensor in weights.items()}, folder / "model.safetensors")


def recipe_for(out: Path, **keys) -> Recipe:
    keys = {"train": ("encoder",), "learning_rate": 0.05, "global_batch": 4, "micro_batch": 2, "steps": 10} | keys
    return Recipe(out=str(out), checkpoint="unused", task="local", **keys)


def run(recipe: Recipe, **task) -> Regression:
    loop.seed_everything(recipe.seed)
    regression = Regression(recipe, **task)
    loop.train(regression, recipe, ALONE)
    return regression


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def curve_of(out: Path) -> list[tuple]:
    """What of the log does not depend on time."""
    return [tuple(value for key, value in row.items() if not key.endswith("/s")) for row in log_of(out)]


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = load_file(first / "final/model.safetensors"), load_file(second / "final/model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def reference(recipe: Recipe) -> tuple[list[float], list[float], list[float], list[np.ndarray]]:
    """Losses, rates, gradient norms and last weights in float64: AdamW's update and the cosine written out."""
    loop.seed_everything(recipe.seed)
    task = Regression(recipe)
    weights = [parameter.detach().double().numpy() for parameter in task.model.parameters()]
    first, second = [np.zeros_like(w) for w in weights], [np.zeros_like(w) for w in weights]
    losses, rates, norms = [], [], []
    warmup = math.ceil(recipe.steps * recipe.warmup_ratio)
    for step, batches in enumerate(task.steps(0, recipe.steps)):
        x = torch.cat([batch.x for batch in batches]).double().numpy()
        y = torch.cat([batch.y for batch in batches]).double().numpy()
        w1, b1, w2, b2 = weights
        hidden = x @ w1.T + b1
        error = hidden @ w2.T + b2 - y
        d = 2 * error / len(x)
        back = d @ w2
        gradients = [back.T @ x, back.sum(0), d.T @ hidden, d.sum(0)]
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        if step < warmup:
            share = step / warmup
        else:
            share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (recipe.steps - warmup)))
        rate = recipe.learning_rate * share
        for i, gradient in enumerate(gradients):
            gradient = gradient * min(1, recipe.max_grad_norm / (norm + 1e-6))
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.999 * second[i] + 0.001 * gradient**2
            m, v = first[i] / (1 - 0.9 ** (step + 1)), second[i] / (1 - 0.999 ** (step + 1))
            weights[i] = weights[i] * (1 - rate * recipe.weight_decay) - rate * m / (np.sqrt(v) + 1e-8)
        losses.append(float((error**2).mean()))
        rates.append(rate)
        norms.append(norm)
    return losses, rates, norms, weights


def test_a_run_computes_what_adamw_and_the_cosine_say(tmp_path: Path):
    recipe = recipe_for(tmp_path, warmup_ratio=0.3, weight_decay=0.1, max_grad_norm=0.5)
    model = run(recipe).model
    losses, rates, norms, weights = reference(recipe)
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-9)
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5)
    for found, expected in zip(model.parameters(), weights, strict=True):
        assert found.detach().numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_cut_into_micro_batches_changes_nothing(micro_batch: int, tmp_path: Path):
    run(recipe_for(tmp_path / "two"))
    run(recipe_for(tmp_path / "other", micro_batch=micro_batch))
    two, other = curve_of(tmp_path / "two"), curve_of(tmp_path / "other")
    assert np.array(other) == pytest.approx(np.array(two), rel=1e-5, abs=1e-7)


def test_metrics_are_means_over_what_they_count(tmp_path: Path):
    recipe = recipe_for(tmp_path, steps=1, learning_rate=0.0)
    model = run(recipe).model
    (batches,) = Regression(recipe).steps(0, 1)
    bias = torch.cat([model(batch.x) - batch.y for batch in batches]).mean()
    assert log_of(tmp_path)[0]["bias"] == pytest.approx(bias.item(), rel=1e-5)


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [3, 5, 6, 9])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(stop: int, tmp_path: Path, monkeypatch, capsys):
    """With dropout, so that the random generators' states matter; with a skipped record before and after the stop."""
    task = {"dropout": 0.5, "skip": {1: ["a"], 7: ["a", "b"]}}
    run(recipe_for(tmp_path / "whole", save_every=3), **task)

    original = loop.train_step
    done = []

    def killed_after(*arguments):
        if len(done) == stop:
            raise Killed
        done.append(1)
        return original(*arguments)

    stopped = recipe_for(tmp_path / "stopped", save_every=3)
    monkeypatch.setattr(loop, "train_step", killed_after)
    with pytest.raises(Killed):
        run(stopped, **task)
    monkeypatch.setattr(loop, "train_step", original)
    for name in ("step-000099.partial", "final.partial"):
        (tmp_path / "stopped" / name / "training").mkdir(parents=True)
    with (tmp_path / "stopped/log.jsonl").open("a") as log:
        log.write('{"step": 99, "lo')
    capsys.readouterr()
    run(stopped, **task)
    assert f"resuming from {tmp_path / 'stopped'}/step-{stop // 3 * 3:06d}" in capsys.readouterr().out
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert curve_of(tmp_path / "stopped") == curve_of(tmp_path / "whole")
    whole, again = ((tmp_path / name / "malformed.jsonl").read_text() for name in ("whole", "stopped"))
    assert whole == again
    assert [json.loads(line)["record"] for line in whole.splitlines()] == ["a", "b"]
    assert not list((tmp_path / "stopped").glob("*.partial"))


def test_the_newest_checkpoints_are_kept(tmp_path: Path):
    run(recipe_for(tmp_path, save_every=2, keep=3))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000006", "step-000008", "step-000010"]
    assert not (tmp_path / "final/training").exists()


def test_weights_of_no_run_are_not_taken_for_its_end(tmp_path: Path):
    (tmp_path / "final").mkdir()
    with pytest.raises(RecipeError, match=r"final is of no run, as .*recipe.json is missing; give another out"):
        state.check_same_run(tmp_path, recipe_for(tmp_path))


def test_processes_that_find_other_checkpoints_do_not_begin(tmp_path: Path, monkeypatch):
    """As on two machines with a disk each, of which one has what was written before the run was killed."""
    (tmp_path / "here/step-000100").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    monkeypatch.setattr(World, "gather", lambda _, value: [value, []])
    state.check_same_folder(tmp_path / "there", ALONE)
    with pytest.raises(RecipeError, match=r"out: .*here is not the same folder for all processes"):
        state.check_same_folder(tmp_path / "here", ALONE)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_os_error(tmp_path: Path):
    """torch.save raises a RuntimeError for one, safetensors an error of its own."""
    for write in (save_tensors, state.save_object):
        with pytest.raises(OSError, match="file: could not be written; is the disk full"), full_disk():
            write({"a": torch.ones(100)}, tmp_path / "file")


def test_too_many_malformed_records_end_the_run(tmp_path: Path):
    with pytest.raises(TooManySkipped, match=r"2 malformed records, more than malformed_limit \(1\)"):
        run(recipe_for(tmp_path, malformed_limit=1), skip={2: ["a"], 4: ["a", "b"]})
    assert len((tmp_path / "malformed.jsonl").read_text().splitlines()) == 2


def test_records_that_cannot_be_printed_are_skipped_as_others_are(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "said", "w", encoding="utf-8"))  # noqa: SIM115
    run(recipe_for(tmp_path), skip={2: ["\ud83d.png"]})
    sys.stdout.flush()
    assert "skipped \\ud83d.png: " in (tmp_path / "said").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "malformed.jsonl").read_text())["record"] == "\\ud83d.png"


def test_a_run_that_learnt_from_no_record_has_no_end(tmp_path: Path):
    recipe = recipe_for(tmp_path, global_batch=2, steps=2)
    for _ in range(2):  # once more, as whoever starts it again has it
        task = Regression(recipe)
        task.steps = lambda first, last: [[Points(x=torch.zeros(0, 3), y=torch.zeros(0, 1))]] * (last - first)
        with pytest.raises(NothingLearnt, match=r"malformed\.jsonl says why"):
            loop.train(task, recipe, ALONE)
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_chosen_where_a_gpu_has_it_and_not_where_it_is_imitated(native, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    world = World(0, 1, torch.device("cuda"))
    expected = torch.bfloat16 if native else torch.float32
    assert loop.compute_dtype(recipe_for(tmp_path, precision="auto"), world) == expected
    assert loop.compute_dtype(recipe_for(tmp_path, precision="bf16"), world) == torch.bfloat16


def test_a_step_in_which_everything_was_skipped_has_no_loss(tmp_path: Path):
    recipe = recipe_for(tmp_path, global_batch=2, steps=2)
    task = Regression(recipe)
    full = list(task.steps(0, 1))
    task.steps = lambda first, last: [[Points(x=torch.zeros(0, 3), y=torch.zeros(0, 1))], *full]
    loop.train(task, recipe, ALONE)
    rows = log_of(tmp_path)
    assert (rows[0]["loss"], rows[0]["grad_norm"], rows[0]["samples"]) == (None, 0.0, 0)
    assert rows[1]["loss"] > 0
    assert (tmp_path / "curve.png").is_file()


def test_a_run_leaves_its_curve_and_scalars(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(recipe_for(tmp_path, log_every=2))
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert rows[-1].keys() >= {"loss", "lr", "grad_norm", "images/s", "tokens/s", "samples", "malformed"}
    assert rows[-1]["samples"] == 40
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_ends_the_run_before_it_reaches_the_weights(broken: float, tmp_path: Path):
    recipe = recipe_for(tmp_path / "run", steps=6, save_every=2)
    task, calls = Regression(recipe), []
    right = task.loss

    def loss(batch: Points) -> Loss:
        calls.append(batch)
        found = right(batch)
        return Loss(found.sum * (broken if len(calls) > 3 * recipe.accumulation(1) else 1.0), found.count)

    task.loss = loss
    with pytest.raises(DivergedError, match="a lower learning_rate and another out"):
        loop.train(task, recipe, ALONE)
    assert all(torch.isfinite(parameter).all() for parameter in task.model.parameters())
    assert (tmp_path / "run" / "step-000002").is_dir()
