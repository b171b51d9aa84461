"""The training loop: any task, any number of processes, interrupted at any step.

One optimiser step takes one global batch. Its loss is the sum of what each micro-batch of each process adds to it,
divided by the sum of what they count (`Loss`), and so is its gradient. A step therefore computes the same, but for the
order of additions, however the global batch is cut into micro-batches and spread over processes. (The original's
trainer takes the mean of each micro-batch's mean, which weighs an answer by the company it is in.)
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from train import state
from train.distributed import World, apart, gradient_norm, shard
from train.errors import DivergedError, NothingLearnt
from train.recipe import Recipe
from train.report import Report


class Skipped(NamedTuple):
    """A record that was left out. name: what identifies it to the user, and is counted once. reason: one line."""

    name: str
    reason: str


class Batch(Protocol):
    """The data of one forward pass. May be empty (`samples` 0), where records were skipped or an epoch ends.

    samples, images, tokens: how many it has, for the log. skipped: records that would have been in it.
    """

    samples: int
    images: int
    tokens: int
    skipped: list[Skipped]

    def to(self, device: torch.device) -> Self:
        """The same, its tensors on `device`."""


@dataclass(frozen=True)
class Loss:
    """What a micro-batch adds to the loss of a step.

    sum: scalar tensor with a graph, summed and not averaged over what counts; 0 for an empty batch.
    count: over how much (answer tokens, characters). A step's loss is the sum of sums over the sum of counts.
    metrics: name -> (sum, count), added up and divided alike, for the log.
    """

    sum: Tensor
    count: int
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


class Task(Protocol):
    """An objective: model, data and loss. The loop does everything else and knows nothing of any of the three.

    model: every module that takes part, auxiliary heads included, on the CPU when the loop gets it; `requires_grad`
        says what is trained. The loop moves it to the device, and under FSDP shards it in place. What is trained
        must be parameters: the resumable state has no buffers.
    steps_in_epoch: global batches of an epoch; None where data has no end, for which a recipe gives `steps`.
    """

    model: nn.Module
    steps_in_epoch: int | None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups (`params`, `lr`, `weight_decay`) of `model`'s trained parameters.

        Called once the model is where it computes: sharding replaces the parameters. The order must be the same
        every time, because the optimiser's state is stored by it.
        """

    def steps(self, first: int, last: int) -> Iterator[Sequence[Batch]]:
        """For each step from `first` (0-based, included) to `last` (excluded): this process's micro-batches.

        All processes get the same number of micro-batches in each step, empty ones if need be. What a step holds
        depends on the recipe and the step alone: a run that goes on at step 700 calls `steps(700, last)` and gets what
        the first would have got there. It must not draw from the global random generators, whose states belong to
        the model (dropout).
        """

    def loss(self, batch: Batch) -> Loss:
        """The loss of a batch on `model`'s device, under autocast where the precision is bf16.

        It calls `model(...)`, not `model.part(...)`: FSDP gathers the weights in the forward of the whole.
        """

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the checkpoint in the released layout to `folder`, which does not exist. Main process only.

        weights: `model`'s state_dict, unsharded. Adapters are merged, auxiliary heads left out: these are in the
        `training/` folder that the loop adds.
        """


@dataclass(frozen=True)
class StepResult:
    """One optimiser step, over all processes. loss, metrics: means. grad_norm: before it was cut.

    loss: None where nothing counted, as every record was skipped.
    """

    loss: float | None
    grad_norm: float
    lr: float
    samples: int
    images: int
    tokens: int
    metrics: dict[str, float]
    skipped: list[Skipped]


def train(task: Task, recipe: Recipe, world: World) -> None:
    """Train to the end of the recipe, from the newest checkpoint in `recipe.out` if there is one.

    Leaves `out/final`. Raises RecipeError where the recipe and the task or an earlier run do not go together,
    TooManySkipped past `malformed_limit`, NothingLearnt where every record was skipped, and DivergedError where a
    gradient is no number.
    """
    out, total = Path(recipe.out), total_steps(task, recipe)
    compute = compute_dtype(recipe, world)
    place(task.model, recipe, world, compute)
    optimizer = torch.optim.AdamW(apart(task.parameter_groups()), lr=recipe.learning_rate)
    seed_everything(recipe.seed + world.rank)
    run = state.Run(task, optimizer, recipe, world)
    progress = run.resume()
    scheduler = schedule(optimizer, recipe, total, progress.step)
    with Report(recipe, world.main, progress, total) as report:
        for batches in task.steps(progress.step, total):
            result = train_step(task, batches, optimizer, recipe, world, compute)
            scheduler.step()
            progress.step += 1
            report.step(progress, result)
            if progress.step % recipe.save_every == 0:
                run.save(progress)
        report.plot()
        if total and not progress.samples:
            raise NothingLearnt(
                f"{out}: nothing was learnt, for each record was skipped; {out / 'malformed.jsonl'} says why"
            )
        run.finish()
    if world.main:
        print(f"finished {total} steps: {out / 'final'}")


def train_step(
    task: Task,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    world: World,
    compute: torch.dtype,
) -> StepResult:
    """Gradients of one global batch, then the optimiser's step (not the scheduler's). Raises DivergedError."""
    optimizer.zero_grad(set_to_none=True)
    mine = _Sums()
    for batch in batches:
        with autocast(world.device, compute):
            loss = task.loss(batch.to(world.device))
        if loss.sum.requires_grad:  # not so for text where nothing but the projector is trained
            loss.sum.backward()
        mine.add(batch, loss)
    sums = _Sums.over(world.gather(mine))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    world.sum_gradients(parameters)
    per_count = 1 / max(sums.count, 1)
    norm = gradient_norm(parameters) * per_count
    if not math.isfinite(norm):  # it would make every weight NaN, and soon every checkpoint
        raise DivergedError(
            f"{recipe.out}: a gradient is {norm}; begin again with a lower learning_rate and another out, from here or "
            f"with checkpoint={recipe.out}/step-N"
        )
    scale = per_count * min(1.0, recipe.max_grad_norm / (norm + 1e-6))
    for parameter in parameters:
        parameter.grad.mul_(scale)
    lr = max(group["lr"] for group in optimizer.param_groups)
    optimizer.step()
    return sums.result(norm, lr)


@dataclass
class _Sums:
    """What the micro-batches of a step add up to."""

    loss: float = 0.0
    count: int = 0
    samples: int = 0
    images: int = 0
    tokens: int = 0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, batch: Batch, loss: Loss) -> None:
        self.merge(
            _Sums(loss.sum.item(), loss.count, batch.samples, batch.images, batch.tokens, loss.metrics, batch.skipped)
        )

    def merge(self, other: "_Sums") -> None:
        for key in ("loss", "count", "samples", "images", "tokens"):
            setattr(self, key, getattr(self, key) + getattr(other, key))
        for name, (total, count) in other.metrics.items():
            had_total, had_count = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (had_total + total, had_count + count)
        self.skipped = [*self.skipped, *other.skipped]

    @classmethod
    def over(cls, parts: list["_Sums"]) -> "_Sums":
        whole = cls()
        for part in parts:
            whole.merge(part)
        return whole

    def result(self, grad_norm: float, lr: float) -> StepResult:
        metrics = {name: total / count for name, (total, count) in self.metrics.items() if count}
        loss = self.loss / self.count if self.count else None
        return StepResult(loss, grad_norm, lr, self.samples, self.images, self.tokens, metrics, self.skipped)


def total_steps(task: Task, recipe: Recipe) -> int:
    """Steps of the whole run."""
    if recipe.steps is not None:
        return recipe.steps
    return math.ceil(recipe.epochs * task.steps_in_epoch)


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, total: int, step: int) -> LambdaLR:
    """Warmup and cosine over `total` steps, of which `step` are done; as the original's trainer, from 0 to 0."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    warmup = math.ceil(total * recipe.warmup_ratio)
    return get_cosine_schedule_with_warmup(optimizer, warmup, total, last_epoch=step - 1)


def compute_dtype(recipe: Recipe, world: World) -> torch.dtype:
    """The type of activations and products. `auto`: bf16 on a GPU that has it, and does not imitate it."""
    has_bf16 = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if recipe.precision == "bf16" or (recipe.precision == "auto" and has_bf16) else torch.float32


def autocast(device: torch.device, compute: torch.dtype) -> contextlib.AbstractContextManager:
    """Forward passes in `compute`, on weights of that type or float32."""
    if compute == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, compute)


def place(model: nn.Module, recipe: Recipe, world: World, compute: torch.dtype) -> None:
    """Bring the model to where and how it computes.

    Trained parameters are float32 whatever the precision: what a step adds is lost in bfloat16's 8 bits. Frozen ones
    are kept in `compute`, but where they are sharded, in float32: FSDP wants one type.
    """
    sharded = recipe.fsdp and world.size > 1
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad or sharded else compute)
    if sharded:  # before the rest is moved: a device need not hold the whole model
        shard(model, world, compute)
    model.to(world.device)
    model.train()


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
