"""Text to token ids and back, with nothing but the `tokenizers` package.

A bundle holds a `tokenizer.json` and a section of its manifest that says what that file leaves open. Two families
are known: `sentencepiece` (Llama, Vicuna) and `byte_level` (byte-level BPE: SmolLM2, Qwen, Llama 3).

The yardstick is the tokenizer the original model was trained with: for SentencePiece, transformers' Python
`LlamaTokenizer` (4.39) with skip_special_tokens=True; for byte-level BPE, the `tokenizers` package. That package alone
falls short of the first, which is why there is a layer here: it leaves out the prefix space where a text already opens
with a space, and its decoder turns a whole run of byte pieces into U+FFFD where SentencePiece
(`SentencePieceProcessor::Decode`) spoils only the bytes at fault. Nor does it decode token by token the way it decodes
the whole. transformers' `clean_up_tokenization_spaces`, which takes the spaces before punctuation out of an answer, is
not applied: it is off for Llama, and it would also undo spaces the model meant.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from runtime.errors import UserError
from runtime.prompt import IMAGE_PLACEHOLDER

SPACE = "▁"  # what SentencePiece writes for a space

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACE_EACH_BYTE = "runtime.tokenizer.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_REPLACE_EACH_BYTE, _replace_each_byte)


class Tokenizer:
    """The tokenizer of one bundle.

    Attributes:
        bos_token_id: the id put in front of a prompt, None for a model that takes none.
        eos_token_ids: ids that end an answer.
    """

    def __init__(self, path: Path, section: dict[str, Any]):
        """Loads the tokenizer.

        Args:
            path: the `tokenizer.json`.
            section: the manifest's tokenizer section, as `export.tokenizer.export_tokenizer` returned it.

        Raises:
            UserError: the file cannot be read, or a key of the section is missing or of the wrong type.
        """
        self._tokenizer = _load(path)
        family = _field(section, "family", str)
        self.bos_token_id: int | None = _field(section, "bos_token_id", int, type(None))
        self.eos_token_ids, self._special_ids = (_ids(section, name) for name in ("eos_token_ids", "special_ids"))
        self._prefix: str | None = None
        if family == "byte_level":
            self._pieces: _ByteLevelPieces | _SentencePiecePieces = _ByteLevelPieces(self._tokenizer, self._special_ids)
        elif family == "sentencepiece":
            self._prefix = _field(section, "prefix", str, type(None))
            self._space_id = self._tokenizer.token_to_id(SPACE)
            self._pieces = _SentencePiecePieces(self._tokenizer, self._special_ids, section)
        else:
            raise UserError(f"tokenizer: family {family!r} is unknown; expected 'sentencepiece' or 'byte_level'")

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text that stands on its own; special tokens written in it become their ids.

        Args:
            text: any text, without image placeholders.
            bos: put the BOS id in front, for a model that takes one.

        Raises:
            UserError: the text holds a lone surrogate, which no encoding can represent.
        """
        front = [self.bos_token_id] if bos and self.bos_token_id is not None else []
        return front + self._encode_opening(text)

    def encode_prompt(self, text: str, image_tokens: list[int], continued: bool = False) -> list[int]:
        """Token ids of a prompt with images.

        The text between two `<image>` placeholders is tokenised on its own, as LLaVA's tokenizer_image_token does.
        In place of the placeholders stand negative ids that number the rows of the image embeds: -1, -2, ... over all
        images of this prompt together.

        Args:
            text: the rendered prompt.
            image_tokens: embeds (visual tokens) of each image, in the order of the placeholders.
            continued: the text goes on from tokens that are already in the KV cache, so it gets neither BOS nor
                prefix space. The ids are those of the same stretch of the whole conversation where the text opens
                with a special token, as the end of an answer does.

        Raises:
            UserError: the number of placeholders is not the number of images, or the text cannot be encoded.
        """
        first, *others = text.split(IMAGE_PLACEHOLDER)
        if len(others) != len(image_tokens):
            raise UserError(
                f"prompt: {len(others)} {IMAGE_PLACEHOLDER} placeholder(s) in the text for {len(image_tokens)} image(s)"
            )
        ids = self._encode_continued(first) if continued else self.encode(first)
        embed = 0
        for count, chunk in zip(image_tokens, others, strict=True):
            ids.extend(range(-embed - 1, -embed - 1 - count, -1))
            ids.extend(self._encode_opening(chunk))
            embed += count
        return ids

    def detokenizer(self) -> "Detokenizer":
        """A fresh detokenizer, for one answer."""
        if isinstance(self._pieces, _ByteLevelPieces):
            return _ByteLevelDetokenizer(self._pieces)
        return _SentencePieceDetokenizer(self._pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole answer; special tokens and ids outside the vocabulary have none."""
        detokenizer = self.detokenizer()
        return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, wherever it is: a space before a word included, and perhaps not whole characters.
        b"" for special tokens."""
        return self._pieces.bytes_of(token_id)

    def _encode_opening(self, text: str) -> list[int]:
        """Ids of a text the original would tokenise in a call of its own."""
        if self._prefix is None or not text:
            return self._encode(text).ids
        text = self._prefix + text.replace(SPACE, " ")
        encoding = self._encode(text)
        return encoding.ids[1:] if self._opens_with_special_token(encoding, text) else encoding.ids

    def _opens_with_special_token(self, encoding: tokenizers.Encoding, text: str) -> bool:
        """Whether nothing but a space comes before the first special token: the original takes that space back."""
        space, token_id = [*encoding.ids, None, None][:2]
        if space != self._space_id or token_id not in self._special_ids:
            return False
        # An unknown character has the id of a special token too, but is not written like one.
        start, end = encoding.offsets[1]
        return self._tokenizer.id_to_token(token_id) in text[start:end]

    def _encode_continued(self, text: str) -> list[int]:
        """Ids of a text that goes on in the middle of one."""
        return self._encode(text if self._prefix is None else text.replace(SPACE, " ")).ids

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = text[error.start]
            raise UserError(f"prompt: {found!r} is a lone surrogate; expected valid Unicode") from None
        return self._tokenizer.encode(text, add_special_tokens=False)


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


class _ByteLevelDetokenizer(Detokenizer):
    def __init__(self, pieces: "_ByteLevelPieces"):
        self._pieces = pieces
        # Python's "replace" groups invalid bytes as Rust's from_utf8_lossy does, one U+FFFD per maximal subpart.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._pieces[token_id])

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePieceDetokenizer(Detokenizer):
    """LlamaTokenizer.decode as a state machine.

    Added tokens cut the answer into segments. Each segment is decoded on its own, and segments and added tokens are
    joined with spaces, though a segment without text is joined only once.
    """

    def __init__(self, pieces: "_SentencePiecePieces"):
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(_REPLACE_EACH_BYTE)
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


class _ByteLevelPieces(dict[int, bytes]):
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


class _SentencePiecePieces(dict[int, tuple[str, Any]]):
    """What each id stands for, looked up when first asked for: ("skipped", ""), ("byte", bytes), ("added", content)
    or ("piece", piece with "▁" for spaces)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, special_ids: frozenset[int], section: dict[str, Any]):
        surfaces = _field(section, "surfaces", dict)
        if wrong := [token_id for token_id in surfaces if not token_id.isdecimal()]:
            raise UserError(f"manifest: tokenizer 'surfaces' has {wrong[0]!r}; expected a token's id")
        super().__init__({int(token_id): ("piece", text) for token_id, text in surfaces.items()})
        self.update((i, ("added", token.content)) for i, token in tokenizer.get_added_tokens_decoder().items())
        self.update((token_id, ("skipped", "")) for token_id in special_ids)
        self._tokenizer = tokenizer
        self.strip_first_piece: bool = _field(section, "strip_first_piece", bool)
        self.strip_start: str = _field(section, "strip_start", str)

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


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"tokenizer: {path} cannot be read: {error}") from None
    # Settings of a training run, which a file taken over as it is may carry.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids(section: dict[str, Any], key: str) -> frozenset[int]:
    ids = _field(section, key, list)
    if any(type(token_id) is not int for token_id in ids):
        raise UserError(f"manifest: tokenizer {key!r} is {ids!r}; expected token ids")
    return frozenset(ids)


def _field(section: dict[str, Any], key: str, *types: type) -> Any:
    if key not in section:
        raise UserError(f"manifest: the tokenizer section has no {key!r}; export the bundle again")
    value = section[key]
    if not isinstance(value, types):
        expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise UserError(f"manifest: tokenizer {key!r} is {value!r}; expected {expected}")
    return value
