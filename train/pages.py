"""Pages that are drawn as training asks for them: the recipe's section `local`, its curriculum, batches.

Stage 0 (`train.local`) and the alignment (`train.align`) take drawn pages and what is known of every glyph on them, not
conversations.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.distributed import World
from train.errors import RecipeError
from train.model import Checkpoint
from train.recipe import Recipe, build
from train.synth import Document, PageOptions, render
from train.synth.dense import dense_page
from train.synth.page import Page
from train.types import Skipped


@dataclass(frozen=True)
class Phase:
    """Part of a curriculum. side: of the square pages, pixels. min_px, max_px: text sizes. steps: how long. dense:
    share of pages that are full of random strings, the others being documents. strength: of degradation. families: of
    documents, by name with their weights; those of `PageOptions` where there are none. batch: pages of a step, if not
    the recipe's `global_batch`: less where pages are larger than other phases'. columns: how many documents stand side
    by side on a page, each of its height, so that it holds more text than one would. placed: whether an alignment
    teaches where text stands on these pages. Raises ValueError for what cannot be drawn.
    """

    side: int
    min_px: int
    max_px: int
    steps: int
    dense: float = 0.5
    strength: float = 0.5
    families: dict[str, float] = field(default_factory=dict)
    batch: int = 0
    columns: int = 1
    placed: bool = True

    def __post_init__(self):
        if self.columns < 1 or self.side % self.columns:
            raise ValueError(f"{self.columns} columns on pages of {self.side}, expected a divisor")
        self.options()

    def options(self) -> PageOptions:
        """Of its documents."""
        size = (self.side // self.columns, self.side)
        options = PageOptions((size,), self.min_px, self.max_px, strength=self.strength)
        return replace(options, families=tuple(self.families.items())) if self.families else options


@dataclass(frozen=True)
class Curriculum:
    """What the section `local` has for both tasks. phases: one after the other, `rounds` times over; their steps add up
    to the recipe's."""

    phases: tuple[Phase, ...]
    rounds: int = 1

    def phase(self, step: int) -> Phase:
        """Raises IndexError for a step after the last one."""
        for phase in self.phases * self.rounds:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)

    def phase_of(self, number: int, global_batch: int) -> Phase:
        """Of page `number` of a run. Pages of step s have the numbers from s * global_batch on."""
        return self.phase(number // global_batch)

    def draw(self, seed: int, number: int, global_batch: int) -> Document:
        """Page `number` of a run."""
        phase = self.phase_of(number, global_batch)
        step, at = divmod(number, global_batch)
        ordinal = step * (phase.batch or global_batch) + at
        # spread evenly, so that every batch has its share
        if int((ordinal + 1) * phase.dense) > int(ordinal * phase.dense):
            size = (phase.side, phase.side)
            return dense_page(number, "train", seed, size, phase.min_px, phase.max_px, phase.strength)
        first = number * phase.columns
        documents = [render(first + column, "train", seed, phase.options()) for column in range(phase.columns)]
        if phase.columns == 1:
            return documents[0]
        return Document(Page.beside([document.page for document in documents]), "columns")


AnyCurriculum = TypeVar("AnyCurriculum", bound=Curriculum)


def read_curriculum(cls: type[AnyCurriculum], recipe: Recipe, stride: int) -> AnyCurriculum:
    """The recipe's section `local`, for an encoder of this stride. Raises RecipeError where it is wrong or its steps
    are not the recipe's."""
    try:
        found = build(cls, recipe.local, "local.")
    except RecipeError:
        raise
    except ValueError as error:  # of Phase
        raise RecipeError(f"local.phases: {error}") from error
    if (steps := found.rounds * sum(phase.steps for phase in found.phases)) != recipe.steps:
        raise RecipeError(f"local.phases: their steps add up to {steps}, but steps is {recipe.steps}")
    micro_batches = recipe.global_batch // recipe.micro_batch
    for phase in found.phases:
        if not 0 <= phase.batch <= recipe.global_batch or phase.batch % micro_batches:
            raise RecipeError(
                f"local.phases: batch {phase.batch}, expected at most global_batch, {recipe.global_batch}, and a "
                f"multiple of {micro_batches}, the micro-batches of a step"
            )
        if phase.side % stride:
            raise RecipeError(f"local.phases: side {phase.side} is not a multiple of {stride}")
    return found


@dataclass
class PageBatch:
    """inputs: pixels [B, 3, H, W], uint8, or what frozen stages made of them. labels: integers, what is to be told from
    them; `nothing` where there is nothing to tell. sides: [len(labels), 4] int64, where it stands, for an alignment.
    See `train.types.Batch` for the rest."""

    inputs: Tensor
    labels: Tensor
    nothing: int
    sides: Tensor | None = None
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return len(self.inputs)

    images = samples

    @property
    def tokens(self) -> int:
        return int((self.labels != self.nothing).sum())

    def pin_memory(self) -> Self:
        """As torch's DataLoader asks for it."""
        return self._with(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Self:
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors = {"inputs": self.inputs, "labels": self.labels, "sides": self.sides}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})


def stack_pixels(pages: Sequence[np.ndarray]) -> Tensor:
    """[H, W, 3] each -> [B, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.stack(pages).transpose(0, 3, 1, 2)))


def load_pages(
    pages: Dataset,
    stack: Callable[[list], Any],
    curriculum: Curriculum,
    recipe: Recipe,
    world: World,
    first: int,
    last: int,
) -> Iterator[list]:
    """For each step, this process's micro-batches of `stack`ed pages."""
    count = recipe.accumulation(world.size)
    batches = []
    for step in range(first, last):
        batch = curriculum.phase(step).batch or recipe.global_batch
        size = batch * recipe.micro_batch // recipe.global_batch
        for micro in range(count):
            start = step * recipe.global_batch + (micro * world.size + world.rank) * size
            batches.append(range(start, start + size))
    loader = iter(
        DataLoader(
            pages,
            batch_sampler=batches,
            collate_fn=stack,
            num_workers=recipe.workers,
            generator=torch.Generator(),  # its own: the loader draws its workers' seeds
            pin_memory=world.device.type == "cuda",
            prefetch_factor=4 if recipe.workers else None,
        )
    )
    for _ in range(first, last):
        yield [next(loader) for _ in range(count)]


def pixel_statistics(checkpoint: Checkpoint, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a checkpoint's images, [3, 1, 1] each, of pixels from 0 to 255."""
    mean, std = (255 * torch.tensor(v, device=device).view(3, 1, 1) for v in checkpoint.pixel_statistics)
    return mean, std
