"""What the training loop, its tasks and its reports exchange."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn


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


@dataclass
class Progress:
    """How far a run is. step: optimiser steps done. samples: records trained on. skipped: names of records left out."""

    step: int = 0
    samples: int = 0
    skipped: list[str] = field(default_factory=list)
