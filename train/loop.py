"""The training loop: any task, any number of processes, interrupted at any step.

One optimiser step takes one global batch. Its loss is the sum of what each micro-batch of each process adds to it,
divided by the sum of what they count (`Loss`), and so is its gradient. A step therefore computes the same, but for the
order of additions, however the global batch is cut into micro-batches and spread over processes. (The original's
trainer averages the means of the micro-batches, so a token's weight depends on the micro-batch it falls into.)
"""

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from train import state
from train.distributed import World, apart, gradient_norm, shard
from train.errors import DivergedError, NothingLearnt
from train.recipe import Recipe
from train.report import Report
from train.types import Batch, Loss, Skipped, StepResult, Task


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
