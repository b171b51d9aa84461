"""A checkpoint's tokenizer, as the model was and will be used with it.

`tokenizer.model` comes first where there are both: it is what the original reads. For it the yardstick is transformers'
Python LlamaTokenizer of version 4.39, restated here on the `sentencepiece` package, because later versions encode
differently, or have no such class. A `tokenizer.json` is used as it is.
"""

import json
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

SPACE = "▁"  # what SentencePiece writes for a space
TURN_START = "<|im_start|>"


class TokenizerError(ValueError):
    """A tokenizer that cannot be read; the message names the file."""


class Tokenizer(ABC):
    """Text to token ids. bos_token_id: what a conversation opens with, None for a model that takes none."""

    bos_token_id: int | None

    @abstractmethod
    def encode(self, text: str, opening: bool = True) -> list[int]:
        """Ids of `text` without BOS; special tokens written in it become their ids.

        opening: the text stands on its own, as the original tokenises what lies between images; otherwise it goes on
            in the middle of one, without a prefix space.
        """


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a checkpoint's folder. Raises TokenizerError."""
    config = _read_json(folder / "tokenizer_config.json")
    if (file := folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(file, config)
    if (file := folder / "tokenizer.json").is_file():
        return FastTokenizer(file, config)
    raise TokenizerError(f"{folder}: no tokenizer.model and no tokenizer.json; one of the two has to be there")


class FastTokenizer(Tokenizer):
    """A tokenizer.json."""

    def __init__(self, file: Path, config: dict[str, Any]):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more specific
            raise TokenizerError(f"{file}: cannot be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.bos_token_id = self._bos(config)

    def encode(self, text: str, opening: bool = True) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _bos(self, config: dict[str, Any]) -> int | None:
        """The configuration's word, else what the post-processor puts in front."""
        if "add_bos_token" in config:
            bos = _content(config.get("bos_token")) if config["add_bos_token"] else None
            token = bos and self._tokenizer.token_to_id(bos)
        else:
            bare, full = self.encode("a"), self._tokenizer.encode("a").ids
            token = full[0] if full != bare else None
        # Where BOS also opens each turn of a chat, the template writes it
        return None if token == self._tokenizer.token_to_id(TURN_START) else token


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer.model with the special tokens of its tokenizer_config.json."""

    def __init__(self, file: Path, config: dict[str, Any]):
        from google.protobuf.message import DecodeError
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(file.read_bytes())
        except DecodeError as error:
            raise TokenizerError(f"{file}: cannot be read as a SentencePiece model: {error}") from None
        # In legacy mode each stretch of text between special tokens gets a prefix space from SentencePiece; otherwise
        # only a text as a whole gets one, from LlamaTokenizer
        self._legacy = config.get("legacy") in (None, True)
        if not self._legacy:
            model.normalizer_spec.add_dummy_prefix = False
        self._prefix = SPACE if config.get("add_prefix_space", True) else ""
        self._pieces = SentencePieceProcessor(model_proto=model.SerializeToString())
        self._special = self._special_tokens(file.parent, config)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._unknown = _content(config.get("unk_token")) or "<unk>"
        bos = _content(config.get("bos_token")) or "<s>"
        self.bos_token_id = self._special[bos] if config.get("add_bos_token", True) else None

    def encode(self, text: str, opening: bool = True) -> list[int]:
        if self._legacy:
            parts = self._split.split(text)
        else:
            parts = self._split.split((self._prefix if opening and text else "") + text.replace(SPACE, " "))
        ids = self._encode_stretch(parts[0])
        # LlamaTokenizer takes the prefix space back from in front of a special token
        if opening and not self._legacy and len(parts) > 1 and ids == [self._pieces.piece_to_id(SPACE)]:
            ids = []
        for special, stretch in zip(parts[1::2], parts[2::2], strict=True):
            ids += [self._special[special], *self._encode_stretch(stretch)]
        return ids

    def _encode_stretch(self, text: str) -> list[int]:
        """A text without special tokens."""
        if self._legacy or not text.startswith((SPACE, " ")):
            return self._pieces.encode(text)
        # Behind the unknown token's text, SentencePiece cannot take the space for the text's own margin
        return self._pieces.encode(self._unknown + text)[len(self._pieces.encode(self._unknown)) :]

    def _special_tokens(self, folder: Path, config: dict[str, Any]) -> dict[str, int]:
        """Content -> id: those with a role, and the added ones."""
        known = {self._pieces.id_to_piece(i): i for i in range(self._pieces.get_piece_size())}
        if "added_tokens_decoder" in config:
            added = {token["content"]: int(i) for i, token in config["added_tokens_decoder"].items()}
        else:
            added = _read_json(folder / "added_tokens.json")
        roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        named = [_content(config.get(role)) or default for role, default in roles.items()]
        if missing := [token for token in named if token not in known | added]:
            raise TokenizerError(f"{folder / 'tokenizer.model'}: has no {missing[0]}")
        return {token: known[token] for token in named if token not in added} | added


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: not JSON: {error}") from None


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
