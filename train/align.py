"""Projector initialisation without the language model: each visual token becomes what its text embeds to.

The language model reads tokens through its embedding table. A visual token that covers the characters `ota` is
therefore fitted to the sum of the embeddings of the tokens that `ota` is cut into: regression, at a fraction of what a
step through the language model costs, which then begins with tokens it half understands. Cells without text are fitted
to the embedding of a line break. Rendered documents know which characters stand where.

Embeddings of digits lie close together: which digit it is makes a tenth of the squared distance from a blank. With
`local.contrast` a cell has to be told from what else is in the batch, too.

Pieces of words embed to something else than words. With `local.whole_words` the cell with a word's centre stands for
all of it, its neighbours for nothing of it.

With `local.places` a token also says where its text stands, in directions of its own, see `PlaceCode`: what a language
model needs that is to answer with boxes, since which of how many tokens it is looking at tells it little.

Where only the fifth stage is trained, most of the time goes into those before it. With `local.kept` their outputs are
kept for some thousand pages and gone over several times, in another order each time, before the next pages come.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import itemgetter, or_
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from train.data.tokenizer import Tokenizer, load_tokenizer
from train.distributed import World
from train.errors import RecipeError
from train.loop import autocast, compute_dtype
from train.model import Checkpoint, ImageEncoder, load_embedding, load_image_encoder, save_image_encoder
from train.pages import Curriculum, PageBatch, Phase, load_pages, pixel_statistics, read_curriculum, stack_pixels
from train.parts import check_parts, freeze_others, parameter_groups
from train.places import NOWHERE, SIDES, PlaceCode, hundredths
from train.recipe import Recipe
from train.synth import Document
from train.synth.page import Box, Page
from train.types import Loss

NO_TOKEN = -1
UNTOLD = -2  # in place of the sides of a cell whose place is not taught
FROZEN = 4  # stages, where outputs are kept
KEEPABLE = ("projector", "fifth_stage")
SPREAD = 0.3  # variance of a cell's embedding around its text's where cells are told apart; digits are 3 apart, squared


@dataclass(frozen=True)
class Alignment(Curriculum):
    """The recipe's section `local`. contrast: weight of the loss of telling a cell apart from the others of its
    micro-batch, whose size therefore matters. whole_words: whether a word goes into one cell. places: weight of the
    loss of telling where text stands. kept: how many steps' pages go through the frozen stages at a time, whose outputs
    are kept in memory until each page was gone over `passes` times; 0 takes every step's pages through them, and each
    page once.
    """

    contrast: float = 0.0
    whole_words: bool = False
    places: float = 0.0
    kept: int = 0
    passes: int = 1

    def phase_of(self, number: int, global_batch: int) -> Phase:
        return self.phase(number // global_batch * self.passes)

    def check_kept(self, train: Iterable[str]) -> None:
        """Raises RecipeError where outputs cannot be kept as it says."""
        if self.kept < 0 or self.passes < 1:
            raise RecipeError(f"local: kept {self.kept} and passes {self.passes}, expected at least 0 and 1")
        if not self.kept:
            if self.passes > 1:
                raise RecipeError(
                    f"local.passes: {self.passes}, but no pages are kept to be gone over; give local.kept"
                )
            return
        if self.rounds != 1:
            raise RecipeError(f"local.rounds: {self.rounds}, but outputs are kept; give the phases once")
        if any(phase.batch for phase in self.phases):
            raise RecipeError("local.phases: batch, but outputs are kept; leave out one of both")
        whole = self.kept * self.passes
        if any(phase.steps % whole for phase in self.phases):
            raise RecipeError(f"local.phases: their steps must be multiples of {whole}, local.kept times local.passes")
        if others := [part for part in train if part not in KEEPABLE]:
            raise RecipeError(f"train: with local.kept {' and '.join(KEEPABLE)} alone, not {', '.join(others)}")


@dataclass
class Cell:
    """text: what one visual token stands for, words with a space between them. box: around its ink, pixels; None where
    there is no text."""

    text: str = ""
    box: Box | None = None


def cells(document: Document, stride: int, whole_words: bool = False) -> list[Cell]:
    """Of each stride x stride cell the characters whose centres, or the words whose boxes' centres, lie in it; cells,
    characters and words in reading order."""
    page = document.page
    width, height = page.width // stride, page.height // stride
    found = [Cell() for _ in range(width * height)]
    numbers = page.words if whole_words else range(len(page.characters))
    for text, box in _pieces(page, numbers):
        column, row = (int(centre / 2 / stride) for centre in (box.x0 + box.x1, box.y0 + box.y1))
        cell = found[min(row, height - 1) * width + min(column, width - 1)]
        cell.text += f" {text}" if whole_words and cell.text else text
        cell.box = box if cell.box is None else cell.box | box
    return found


def _pieces(page: Page, numbers: Iterable[int]) -> Iterator[tuple[str, Box]]:
    """Text and box of each run of the page's characters with the same number."""
    for _, run in itertools.groupby(zip(numbers, page.characters, page.places, strict=True), key=itemgetter(0)):
        _, characters, places = zip(*run, strict=True)
        yield "".join(characters), reduce(or_, (Box(*place) for place in places))


