"""Stage 0: teach the encoder to read, locally, before any language model looks at it.

The released model starts from a CLIP-pretrained ConvNeXt. One drawn from a seed does not begin to read from the loss of
answers alone, so each stage is first asked which character stands where. Rendered documents know every glyph's place.

A stage of stride s sees s x s pixels per cell; its head predicts the character in each of the (s/8) x (s/4) subcells of
8 x 4 pixels. The target grid is the same for all strides, so the fifth stage (64) is asked for what stage 1 (8) sees
directly: 128 subcells from one feature vector, in place.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from train.assemble import MEAN, STD
from train.data.documents import Document, PageOptions, render
from train.data.documents.dense import dense_page
from train.data.documents.page import Page
from train.distributed import World
from train.loop import Loss, Skipped
from train.model import Checkpoint, ConvNeXtEncoder, load_image_encoder, load_model, save_checkpoint
from train.parts import parameter_groups
from train.recipe import Recipe, RecipeError, build

CHARACTERS = "".join(map(chr, range(33, 127))) + "€£"
BLANK = 0  # the class of a subcell without a glyph's centre; CHARACTERS[i] is class i + 1
CELL_HEIGHT, CELL_WIDTH = 8, 4  # pixels
_CLASSES = {character: i + 1 for i, character in enumerate(CHARACTERS)}


def targets(document: Document) -> np.ndarray:
    """[H/8, W/4] uint8 classes: the character whose box's centre lies in each subcell, else BLANK.

    Where two centres share a subcell the later one counts.
    """
    page = document.page
    grid = np.zeros((page.height // CELL_HEIGHT, page.width // CELL_WIDTH), np.uint8)
    if page.characters:
        boxes = np.array(page.places)
        rows = ((boxes[:, 1] + boxes[:, 3]) / (2 * CELL_HEIGHT)).astype(int).clip(0, grid.shape[0] - 1)
        columns = ((boxes[:, 0] + boxes[:, 2]) / (2 * CELL_WIDTH)).astype(int).clip(0, grid.shape[1] - 1)
        grid[rows, columns] = [_CLASSES[character] for character in page.characters]
    return grid


class LocalHeads(nn.Module):
    """A character classifier on every stage from stride 8 on."""

    def __init__(self, widths: tuple[int, ...], hidden: int = 64):
        """widths: channels of the stages of strides 4, 8, 16, ...; hidden: features of one subcell."""
        super().__init__()
        self.hidden = hidden
        self.strides = [4 << i for i in range(1, len(widths))]
        self.spread = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden * (s // CELL_HEIGHT) * (s // CELL_WIDTH)))
            for width, s in zip(widths[1:], self.strides, strict=True)
        )
        self.classify = nn.ModuleList(
            nn.Sequential(nn.GELU(), nn.Linear(hidden, len(CHARACTERS) + 1)) for _ in self.strides
        )

    def forward(self, features: list[Tensor], cells: Tensor) -> list[Tensor]:
        """features: the stages' outputs [B, C, H/s, W/s], stride 8 first. cells: [N] flat indices into the grids
        [B, H/8, W/4]. Returns one [N, classes] of logits a stage."""
        logits = []
        for stride, feature, spread, classify in zip(self.strides, features, self.spread, self.classify, strict=True):
            x = spread(feature.permute(0, 2, 3, 1))  # [B, h, w, rows * columns * hidden]
            batch, h, w, _ = x.shape
            rows, columns = stride // CELL_HEIGHT, stride // CELL_WIDTH
            x = x.view(batch, h, w, rows, columns, self.hidden).permute(0, 1, 3, 2, 4, 5)  # [B, h, rows, w, columns, D]
            logits.append(classify(x.reshape(-1, self.hidden)[cells]))
        return logits


@dataclass(frozen=True)
class Phase:
    """Part of a curriculum. side: of the square pages, pixels. min_px, max_px: text sizes. steps: how long. dense:
    share of pages that are full of random strings, the others being documents. strength: of degradation. families: of
    documents, by name with their weights; those of `PageOptions` where there are none. batch: pages of a step, if not
    the recipe's `global_batch`: less where pages are larger than other phases'. columns: how many documents stand side
    by side on a page, each of its height, so that it holds more text than one would. placed: whether an alignment
    teaches where text stands on these pages.
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
        PageOptions(families=tuple(self.families.items()))


