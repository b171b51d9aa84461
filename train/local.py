"""Stage 0: teach the encoder to read, locally, before any language model looks at it.

The released model starts from a CLIP-pretrained ConvNeXt. One drawn from a seed does not begin to read from the loss of
answers alone, so each stage is first asked which character stands where. Rendered documents know every glyph's place.

A stage of stride s sees s x s pixels per cell; its head predicts the character in each of the (s/8) x (s/4) subcells of
8 x 4 pixels. The target grid is the same for all strides, so the fifth stage (64) is asked for what stage 1 (8) sees
directly: 128 subcells from one feature vector, in place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from train.distributed import World
from train.errors import RecipeError
from train.model import Checkpoint, ConvNeXtEncoder, load_image_encoder, save_image_encoder
from train.pages import Curriculum, PageBatch, load_pages, pixel_statistics, read_curriculum, stack_pixels
from train.parts import parameter_groups
from train.recipe import Recipe
from train.synth import Document
from train.types import Loss

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
class Local(Curriculum):
    """The recipe's section `local`. blanks: share of the empty subcells that count in the loss. hidden: features of a
    subcell in the heads."""

    blanks: float = 0.05
    hidden: int = 64


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


def choose_cells(grid: Tensor, blanks: float) -> Tensor:
    """Flat indices of every subcell with a character and of a random share `blanks` of those without."""
    flat = grid.flatten()
    return ((flat != BLANK) | (torch.rand(flat.shape) < blanks).to(flat.device)).nonzero()[:, 0]


def local_loss(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy over the chosen cells and the number of characters (not blanks) told right."""
    right = ((logits.argmax(-1) == wanted) & (wanted != BLANK)).sum()
    return F.cross_entropy(logits.float(), wanted, reduction="sum"), right


class Pages(Dataset):
    """[H, W, 3] uint8 pixels and [H/8, W/4] classes of each page."""

    def __init__(self, local: Local, recipe: Recipe):
        self._local, self._seed, self._global_batch = local, recipe.seed, recipe.global_batch

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        document = self._local.draw(self._seed, number, self._global_batch)
        return document.page.pixels, targets(document)


def _stack(pages: Sequence[tuple[np.ndarray, np.ndarray]]) -> PageBatch:
    pixels, grids = zip(*pages, strict=True)
    return PageBatch(stack_pixels(pixels), torch.from_numpy(np.stack(grids)), BLANK)


class LocalTask:
    """Stage 0 as a `train.types.Task`: pages without end, every stage's loss on the characters it sees, summed.

    Raises RecipeError for a section `local` that is wrong, or other parts to train than the whole encoder.
    """

    steps_in_epoch = None

    def __init__(self, recipe: Recipe, world: World):
        self._recipe, self._world, self._checkpoint = recipe, world, Checkpoint.open(recipe.checkpoint)
        self._local = read_curriculum(Local, recipe, self._checkpoint.encoder_config.stride)
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
        encoder = {name: weight for name, weight in weights.items() if name.startswith("encoder.")}
        save_image_encoder(encoder, self._checkpoint, folder)
