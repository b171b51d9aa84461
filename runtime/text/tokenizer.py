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
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from runtime.errors import UserError
from runtime.text.detokenize import (
    REPLACE_EACH_BYTE,
    SPACE,
    ByteLevelDetokenizer,
    ByteLevelPieces,
    Detokenizer,
    SentencePieceDetokenizer,
    SentencePiecePieces,
    id_list,
    manifest_field,
    replace_each_byte,
)
from runtime.text.template import IMAGE_PLACEHOLDER

logger = logging.getLogger("convllava.text")
codecs.register_error(REPLACE_EACH_BYTE, replace_each_byte)


class Tokenizer:
    """The tokenizer of one bundle.

    Attributes:
        bos_token_id: the id put in front of a prompt, None for a model that takes none.
        eos_token_ids: ids that end an answer.
    """

    def __init__(self, path: Path, section: dict[str, Any], embedding_rows: int | None = None):
        """Loads the tokenizer; warns of tokens that the model has no embedding for.

        Args:
            path: the `tokenizer.json`.
            section: the manifest's tokenizer section, as `export.tokenizer.convert.export_tokenizer` returned it.
            embedding_rows: of the model; token IDs must be below. None: not known.

        Raises:
            UserError: the file cannot be read, a key of the section is missing or of the wrong type, or the model has
                no embedding for the BOS token.
        """
        self._tokenizer = _load(path)
        family = manifest_field(section, "family", str)
        self.bos_token_id: int | None = manifest_field(section, "bos_token_id", int, type(None))
        self.eos_token_ids, self._special_ids = (id_list(section, name) for name in ("eos_token_ids", "special_ids"))
        self._prefix: str | None = None
        if family == "byte_level":
            self._pieces: ByteLevelPieces | SentencePiecePieces = ByteLevelPieces(self._tokenizer, self._special_ids)
        elif family == "sentencepiece":
            self._prefix = manifest_field(section, "prefix", str, type(None))
            self._space_id = self._tokenizer.token_to_id(SPACE)
            self._pieces = SentencePiecePieces(self._tokenizer, self._special_ids, section)
        else:
            raise UserError(f"tokenizer: family {family!r} is unknown; expected 'sentencepiece' or 'byte_level'")
        self._embedding_rows = embedding_rows
        if missing := self.without_embedding():
            if self.bos_token_id in missing:
                raise UserError(f"tokenizer: {self._without_embedding(self.bos_token_id)}, and it opens every prompt")
            first, count = self._without_embedding(missing[0]), len(missing)
            logger.warning("tokenizer: %s; prompts with this or another such token (%d) are refused", first, count)

    def without_embedding(self) -> list[int]:
        """IDs of tokens beyond the rows of the model's embedding."""
        tokenizer = self._tokenizer
        end = max([tokenizer.get_vocab_size() - 1, *tokenizer.get_added_tokens_decoder()]) + 1
        candidates = range(end if self._embedding_rows is None else self._embedding_rows, end)
        return [token_id for token_id in candidates if tokenizer.id_to_token(token_id) is not None]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text that stands on its own; special tokens written in it become their ids.

        Args:
            text: any text, without image placeholders.
            bos: put the BOS id in front, for a model that takes one.

        Raises:
            UserError: the text holds a lone surrogate, which no encoding can represent, or a token that the model has
                no embedding for.
        """
        front = [self.bos_token_id] if bos and self.bos_token_id is not None else []
        return self._checked(front + self._encode_opening(text))

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
        return self._checked(ids)

    def detokenizer(self) -> "Detokenizer":
        """A fresh detokenizer, for one answer."""
        if isinstance(self._pieces, ByteLevelPieces):
            return ByteLevelDetokenizer(self._pieces)
        return SentencePieceDetokenizer(self._pieces)

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
        try:
            [encoding] = self._tokenizer.encode_batch([text], add_special_tokens=False)  # `encode` would keep the GIL
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"prompt: it cannot be tokenized: {error}") from error
        return encoding

    def _checked(self, ids: list[int]) -> list[int]:
        if self._embedding_rows is not None and (most := max(ids, default=0)) >= self._embedding_rows:
            raise UserError(f"prompt: {self._without_embedding(most)}")
        return ids

    def _without_embedding(self, token_id: int) -> str:
        token = self._tokenizer.id_to_token(token_id)
        return f"token {token!r} has ID {token_id}, the model's embedding has {self._embedding_rows} rows"


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"tokenizer: {path} cannot be read: {error}") from None
    # Settings of a training run, which a file taken over as it is may carry.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