@dataclass(frozen=True)
class Local:
    """The recipe's section `local`.

    phases: the curriculum, one after the other, `rounds` times over; their steps add up to the recipe's. blanks: share
    of the empty subcells that count in the loss. hidden: features of a subcell in the heads.

    For an alignment alone: contrast: weight of the loss of telling cells apart. whole_words: whether a word goes into
    one cell. places: weight of the loss of telling where text stands. kept: how many steps' pages go through the frozen
    stages at a time, whose outputs are kept in memory until each page was gone over `passes` times; 0 takes every
    step's pages through them, and each page once.
    """

    phases: tuple[Phase, ...]
    rounds: int = 1
    blanks: float = 0.05
    hidden: int = 64
    contrast: float = 0.0
    whole_words: bool = False
    places: float = 0.0
    kept: int = 0
    passes: int = 1

    def phase(self, step: int) -> Phase:
        """Raises IndexError for a step after the last one."""
        for phase in self.phases * self.rounds:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(step)


class ReadingEncoder(nn.Module):
    """The encoder with its heads: pixel_values, cells -> logits of each stage, see `LocalHeads`."""

    def __init__(self, encoder: ConvNeXtEncoder, hidden: int):
        super().__init__()
        self.encoder = encoder
        self.heads = LocalHeads(encoder.config.widths, hidden)

    def forward(self, pixel_values: Tensor, cells: Tensor) -> list[Tensor]:
        return self.heads(stage_features(self.encoder, pixel_values), cells)


def stage_features(encoder: ConvNeXtEncoder, pixel_values: Tensor) -> list[Tensor]:
    """The outputs [B, C, H/s, W/s] of the stages of strides 8, 16, 32 and, with a fifth stage, 64."""
    x = encoder.stages[0](encoder.stem(pixel_values))
    features = []
    for stage in encoder.stages[1:]:
        x = stage(x)
        features.append(x)
    return features


def choose_cells(grid: Tensor, blanks: float, generator: torch.Generator | None = None) -> Tensor:
    """Flat indices of every subcell with a character and of a random share `blanks` of those without."""
    flat = grid.flatten()
    return ((flat != BLANK) | (torch.rand(flat.shape, generator=generator) < blanks).to(flat.device)).nonzero()[:, 0]