class CellPages(Dataset):
    """[H, W, 3] uint8 pixels of each page, for each cell the ids of its text's tokens, and its box's hundredths."""

    def __init__(self, local: Alignment, recipe: Recipe, tokenizer: Tokenizer, stride: int):
        self._local, self._seed, self._global_batch = local, recipe.seed, recipe.global_batch
        self._tokenizer, self._stride = tokenizer, stride

    def __getitem__(self, number: int) -> tuple[np.ndarray, list[Tensor], Tensor]:
        document = self._local.draw(self._seed, number, self._global_batch)
        placed = self._local.phase_of(number, self._global_batch).placed
        page, labels, sides = document.page, [], []
        for cell in cells(document, self._stride, self._local.whole_words):
            ids = [id for word in cell.text.split() or ["\n"] for id in self._tokenizer.encode(word, opening=False)]
            labels.append(torch.tensor(ids, dtype=torch.long))
            known = placed or cell.box is None
            sides.append(hundredths(cell.box, page.width, page.height) if known else [UNTOLD] * SIDES)
        return page.pixels, labels, torch.tensor(sides)


def _stack(pages: Sequence[tuple[np.ndarray, list[Tensor], Tensor]]) -> PageBatch:
    """labels: [B * T, N], the ids of each cell's tokens, NO_TOKEN behind the last. sides: [B * T, SIDES]."""
    pixels, labels, sides = zip(*pages, strict=True)
    padded = pad_sequence([cell for page in labels for cell in page], batch_first=True, padding_value=NO_TOKEN)
    return PageBatch(stack_pixels(pixels), padded, NO_TOKEN, torch.cat(sides))


