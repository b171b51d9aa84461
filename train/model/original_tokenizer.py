"""How the original reads a checkpoint's SentencePiece tokenizer.

The yardstick is what ConvLLaVA (`llava/model/builder.py`) loads: transformers' Python LlamaTokenizer of version 4.39,
which later versions do not have any more. `OriginalTokenizer` restates how it encodes, on top of the `sentencepiece`
package.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken

from train.errors import TokenizerError
from train.model.tokenizer_files import CheckpointFiles, content_of

SENTENCEPIECE_FILE = "tokenizer.model"
SPACE = "▁"  # what SentencePiece writes for a space

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
TrainerSpec = sentencepiece_model_pb2.TrainerSpec
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
        try:
            tokens, special, named = _added_tokens(files, {piece.piece: i for i, piece in enumerate(model.pieces)})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(
                f"{files.folder}: added tokens cannot be read from tokenizer_config.json, special_tokens_map.json and "
                f"added_tokens.json: {type(error).__name__}: {error}"
            ) from error
        try:
            processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter where its own message is no text
            raise TokenizerError(
                f"{files.folder / SENTENCEPIECE_FILE}: cannot be read as a SentencePiece model: {error}"
            ) from None
        return cls(
            model,
            processor,
            legacy,
            bool(config.get("add_prefix_space", True)),
            named["bos_token"] if config.get("add_bos_token", True) else None,
            named["unk_token"] or "",
            tokens,
            special,
        )

    @property
    def bos_token_id(self) -> int | None:
        """What a prompt opens with; None for nothing."""
        return None if self.bos is None else self.tokens[self.bos][0]

    def encode(self, text: str, opening: bool = True) -> list[int]:
        """Ids without BOS. opening: the text stands on its own; otherwise it goes on in the middle of one, without a
        prefix space from transformers."""
        if not self.legacy and text:
            text = (SPACE if self.add_prefix_space and opening else "") + text.replace(SPACE, " ")
        parts = self._split(text)
        ids = self._encode_part(parts[0])
        # The original takes the prefix space back from in front of a special token
        took_prefix = opening and not self.legacy and ids == [self._space_id]
        if took_prefix and len(parts) > 1 and parts[1] in self.special:
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


def _read_model(file: Path) -> sentencepiece_model_pb2.ModelProto:
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise TokenizerError(f"{file}: cannot be read as a SentencePiece model: {error}") from None
    unsupported = {
        "no pieces that stand for text": not any(piece.type == Piece.NORMAL for piece in model.pieces),
        "pieces that are not UTF-8": not all(isinstance(piece.piece, str) for piece in model.pieces),
        "no unknown piece": not any(piece.type == Piece.UNKNOWN for piece in model.pieces),
        "a piece twice": len({piece.piece for piece in model.pieces}) < len(model.pieces),
        "unused pieces": any(piece.type == Piece.UNUSED for piece in model.pieces),
        "a model that is neither BPE nor Unigram": model.trainer_spec.model_type
        not in (TrainerSpec.BPE, TrainerSpec.UNIGRAM),
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
    special = {content_of(token): token for token in [*settings.values(), *listed] if token}

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
    return tokens, list(special), {name: content_of(token) for name, token in settings.items()}


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