def local_loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the chosen cells and the number of characters (not blanks) told right."""
    right = ((logits.argmax(-1) == wanted) & (wanted != BLANK)).sum()
    return F.cross_entropy(logits.float(), wanted, reduction="sum"), right


@dataclass
class PageBatch:
    """inputs: pixels [B, 3, H, W], uint8, or what frozen stages made of them. labels: integers, what is to be told from
    them; `nothing` where there is nothing to tell. See `train.loop.Batch` for the rest."""

    inputs: Tensor
    labels: Tensor
    nothing: int
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
        return replace(self, inputs=self.inputs.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device) -> Self:
        inputs, labels = (tensor.to(device, non_blocking=True) for tensor in (self.inputs, self.labels))
        return replace(self, inputs=inputs, labels=labels)


def phase_of(local: Local, number: int, global_batch: int) -> Phase:
    """Of page `number` of a run; number // global_batch is the step that takes it, were each page gone over once."""
    return local.phase(number // global_batch * local.passes)


def draw(local: Local, seed: int, number: int, global_batch: int) -> Document:
    """Page `number` of a run, of its `phase_of`."""
    phase = phase_of(local, number, global_batch)
    size = (phase.side, phase.side)
    # spread evenly, so that every batch has its share
    if int((number + 1) * phase.dense) > int(number * phase.dense):
        return dense_page(number, "train", seed, size, phase.min_px, phase.max_px, phase.strength)
    narrow = (phase.side // phase.columns, phase.side)
    options = PageOptions((narrow,), phase.min_px, phase.max_px, strength=phase.strength)
    if phase.families:
        options = replace(options, families=tuple(phase.families.items()))
    first = number * phase.columns
    documents = [render(first + column, "train", seed, options) for column in range(phase.columns)]
    if phase.columns == 1:
        return documents[0]
    return Document(Page.beside([document.page for document in documents]), "columns")


class Pages(Dataset):
    """[H, W, 3] uint8 pixels and [H/8, W/4] classes of each page."""

    def __init__(self, local: Local, recipe: Recipe):
        self._local, self._seed, self._global_batch = local, recipe.seed, recipe.global_batch

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        document = draw(self._local, self._seed, number, self._global_batch)
        return document.page.pixels, targets(document)


def stack_pixels(pages: Sequence[np.ndarray]) -> Tensor:
    """[H, W, 3] each -> [B, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.stack(pages).transpose(0, 3, 1, 2)))


def _stack(pages: Sequence[tuple[np.ndarray, np.ndarray]]) -> PageBatch:
    pixels, grids = zip(*pages, strict=True)
    return PageBatch(stack_pixels(pixels), torch.from_numpy(np.stack(grids)), BLANK)


def read_local(recipe: Recipe, stride: int) -> Local:
    """The recipe's section `local`, for an encoder of this stride. Raises RecipeError where it is wrong or its steps
    are not the recipe's."""
    try:
        local = build(Local, recipe.local, "local.")
    except ValueError as error:  # of PageOptions
        raise RecipeError(f"local.phases: {error}") from error
    if (steps := local.rounds * sum(phase.steps for phase in local.phases)) != recipe.steps:
        raise RecipeError(f"local.phases: their steps add up to {steps}, but steps is {recipe.steps}")
    if local.rounds != 1 and local.kept:
        raise RecipeError(f"local.rounds: {local.rounds}, but outputs are kept; give the phases once")
    for phase in local.phases:
        if phase.batch and local.kept:
            raise RecipeError("local.phases: batch, but outputs are kept; leave out one of both")
        micro_batches = recipe.global_batch // recipe.micro_batch
        if not 0 <= phase.batch <= recipe.global_batch or phase.batch % micro_batches:
            raise RecipeError(
                f"local.phases: batch {phase.batch}, expected at most global_batch, {recipe.global_batch}, and a "
                f"multiple of {micro_batches}, the micro-batches of a step"
            )
    if wrong := [phase.side for phase in local.phases if phase.side % stride]:
        raise RecipeError(f"local.phases: side {wrong[0]} is not a multiple of {stride}")
    for phase in local.phases:
        if phase.columns < 1 or phase.side % phase.columns:
            raise RecipeError(f"local.phases: {phase.columns} columns on pages of {phase.side}, expected a divisor")
    if local.kept < 0 or local.passes < 1:
        raise RecipeError(f"local: kept {local.kept} and passes {local.passes}, expected at least 0 and 1")
    if local.passes > 1 and not local.kept:
        raise RecipeError(f"local.passes: {local.passes}, but no pages are kept to be gone over; give local.kept")
    if local.kept and any(phase.steps % (local.kept * local.passes) for phase in local.phases):
        whole = local.kept * local.passes
        raise RecipeError(f"local.phases: their steps must be multiples of {whole}, local.kept times local.passes")
    return local


def load_pages(
    pages: Dataset, stack: Callable[[list], Any], local: Local, recipe: Recipe, world: World, first: int, last: int
) -> Iterator[list]:
    """For each step, this process's micro-batches of `stack`ed pages."""
    count = recipe.accumulation(world.size)
    batches = []
    for step in range(first, last):
        batch = local.phase(step).batch or recipe.global_batch
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
    image = checkpoint.preprocessor
    values = (image.get("image_mean", MEAN), image.get("image_std", STD))
    mean, std = (255 * torch.tensor(value, device=device).view(3, 1, 1) for value in values)
    return mean, std


class LocalTask:
    """Stage 0 as a `train.loop.Task`: pages without end, every stage's loss on the characters it sees, summed.

    Raises RecipeError for a section `local` that is wrong, or a part to train that is not in the encoder.
    """

    steps_in_epoch = None

    def __init__(self, recipe: Recipe, world: World):
        self._recipe, self._world, self._checkpoint = recipe, world, Checkpoint.open(recipe.checkpoint)
        self._local = read_local(recipe, self._checkpoint.encoder_config.stride)
        if self._local.kept:
            raise RecipeError("local.kept: task local trains the whole encoder, so that no output can be kept")
        if recipe.train != ("encoder",):
            raise RecipeError(
                f"train: task local trains the whole encoder and nothing else: [encoder], not {list(recipe.train)}"
            )
        self.model = ReadingEncoder(load_image_encoder(self._checkpoint).encoder, self._local.hidden)
        self._mean, self._std = pixel_statistics(self._checkpoint, world.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self._recipe, "image_encoder.")  # the heads are no part

    def steps(self, first: int, last: int) -> Iterator[Sequence[PageBatch]]:
        pages = Pages(self._local, self._recipe)
        return load_pages(pages, _stack, self._local, self._recipe, self._world, first, last)

    def loss(self, batch: PageBatch) -> Loss:
        grid = batch.labels.long()
        cells = choose_cells(grid, self._local.blanks)
        wanted = grid.flatten()[cells]
        characters = int((wanted != BLANK).sum())
        total, metrics = 0.0, {}
        logits = self.model((batch.inputs - self._mean) / self._std, cells)
        for stride, stage in zip(self.model.heads.strides, logits, strict=True):
            loss, right = local_loss(stage, wanted)
            total = total + loss
            metrics[f"characters_right/stride_{stride}"] = (float(right), characters)
        return Loss(total, len(wanted), metrics)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The checkpoint it began from with the encoder as it is now."""
        model = load_model(self._checkpoint)
        encoder = {
            key.removeprefix("encoder."): tensor for key, tensor in weights.items() if key.startswith("encoder.")
        }
        model.image_encoder.encoder.load_state_dict(encoder)
        save_checkpoint(model, self._checkpoint, folder)
