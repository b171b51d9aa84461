"""How the original reads a checkpoint's SentencePiece tokenizer.

The yardstick is what ConvLLaVA (`llava/model/builder.py`) loads: transformers' Python LlamaTokenizer of version 4.39,
which later versions do not have any more. `OriginalTokenizer` restates how it encodes, on top of the `sentencepiece`
package.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken

from runtime.tokenizer import SPACE

SENTENCEPIECE_FILE = "tokenizer.model"
CHATML_TURN_END = "<|im_end|>"

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_TrainerSpec = sentencepiece_model_pb2.TrainerSpec
# The order in which transformers gives ids to special tokens the vocabulary lacks, and LlamaTokenizer's defaults
_SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": None,
    "pad_token": None,
    "cls_token": None,
    "mask_token": None,
}


class TokenizerError(ValueError):
    """A tokenizer that cannot be exported; the message says what was looked for or what differs."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The JSON files around a tokenizer, empty where missing.

    config, generation: the model's; tokenizer: `tokenizer_config.json`; special: `special_tokens_map.json`;
    added: `added_tokens.json`.
    """

    folder: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer: dict[str, Any]
    special: dict[str, Any]
    added: dict[str, int]

    @classmethod
    def read(cls, folder: Path) -> "CheckpointFiles":
        """Raises TokenizerError for a file that is not a JSON object."""
        names = ("config", "generation_config", "tokenizer_config", "special_tokens_map", "added_tokens")
        return cls(folder, *(_read_json(folder / f"{name}.json") for name in names))

    def image_tokens(self) -> list[str]:
        """The special tokens the original adds when it loads a model of its own kind."""
        if not any(key.startswith("mm_") for key in self.config):
            return []
        tokens = ["<im_patch>"] if self.config.get("mm_use_im_patch_token", True) else []
        return tokens + (["<im_start>", "<im_end>"] if self.config.get("mm_use_im_start_end", False) else [])

    def eos_token_ids(self, tokenizer: tokenizers.Tokenizer) -> list[int]:
        """What ends an answer: generate()'s setting, else the tokenizer's, and ChatML's end of a turn in any case.

        The tokenizer's setting comes last because it is about training text, and is wrong for some chat models.
        """
        trained = tokenizer.token_to_id(self.role("eos_token") or "</s>")
        settings = [self.generation.get("eos_token_id"), self.config.get("eos_token_id"), trained]
        setting = next((setting for setting in settings if setting is not None), None)
        ids = setting if isinstance(setting, list) else [setting]
        turn_end = tokenizer.token_to_id(CHATML_TURN_END)
        ids = list(dict.fromkeys(ids if turn_end is None else [*ids, turn_end]))
        for token_id in ids:
            if not isinstance(token_id, int) or token_id < 0 or tokenizer.id_to_token(token_id) is None:
                raise TokenizerError(f"{self.folder}: eos_token_id {token_id!r} is not in the tokenizer's vocabulary")
        return ids

    def role(self, name: str) -> str | None:
        """The token with a role such as "bos_token"."""
        return _content(self.tokenizer.get(name, self.special.get(name)))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


@dataclass(frozen=True)
class OriginalTokenizer:
    """How LlamaTokenizer of transformers 4.39 (use_fast=False) encodes a checkpoint's text.

    model: the SentencePiece model, as the original alters it; processor: the same, loaded.
    legacy: each stretch of text between special tokens gets a prefix space of its own, from SentencePiece; otherwise
        only a text as a whole gets one, from transformers, if `add_prefix_space`.
    tokens: added tokens, content -> (id, how it is matched); special: contents of those that have no text.
    """

    model: sentencepiece_model_pb2.ModelProto
    processor: SentencePieceProcessor
    legacy: bool
    add_prefix_space: bool
    bos: str | None
    unk: str
    tokens: dict[str, tuple[int, AddedToken]]
    special: list[str]

    @classmethod
    def load(cls, files: CheckpointFiles) -> "OriginalTokenizer":
        """Raises TokenizerError for a file that is no SentencePiece model or asks for what is not supported."""
        model = _read_model(files.folder / SENTENCEPIECE_FILE)
        config = files.tokenizer
        if str(config.get("tokenizer_class") or "LlamaTokenizer").removesuffix("Fast") != "LlamaTokenizer":
            raise TokenizerError(f"{files.folder}: tokenizer class {config['tokenizer_class']}, not LlamaTokenizer")
        if config.get("add_eos_token"):
            raise TokenizerError(f"{files.folder}: add_eos_token is set, which would end a prompt before the answer")
        legacy = config.get("legacy")
        legacy = True if legacy is None else legacy
        if not legacy:
            model.normalizer_spec.add_dummy_prefix = False
        tokens, special, named = _added_tokens(files, {piece.piece: i for i, piece in enumerate(model.pieces)})
        return cls(
            model,
            SentencePieceProcessor(model_proto=model.SerializeToString()),
            legacy,
            bool(config.get("add_prefix_space", True)),
            named["bos_token"] if config.get("add_bos_token", True) else None,
            named["unk_token"] or "",
            tokens,
            special,
        )

    def encode(self, text: str) -> list[int]:
        """Ids without BOS."""
        if not self.legacy and text:
            text = (SPACE if self.add_prefix_space else "") + text.replace(SPACE, " ")
        parts = self._split(text)
        ids = self._encode_part(parts[0])
        if not self.legacy and len(parts) > 1 and ids == [self._space_id] and parts[1] in self.special:
            ids = []
        for i, part in enumerate(parts[1:]):
            ids += self._encode_part(part) if i % 2 else [self.tokens[part][0]]
        return ids

    def _split(self, text: str) -> list[str]:
        """Text and added tokens in turn, text first and last."""
        if not self.tokens:
            return [text]
        longest_first = sorted(self.tokens, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        for i in range(1, len(parts), 2):
            token = self.tokens[parts[i]][1]
            if token.rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
            if token.lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
        return parts

    def _encode_part(self, text: str) -> list[int]:
        if self.legacy or not text.startswith((SPACE, " ")):
            return self.processor.encode(text)
        # Behind the unknown token's text, SentencePiece cannot take the space for the text's own margin.
        return self.processor.encode(self.unk + text)[len(self.processor.encode(self.unk)) :]

    @property
    def _space_id(self) -> int:
        return self.processor.piece_to_id(SPACE)

    @property
    def special_ids(self) -> list[int]:
        return sorted(self.tokens[content][0] for content in self.special)

    def section(self, files: CheckpointFiles, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
        """The manifest's section for `tokenizer`, which holds the same vocabulary."""
        spec = self.model.normalizer_spec
        return {
            "family": "sentencepiece",
            "bos_token_id": None if self.bos is None else self.tokens[self.bos][0],
            "eos_token_ids": files.eos_token_ids(tokenizer),
            "special_ids": self.special_ids,
            "prefix": None if self.legacy else SPACE if self.add_prefix_space else "",
            "strip_first_piece": self.add_prefix_space,
            "strip_start": "every" if spec.remove_extra_whitespaces else "one" if spec.add_dummy_prefix else "none",
            "surfaces": self._surfaces(),
        }

    def _surfaces(self) -> dict[str, str]:
        texts = {_Piece.CONTROL: "", _Piece.UNKNOWN: self.model.trainer_spec.unk_surface}
        return {
            str(i): texts[piece.type]
            for i, piece in enumerate(self.model.pieces)
            if piece.type in texts and piece.piece not in self.tokens
        }