def tell_apart(found: Tensor, texts: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of which of `texts` [K, D] each of `found` [N, D] is, were it drawn from around that one.

    which: [N] int64. Returns the sum, and for each whether the right one is the nearest, bool [N].
    """
    with torch.autocast(found.device.type, enabled=False):  # digits differ in what bfloat16 rounds away
        logits = (found @ texts.T - texts.square().sum(1) / 2) / SPREAD
    return F.cross_entropy(logits, which, reduction="sum"), logits.argmax(1) == which


class AlignedEncoder(nn.Module):
    """An image encoder under the name that a recipe's parts go by: pixel_values -> image embeds.

    kept: it is given what `frozen` makes of the pixels, [B, C, H/32, W/32], in their place.
    """

    def __init__(self, image_encoder: ImageEncoder, kept: bool = False):
        super().__init__()
        self.image_encoder, self._kept = image_encoder, kept

    def forward(self, inputs: Tensor) -> Tensor:
        if not self._kept:
            return self.image_encoder(inputs)
        features = inputs
        for stage in self.image_encoder.encoder.stages[FROZEN:]:
            features = stage(features)
        return self.image_encoder.projector(features.flatten(2).transpose(1, 2))

    @torch.no_grad()
    def frozen(self, pixel_values: Tensor) -> Tensor:
        """What the frozen stages say, without their stochastic depth."""
        training = self.training
        self.eval()
        features = self.image_encoder.encoder.stem(pixel_values)
        for stage in self.image_encoder.encoder.stages[:FROZEN]:
            features = stage(features)
        self.train(training)
        return features


@dataclass
class KeptPages:
    """One process's pages of some steps: features [N, C, H/32, W/32] on the device that made them; labels [N, T, K];
    sides [N, T, SIDES]."""

    features: Tensor
    labels: Tensor
    sides: Tensor

    def batches(self, pages: np.ndarray, size: int) -> list[PageBatch]:
        """Those of the numbers `pages`, in that order, `size` at a time."""
        chosen = torch.from_numpy(pages).split(size)
        return [
            PageBatch(self.features[at], self.labels[at].flatten(0, 1), NO_TOKEN, self.sides[at].flatten(0, 1))
            for at in chosen
        ]


class AlignTask:
    """The regression as a `train.types.Task`. The loss is in units of an embedding's mean square.

    Raises RecipeError for a section `local` that is wrong, a language model to train, or more than projector and fifth
    stage where outputs are kept.
    """

    steps_in_epoch = None

    def __init__(self, recipe: Recipe, world: World):
        self._recipe, self._world = recipe, world
        if "language_model" in recipe.train:
            raise RecipeError("train: task align trains projector and encoder, not language_model")
        self._checkpoint = Checkpoint.open(recipe.checkpoint)
        config = self._checkpoint.encoder_config
        self._local = read_curriculum(Alignment, recipe, config.stride)
        self._local.check_kept(recipe.train)
        check_parts(recipe.train, len(config.depths), self._checkpoint.projector_type)
        self._tokenizer = load_tokenizer(self._checkpoint.folder)
        self._embedding = load_embedding(self._checkpoint).to(world.device)
        self._scale = self._embedding.square().mean()
        self._places = PlaceCode(self._embedding.shape[1], world.device) if self._local.places else None
        self.model = AlignedEncoder(load_image_encoder(self._checkpoint), bool(self._local.kept))
        freeze_others(self.model, recipe.train)
        self._mean, self._std = pixel_statistics(self._checkpoint, world.device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self._recipe)

    def steps(self, first: int, last: int) -> Iterator[Sequence[PageBatch]]:
        pages = CellPages(self._local, self._recipe, self._tokenizer, self._checkpoint.encoder_config.stride)
        load = partial(load_pages, pages, _stack, self._local, self._recipe, self._world)
        return self._kept_steps(load, first, last) if self._local.kept else load(first, last)

    def _kept_steps(
        self, load: Callable[[int, int], Iterator[list]], first: int, last: int
    ) -> Iterator[list[PageBatch]]:
        """load: the pages of the steps from one to another, were each page gone over once.

        Each process goes over its own pages. Unlike without `kept`, a run that goes on within a round with another
        number of processes, or another micro_batch on several, meets some pages more often and others less.
        """
        kept, span = self._local.kept, self._local.kept * self._local.passes
        mine = self._recipe.global_batch // self._world.size
        first_round, last_round = first // span, math.ceil(last / span)
        loaded = load(first_round * kept, last_round * kept)
        for number in range(first_round, last_round):
            pages = None  # before the next ones come
            pages = self._keep(itertools.chain.from_iterable(itertools.islice(loaded, kept)), kept * mine)
            for step in range(max(number * span, first), min((number + 1) * span, last)):
                at_pass, at = divmod(step % span, kept)
                random = np.random.default_rng((self._recipe.seed, self._world.rank, number, at_pass))
                chosen = random.permutation(kept * mine)[at * mine : (at + 1) * mine]
                yield pages.batches(chosen, self._recipe.micro_batch)

    def _keep(self, batches: Iterable[PageBatch], count: int) -> KeptPages:
        """The next `count` pages, encoded as they come."""
        features, labels, sides, begin = None, [], [], 0
        for batch in batches:
            pixels = (batch.inputs.to(self._world.device) - self._mean) / self._std
            with autocast(self._world.device, compute_dtype(self._recipe, self._world)):
                found = self.model.frozen(pixels)
            if features is None:
                features = found.new_empty((count, *found.shape[1:]))
            features[begin : begin + len(found)] = found
            begin += len(found)
            labels += batch.labels.unflatten(0, (batch.samples, -1))
            sides += batch.sides.unflatten(0, (batch.samples, -1))
        longest = max(page.shape[1] for page in labels)
        padded = [F.pad(page, (0, longest - page.shape[1]), value=NO_TOKEN) for page in labels]
        return KeptPages(features, torch.stack(padded), torch.stack(sides))

    def loss(self, batch: PageBatch) -> Loss:
        inputs = batch.inputs if self._local.kept else (batch.inputs - self._mean) / self._std
        found = self.model(inputs).flatten(0, 1).float()  # [B * T, D]
        sides, ids = batch.sides, batch.labels
        written, placed = sides[:, 0] != NOWHERE, sides[:, 0] >= 0
        text = (self._embedding[ids.clamp(min=0)] * (ids != NO_TOKEN)[..., None]).sum(1)
        wanted = text.clone()
        if self._places:
            wanted[placed] += self._places.encode(sides[placed])
        errors = (found - wanted).square().mean(-1) / self._scale
        loss, metrics = errors.sum(), {}
        if self._local.contrast:
            texts, which = text.unique(dim=0, return_inverse=True)
            told, right = tell_apart(found - (wanted - text), texts, which)
            loss = loss + self._local.contrast * told
            metrics["told_apart"] = (float(right[written].sum()), float(written.sum()))
        if self._places:
            missed, hit = self._places.loss(found[placed], sides[placed])
            loss = loss + self._local.places * missed
            metrics["placed"] = (float(hit.sum()), float(placed.sum()))
        spread = (wanted - wanted.mean(0)).square().mean() / self._scale * len(wanted)
        # what the mean embedding would not explain: 0 is no better than a constant, 1 is exact
        metrics["explained"] = (float(spread - errors.detach().sum()), float(spread))
        return Loss(loss, len(errors), metrics)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """The checkpoint it began from with the parts as they are now."""
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        changed = {name.removeprefix("image_encoder."): weights[name] for name in trained}
        save_image_encoder(changed, self._checkpoint, folder)
