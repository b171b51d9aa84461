"""Streaming detokenizers: token IDs to text, as it becomes certain."""

import codecs
import re
from abc import ABC, abstractmethod
from typing import Any

import tokenizers

from runtime.errors import UserError

SPACE = "▁"  # what SentencePiece writes for a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
REPLACE_EACH_BYTE = "runtime.text.tokenizer.replace_each_byte"


def replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


class Detokenizer(ABC):
    """Turns the ids of one answer into text as they come; made by `Tokenizer.detokenizer`.

    What `push` and `flush` return, joined, is the decoding of the whole sequence; no text is revised afterwards.
    """

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that became certain with this id, often "" (a special token, a part of a character)."""

    @abstractmethod
    def flush(self) -> str:
        """The text still held back, once the answer has ended: U+FFFD for an unfinished character."""


class ByteLevelDetokenizer(Detokenizer):
    def __init__(self, pieces: "ByteLevelPieces"):
        self._pieces = pieces
        # Python's "replace" groups invalid bytes as Rust's from_utf8_lossy does, one U+FFFD per maximal subpart.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class SentencePieceDetokenizer(Detokenizer):
    """LlamaTokenizer.decode as a state machine.

    Added tokens cut the answer into segments. Each segment is decoded on its own, and segments and added tokens are
    joined with spaces, though a segment without text is joined only once.
    """

    def __init__(self, pieces: "SentencePiecePieces"):
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(REPLACE_EACH_BYTE)
        self._space_due = False  # before the next segment or added token
        self._segment_begun = False
        self._may_strip = False  # SentencePiece still looks for leading spaces in this segment

    def push(self, token_id: int) -> str:
        kind, value = self._pieces[token_id]
        if kind == "skipped":
            return ""
        if kind == "byte":
            text = self._begin_segment() + self._utf8.decode(value)
            self._may_strip = False
            self._space_due = True
            return text
        text = self.flush()
        if kind == "added":
            return text + self._added_token(value)
        first = not self._segment_begun
        return text + self._begin_segment() + self._piece_text(value, first)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _added_token(self, content: str) -> str:
        text = " " + content if self._space_due else content
        self._space_due = True
        self._segment_begun = False
        return text

    def _begin_segment(self) -> str:
        if self._segment_begun:
            return ""
        self._segment_begun = True
        self._may_strip = self._pieces.strip_start != "none"
        space = " " if self._space_due else ""
        self._space_due = False
        return space

    def _piece_text(self, piece: str, first: bool) -> str:
        if first and self._pieces.strip_first_piece and piece.startswith(SPACE):
            piece = piece[1:]
            if not self._pieces.has(piece):
                # SentencePiece hands back a string that is no piece as it is, with any further "▁" in it.
                return self._noted(piece)
        if self._may_strip and piece.startswith(SPACE):
            piece = piece[1:]
            self._may_strip = self._pieces.strip_start == "every"
        return self._noted(piece.replace(SPACE, " "))

    def _noted(self, text: str) -> str:
        if text:
            self._may_strip = False
            self._space_due = True
        return text


class ByteLevelPieces(dict[int, bytes]):
    """The bytes of each id, looked up when first asked for: filling the table up front would cost a cold start more
    than a whole answer's look-ups do."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special_ids: frozenset[int]):
        super().__init__(dict.fromkeys(special_ids, b""))
        self._tokenizer = tokenizer
        self._bytes = _byte_alphabet()

    def bytes_of(self, token_id: int) -> bytes:
        return self[token_id]

    def __missing__(self, token_id: int) -> bytes:
        token = _token(self._tokenizer, token_id)
        try:
            piece = bytes([self._bytes[char] for char in token])
        except KeyError:
            # As tokenizers' ByteLevel decoder: a token with any other character stands for its own text.
            piece = token.encode()
        self[token_id] = piece
        return piece


class SentencePiecePieces(dict[int, tuple[str, Any]]):
    """What each id stands for, looked up when first asked for: ("skipped", ""), ("byte", bytes), ("added", content)
    or ("piece", piece with "▁" for spaces)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special_ids: frozenset[int], section: dict[str, Any]):
        surfaces = manifest_field(section, "surfaces", dict)
        if wrong := [token_id for token_id in surfaces if not token_id.isdecimal()]:
            raise UserError(f"manifest: tokenizer 'surfaces' has {wrong[0]!r}; expected a token's id")
        super().__init__({int(token_id): ("piece", text) for token_id, text in surfaces.items()})
        self.update((i, ("added", token.content)) for i, token in tokenizer.get_added_tokens_decoder().items())
        self.update((token_id, ("skipped", "")) for token_id in special_ids)
        self._tokenizer = tokenizer
        self.strip_first_piece: bool = manifest_field(section, "strip_first_piece", bool)
        self.strip_start: str = manifest_field(section, "strip_start", str)

    def bytes_of(self, token_id: int) -> bytes:
        kind, value = self[token_id]
        return value if kind == "byte" else value.replace(SPACE, " ").encode() if kind == "piece" else value.encode()

    def __missing__(self, token_id: int) -> tuple[str, Any]:
        token = _token(self._tokenizer, token_id)
        if match := _BYTE_PIECE.fullmatch(token):
            entry = ("byte", bytes.fromhex(match[1]))
        else:
            entry = ("piece", token) if token else ("skipped", "")
        self[token_id] = entry
        return entry

    def has(self, piece: str) -> bool:
        """Whether the string is a piece of the vocabulary."""
        return self._tokenizer.token_to_id(piece) is not None


def _token(tokenizer: tokenizers.Tokenizer, token_id: int) -> str:
    """The vocabulary's string, "" for an id it does not have (the embedding may have rows to spare)."""
    return (tokenizer.id_to_token(token_id) or "") if token_id >= 0 else ""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def id_list(section: dict[str, Any], key: str) -> frozenset[int]:
    ids = manifest_field(section, key, list)
    if any(type(token_id) is not int for token_id in ids):
        raise UserError(f"manifest: tokenizer {key!r} is {ids!r}; expected token ids")
    return frozenset(ids)


def manifest_field(section: dict[str, Any], key: str, *types: type) -> Any:
    if key not in section:
        raise UserError(f"manifest: the tokenizer section has no {key!r}; export the bundle again")
    value = section[key]
    if not isinstance(value, types):
        expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise UserError(f"manifest: tokenizer {key!r} is {value!r}; expected {expected}")
    return value