def _read_model(file: Path) -> sentencepiece_model_pb2.ModelProto:
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise TokenizerError(f"{file}: cannot be read as a SentencePiece model: {error}") from None
    unsupported = {
        "no pieces": not model.pieces,
        "a piece twice": len({piece.piece for piece in model.pieces}) < len(model.pieces),
        "unused pieces": any(piece.type == _Piece.UNUSED for piece in model.pieces),
        "a model that is neither BPE nor Unigram": model.trainer_spec.model_type
        not in (_TrainerSpec.BPE, _TrainerSpec.UNIGRAM),
        "spaces at the end of words": model.trainer_spec.treat_whitespace_as_suffix,
        "spaces that are not escaped": not model.normalizer_spec.escape_whitespaces,
        "denormalisation": bool(model.denormalizer_spec.precompiled_charsmap),
    }
    if found := [what for what, is_so in unsupported.items() if is_so]:
        raise TokenizerError(f"{file}: not supported: {', '.join(found)}")
    return model


def _added_tokens(
    files: CheckpointFiles, pieces: dict[str, int]
) -> tuple[dict[str, tuple[int, AddedToken]], list[str], dict[str, str | None]]:
    """What PreTrainedTokenizer makes of the checkpoint's files, then builder.py of the model's configuration.

    Returns the added tokens (content -> id, token), the special ones among them, and those with a role.
    """
    config, special_map = files.tokenizer, files.special
    if "added_tokens_decoder" in config:
        special_map = {}  # then all is in the configuration, and the older files are not read
    settings = {name: {**config, **special_map}.get(name, default) for name, default in _SPECIAL_TOKENS.items()}
    listed = [*(config.get(key := "additional_special_tokens") or []), *(special_map.get(key) or [])]
    special = {_content(token): token for token in [*settings.values(), *listed] if token}

    tokens: dict[str, tuple[int, AddedToken]] = {}
    if "added_tokens_decoder" in config:
        for token_id, token in config["added_tokens_decoder"].items():
            tokens[token["content"]] = (int(token_id), _added_token(token, token.get("special", False)))
    else:
        for content, token_id in files.added.items():
            tokens[content] = (token_id, _added_token(content, content in special))
    for content, token in [*special.items(), *((token, token) for token in files.image_tokens())]:
        if content not in tokens:
            token_id = pieces.get(content, len(pieces.keys() | tokens.keys()))
            tokens[content] = (token_id, _added_token(token, special=True))
            special[content] = token
    return tokens, list(special), {name: _content(token) for name, token in settings.items()}


def special_token(content: str) -> AddedToken:
    """A token that is matched in the text as it came, and has no text itself."""
    return AddedToken(content, special=True, normalized=False)


def _added_token(token: str | dict[str, Any], special: bool) -> AddedToken:
    # The original matches added tokens in the text as it came, whatever their entry says of normalisation.
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=False)
    if token.get("single_word"):
        raise TokenizerError(f"added token {token['content']!r}: single_word is not supported")
    lstrip, rstrip = token.get("lstrip", False), token.get("rstrip", False)
    return AddedToken(token["content"], special=special, normalized=False, lstrip=lstrip, rstrip=rstrip)
