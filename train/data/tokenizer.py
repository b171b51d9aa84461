"""A checkpoint's tokenizer, as the model was and will be used with it.

`tokenizer.model` comes first where there are both: it is what the original reads, see `train.model.original_tokenizer`.
A `tokenizer.json` is used as it is.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import tokenizers

from train.errors import TokenizerError
from train.model.tokenizer_files import CheckpointFiles, bos_token_id


class Tokenizer(ABC):
    """Text to token ids. bos_token_id: what a conversation opens with, None for a model that takes none."""

    bos_token_id: int | None

    @abstractmethod
    def encode(self, text: str, opening: bool = True) -> list[int]:
        """Ids of `text` without BOS; special tokens written in it become their ids.

        opening: the text stands on its own, as the original tokenises what lies between images; otherwise it goes on
            in the middle of one, without a prefix space.
        """

    @abstractmethod
    def end(self) -> int:
        """One more than the highest token id."""

    @abstractmethod
    def token(self, token_id: int) -> str | None:
        """How a token is written; None for an id without one."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises TokenizerError."""
    files = CheckpointFiles.read(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(files)
    if (folder / "tokenizer.json").is_file():
        return FastTokenizer(files)
    raise TokenizerError(f"{folder}: no tokenizer.model and no tokenizer.json; one of the two has to be there")


class FastTokenizer(Tokenizer):
    """A tokenizer.json."""

    def __init__(self, files: CheckpointFiles):
        file = files.folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more specific
            raise TokenizerError(f"{file}: cannot be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_token_id = bos_token_id(files, self._tokenizer)

    def encode(self, text: str, opening: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def end(self) -> int:
        return max([self._tokenizer.get_vocab_size() - 1, *self._tokenizer.get_added_tokens_decoder()]) + 1

    def token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model with the special tokens of the files around it."""

    def __init__(self, files: CheckpointFiles):
        from train.model.original_tokenizer import OriginalTokenizer  # which takes the package sentencepiece

        self._original = OriginalTokenizer.load(files)
        self.bos_token_id = self._original.bos_token_id

    def encode(self, text: str, opening: bool = True) -> list[int]:
        return self._original.encode(text, opening)

    def end(self) -> int:
        pieces, tokens = self._original.model.pieces, self._original.tokens.values()
        return max([len(pieces) - 1, *(token_id for token_id, _ in tokens)]) + 1

    def token(self, token_id: int) -> str | None:
        added = {known: content for content, (known, _) in self._original.tokens.items()}
        pieces = self._original.model.pieces
        return added.get(token_id, pieces[token_id].piece if token_id < len(pieces) else None)
