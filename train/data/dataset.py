"""Conversations from LLaVA's JSON files: an index in memory, images opened when a batch needs them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from runtime.errors import UserError
from runtime.image.decode import open_image
from runtime.image.preprocess import ImageRule, preprocess
from runtime.text.template import PromptTemplate
from train.data.conversation import Encoded, encode_conversation, turns_of
from train.data.llava_json import MalformedError, images_of, read_records
from train.data.tokenizer import Tokenizer
from train.errors import RecipeError
from train.model import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from train.recipe import Records
from train.types import Skipped


@dataclass(frozen=True)
class Conversation:
    """One record, ready for the model.

    input_ids, labels: [S] int64, as `ConvLLaVA.forward` takes them. images: pixel values, float32 [3, H, W] each.
    positions: length with the images expanded.
    """

    input_ids: Tensor
    labels: Tensor
    images: list[Tensor]
    positions: int


class Conversations(Dataset):
    """Records of several files by one index; each is a Conversation, or Skipped where something is wrong with it.

    lengths: for each record, its number of characters, negative where it has no image: what batches are grouped by.
    """

    def __init__(
        self,
        sources: tuple[Records, ...],
        template: PromptTemplate,
        system: str | None,
        tokenizer: Tokenizer,
        rule: ImageRule,
        max_length: int,
        embedding_rows: int | None = None,
    ):
        """embedding_rows: of the model; token ids must be below. None: not known.

        Raises RecipeError for a file that holds no records, and for a text with a token that the model has no embedding
        for: of every record, before any is trained on.
        """
        self._sources = sources
        self._template, self._system, self._tokenizer = template, system, tokenizer
        self._rules = {source: replace(rule, resolution=source.resolution or rule.resolution) for source in sources}
        self._max_length = max_length
        # One block of bytes, which worker processes share: a list of objects would be copied into each as soon as
        # Python counts references to them
        blocks, lengths, self.counts = [], [], []
        for source in sources:
            before = len(blocks)
            try:
                for record in read_records(Path(source.records)):
                    blocks.append(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"))
                    lengths.append(length_of(record))
            except UserError as error:
                raise RecipeError(f"data: {error}") from error
            if len(blocks) == before:
                raise RecipeError(f"data: {source.records}: no records in it")
            self.counts.append(len(blocks) - before)
        self._bytes = b"".join(blocks)
        self._ends = np.cumsum([len(block) for block in blocks], dtype=np.int64)
        self.lengths = np.array(lengths, np.int64)
        if embedding_rows is not None and tokenizer.end() > embedding_rows:  # few checkpoints; the others need no look
            self._check_tokens(embedding_rows)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Conversation | Skipped:
        source, number = self._locate(index)
        record = self._record(index)
        try:
            return self._conversation(record, source)
        except MalformedError as error:
            return Skipped(_name_of(record, source, number), str(error))

    def _record(self, index: int) -> Any:
        start = self._ends[index - 1] if index else 0
        return json.loads(self._bytes[start : self._ends[index]].decode("utf-8", "surrogatepass"))

    def _check_tokens(self, rows: int) -> None:
        for index in range(len(self)):
            source, number = self._locate(index)
            record = self._record(index)
            try:
                images_of(record)
                encoded = encode_conversation(turns_of(record), self._template, self._tokenizer, self._system)
            except MalformedError:
                continue  # it will be skipped
            if (highest := max(encoded.ids)) >= rows:
                raise RecipeError(
                    f"data: {_name_of(record, source, number)}: token {self._tokenizer.token(highest)!r} has id "
                    f"{highest}, the model's embedding has {rows} rows; take it out of the text"
                )

    def _locate(self, index: int) -> tuple[Records, int]:
        """The source of a record, and its number there."""
        for source, count in zip(self._sources, self.counts, strict=True):
            if index < count:
                return source, index
            index -= count
        raise IndexError

    def _conversation(self, record: Any, source: Records) -> Conversation:
        images = images_of(record)
        turns = turns_of(record)
        pixels = [self._pixels(image, source) for image in images]
        encoded = encode_conversation(turns, self._template, self._tokenizer, self._system)
        tokens = [self._rules[source].tokens(*image.shape[1:]) for image in pixels]
        encoded, positions = truncate(encoded, tokens, self._max_length)
        return Conversation(
            torch.tensor(encoded.ids), torch.tensor(encoded.labels), [torch.from_numpy(p) for p in pixels], positions
        )

    def _pixels(self, image: str, source: Records) -> np.ndarray:
        if source.images is None:
            raise MalformedError(f"image {image}, but its dataset has no folder 'images'")
        try:
            return preprocess(open_image(Path(source.images) / image), self._rules[source])
        except UserError as error:
            raise MalformedError(f"image {error}") from error


def _name_of(record: Any, source: Records, number: int) -> str:
    """What identifies a record to the user."""
    name = f"{source.records}[{number}]"
    return f"{name} (id {record['id']})" if isinstance(record, dict) and "id" in record else name


def length_of(record: Any) -> int:
    """Characters, negative without image; 1 for a record that will be skipped.

    LLaVA's `modality_lengths` are words; a code of ten digits is one, and ten tokens.
    """
    try:
        characters = sum(len(message["value"]) for message in record["conversations"])
        return max(characters, 1) if record.get("image") else -max(characters, 1)
    except (AttributeError, KeyError, TypeError):
        return 1


def truncate(encoded: Encoded, visual_tokens: list[int], max_length: int) -> tuple[Encoded, int]:
    """Cut a conversation at its end, so that it has at most `max_length` positions with its images expanded.

    visual_tokens: of each image. Returns what is left, and its positions. The original cuts likewise, but through
    images too; here that is an error, as is a cut that leaves no answer. Raises MalformedError.
    """
    positions, images = 0, iter(visual_tokens)
    for at, token in enumerate(encoded.ids):
        positions += next(images) if token == IMAGE_TOKEN_INDEX else 1
        if positions > max_length:
            if IMAGE_TOKEN_INDEX in encoded.ids[at:]:
                raise MalformedError(f"an image does not fit into max_length ({max_length} positions)")
            encoded, positions = Encoded(encoded.ids[:at], encoded.labels[:at]), positions - 1
            break
    if all(label == IGNORE_INDEX for label in encoded.labels):
        raise MalformedError(f"no answer within max_length ({max_length} positions)")
    return encoded, positions
