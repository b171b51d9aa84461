"""The tokenizer of a checkpoint, as the one `tokenizer.json` a bundle holds and the section of its manifest.

A checkpoint comes with a `tokenizer.json` or with a SentencePiece `tokenizer.model`. The first is taken over as it is.
The second is built anew with the `tokenizers` package from the SentencePiece model's own description
(`sentencepiece_model.proto`, `normalizer.cc`, `bpe_model.cc`, `unigram_model.cc`), not with transformers' converter,
whose result differs between its versions and drops the prefix space of a text that opens with a space.

The yardstick is what ConvLLaVA (`llava/model/builder.py`) loads: transformers' Python LlamaTokenizer of version 4.39,
which later versions do not have any more. `OriginalTokenizer` restates how it encodes, on top of the `sentencepiece`
package, and every conversion is compared with it before it is handed out.
"""

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from runtime.tokenizer import SPACE, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CHATML_TURN_START, CHATML_TURN_END = "<|im_start|>", "<|im_end|>"

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
_SENTINEL = "\ue000"  # private use: no text has it, no normalisation changes it


class TokenizerError(ValueError):
    """A tokenizer that cannot be exported; the message says what was looked for or what differs."""


def export_tokenizer(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes the checkpoint's tokenizer to `out/tokenizer.json`.

    Args:
        checkpoint: folder with `tokenizer.json` or `tokenizer.model`, and, as far as there are any,
            `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `config.json` and
            `generation_config.json`.
        out: folder of the bundle the file goes to; made if missing.

    Returns:
        The manifest's tokenizer section, for `runtime.tokenizer.Tokenizer`:
            file: path of the tokenizer.json in the bundle, whose folder `out` is in.
            family: "sentencepiece" or "byte_level".
            bos_token_id: id in front of a prompt, or None.
            eos_token_ids: ids that end an answer.
            special_ids: ids that have no text.
        and for "sentencepiece" also:
            prefix: string in front of each text that is tokenised on its own; None where tokenizer.json sees to it.
            strip_first_piece: whether an answer's first piece loses its leading space.
            strip_start: which leading spaces SentencePiece itself drops after that: "none", "one", "every".
            surfaces: id -> text, where that is not the piece itself.

    Raises:
        TokenizerError: no tokenizer, one that cannot be read or is of an unknown kind, or a conversion that does not
            give the original's ids.
    """
    files = CheckpointFiles.read(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    file = out / TOKENIZER_FILE
    if (checkpoint / TOKENIZER_FILE).is_file():
        section = _take_over(files, file)
    elif (checkpoint / SENTENCEPIECE_FILE).is_file():
        section = _convert(files, OriginalTokenizer.load(files), file)
    else:
        raise TokenizerError(f"{checkpoint}: no tokenizer; expected {TOKENIZER_FILE} or {SENTENCEPIECE_FILE}")
    return {"file": f"{out.name}/{TOKENIZER_FILE}", **section}


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


def _take_over(files: CheckpointFiles, file: Path) -> dict[str, Any]:
    """Writes the checkpoint's tokenizer.json to `file`, unchanged unless it lacks an image token."""
    source = files.folder / TOKENIZER_FILE
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(source))
    except Exception as error:  # tokenizers raises nothing more specific
        raise TokenizerError(f"{source}: cannot be read: {error}") from None
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if missing := [token for token in files.image_tokens() if token not in known]:
        tokenizer.add_special_tokens([_special_token(token) for token in missing])
        tokenizer.save(str(file))
    else:
        shutil.copyfile(source, file)
    decoder = json.dumps(json.loads(tokenizer.to_str())["decoder"], ensure_ascii=False)
    if '"ByteLevel"' in decoder:
        return _byte_level_section(files, tokenizer, file)
    if SPACE in decoder:
        return _sentencepiece_section(files, tokenizer, file)
    raise TokenizerError(f"{source}: neither byte-level nor SentencePiece; its decoder is {decoder}")


def _byte_level_section(files: CheckpointFiles, tokenizer: tokenizers.Tokenizer, file: Path) -> dict[str, Any]:
    section = {"family": "byte_level", **_common_section(files, tokenizer)}
    _check_byte_level_decoding(tokenizer, Tokenizer(file, section))
    return section


def _sentencepiece_section(files: CheckpointFiles, tokenizer: tokenizers.Tokenizer, file: Path) -> dict[str, Any]:
    """For a tokenizer.json made from a SentencePiece model. Where that model lies beside it, it is what the original
    reads, so a tokenizer.json that gives other ids is replaced with one converted from it."""
    try:
        original = OriginalTokenizer.load(files)
    except TokenizerError:
        return {
            "family": "sentencepiece",
            **_common_section(files, tokenizer),
            "prefix": None,
            "strip_first_piece": not tokenizer.decode([_space_word_id(tokenizer)]).startswith(" "),
            "strip_start": "none",
            "surfaces": {},
        }
    section = original.section(files, tokenizer) | {"prefix": None}
    if _first_difference(original, Tokenizer(file, section)) is None:
        return section
    return _convert(files, original, file)


def _space_word_id(tokenizer: tokenizers.Tokenizer) -> int:
    """A piece that is a space and something more."""
    return next(i for piece, i in tokenizer.get_vocab().items() if len(piece) > 1 and piece[0] == SPACE != piece[1])


def _common_section(files: CheckpointFiles, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The part of the section that does not depend on the family, for a tokenizer.json that was taken over."""
    return {
        "bos_token_id": _bos_token_id(files, tokenizer),
        "eos_token_ids": files.eos_token_ids(tokenizer),
        "special_ids": [i for i, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special],
    }


def _bos_token_id(files: CheckpointFiles, tokenizer: tokenizers.Tokenizer) -> int | None:
    """tokenizer_config.json's word, else what the post-processor puts in front."""
    if "add_bos_token" in files.tokenizer:
        bos = files.role("bos_token") if files.tokenizer["add_bos_token"] else None
        token_id = None if bos is None else tokenizer.token_to_id(bos)
    else:
        bare = tokenizer.encode("a", add_special_tokens=False).ids
        full = tokenizer.encode("a").ids
        front = full[: len(full) - len(bare)]
        if len(front) > 1 or front + bare != full:
            raise TokenizerError(
                f"{files.folder}: {TOKENIZER_FILE} adds more than one BOS to a text: {full} for {bare}"
            )
        token_id = front[0] if front else None
    # Where BOS also opens each turn of a chat, the prompt template writes it, and a second one would open no turn.
    return None if token_id == tokenizer.token_to_id(CHATML_TURN_START) else token_id


def _check_byte_level_decoding(tokenizer: tokenizers.Tokenizer, ours: Tokenizer) -> None:
    rng = random.Random(0)
    vocabulary = range(tokenizer.get_vocab_size())
    samples = [[i] for i in vocabulary] + [rng.choices(vocabulary, k=50) for _ in range(200)]
    for ids in samples:
        expected, found = tokenizer.decode(ids), ours.decode(ids)
        if found != expected:
            raise TokenizerError(f"{TOKENIZER_FILE}: ids {ids} decode to {found!r}, but tokenizers gives {expected!r}")


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


def _special_token(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


def _added_token(token: str | dict[str, Any], special: bool) -> AddedToken:
    # The original matches added tokens in the text as it came, whatever their entry says of normalisation.
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=False)
    if token.get("single_word"):
        raise TokenizerError(f"added token {token['content']!r}: single_word is not supported")
    lstrip, rstrip = token.get("lstrip", False), token.get("rstrip", False)
    return AddedToken(token["content"], special=special, normalized=False, lstrip=lstrip, rstrip=rstrip)


def _convert(files: CheckpointFiles, original: OriginalTokenizer, file: Path) -> dict[str, Any]:
    """Writes `original` as a tokenizer.json to `file`, checked to give the same ids."""
    tokenizer = _build(original)
    tokenizer.save(str(file))
    section = original.section(files, tokenizer)
    if difference := _first_difference(original, Tokenizer(file, section)):
        text, expected, found = difference
        raise TokenizerError(
            f"{files.folder / SENTENCEPIECE_FILE}: the converted tokenizer differs from SentencePiece on {text!r}: "
            f"{found}, expected {expected}"
        )
    return section


def _build(original: OriginalTokenizer) -> tokenizers.Tokenizer:
    model, bpe = original.model, original.model.trainer_spec.model_type == _TrainerSpec.BPE
    tokenizer = tokenizers.Tokenizer(_bpe(original) if bpe else _unigram(original))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model.normalizer_spec, original.legacy))
    symbols = [piece.piece for piece in model.pieces if piece.type == _Piece.USER_DEFINED]
    if bpe and symbols:
        tokenizer.pre_tokenizer = _symbols_apart(model, symbols)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if original.add_prefix_space else [])
    )
    tokenizer.add_tokens([token for _, token in sorted(original.tokens.values(), key=lambda entry: entry[0])])
    for content, (token_id, _) in original.tokens.items():
        if tokenizer.token_to_id(content) != token_id:
            raise TokenizerError(f"added token {content!r}: id {token_id} cannot be kept")
    return tokenizer


def _bpe(original: OriginalTokenizer) -> models.BPE:
    """SentencePiece merges the neighbours whose joint piece scores highest; `tokenizers` wants those pairs listed."""
    model = original.model
    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    vocabulary |= {content: token_id for content, (token_id, _) in original.tokens.items()}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _Piece.NORMAL}
    merges = [
        (score, left, right)
        for piece, score in scores.items()
        for cut in range(len(piece) - 1, 0, -1)
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    merges.sort(key=lambda merge: -merge[0])
    return models.BPE(
        vocabulary,
        [(left, right) for _, left, right in merges],
        unk_token=next(piece.piece for piece in model.pieces if piece.type == _Piece.UNKNOWN),
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=any(piece.type == _Piece.USER_DEFINED for piece in model.pieces),
    )


def _symbols_apart(model: sentencepiece_model_pb2.ModelProto, symbols: list[str]) -> pre_tokenizers.PreTokenizer:
    """Cuts user-defined symbols out of the text, which `ignore_merges` then looks up whole.

    An added token would not do: it is cut out before the prefix space gets in front of it. The second cut keeps
    `ignore_merges` from taking text that happens to spell a byte or control piece for one.
    """
    longest_first = sorted(symbols, key=len, reverse=True)
    reserved = [piece.piece for piece in model.pieces if piece.type in (_Piece.BYTE, _Piece.CONTROL, _Piece.UNKNOWN)]
    spelled_out = [rf"\A{re.escape(piece[0])}(?={re.escape(piece[1:])}\z)" for piece in reserved]
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated"),
            pre_tokenizers.Split(Regex("|".join(spelled_out)), "isolated"),
        ]
    )


def _unigram(original: OriginalTokenizer) -> models.Unigram:
    """Scores decide alone here, so pieces that never stand for text get one that loses to any known characters.

    SentencePiece adds up in float32, `tokenizers` in float64. Where two ways to cut a text have equal scores, such as
    "000" into "0" and "00", rounding decides, and the two may differ.
    """
    model = original.model
    normal = [piece.score for piece in model.pieces if piece.type == _Piece.NORMAL]
    losing = min(normal) - 10_000.0
    best = max(0.0, *normal)
    vocabulary = []
    for piece in model.pieces:
        if piece.type == _Piece.USER_DEFINED:
            score = len(piece.piece.encode()) * best - 0.1
        else:
            score = piece.score if piece.type == _Piece.NORMAL else losing
        vocabulary.append((piece.piece, score))
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == _Piece.UNKNOWN)
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.trainer_spec.byte_fallback)


def _normalizers(spec: sentencepiece_model_pb2.NormalizerSpec, legacy: bool) -> list[normalizers.Normalizer]:
    """SentencePiece's Normalizer::Normalize, applied to each stretch of text between added tokens."""
    charsmap = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    prefix = [normalizers.Prepend(SPACE)] if legacy and spec.add_dummy_prefix else []
    escape = normalizers.Replace(" ", SPACE)
    if not spec.remove_extra_whitespaces:
        return [*prefix, *charsmap, escape]
    strip = [
        normalizers.Replace(Regex(r"\A +"), ""),
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.Replace(Regex(f"[ {SPACE}]+\\z"), ""),
    ]
    if legacy:
        return [*charsmap, *strip, *prefix, escape]
    # A space the text itself opens with is kept (see OriginalTokenizer), one that normalisation made is not.
    guard = [normalizers.Replace(Regex(rf"\A{space}"), _SENTINEL + space) for space in (" ", SPACE)]
    return [*guard, *charsmap, *strip, normalizers.Replace(_SENTINEL, ""), escape]


# What may go wrong between two tokenizers: margins, runs of spaces, bytes for unknown characters, spelled-out pieces
_CHECKED_TEXTS = [
    "",
    "a",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "   three leading, three trailing   ",
    "two  three   four    spaces",
    "\n",
    "\n\nlines\n of\n\n\ntext\n",
    "\ttabs\t\tand\r\nreturns \t ",
    "naïve café, Ångström, żółw, e\u0301 a\u0308\u0301",
    "你好，世界。这是一个测试 今日は、日本語です 한국어",
    "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते",
    "😀 🎉👩‍👩‍👧‍👦🇨🇭 ☃ 𝔘𝔫𝔦",
    "\x00",
    "NUL\x00inside \x00",
    "\x01\x02 \x1b[0m \x7f \x85 \u200b\u00ad\ufeff",
    "no-break\u00a0space, ideographic\u3000space \u3000 \u2003",
    "ﬁ ½ ① Ⅳ ＡＢＣ ㍿ ™",
    "1234567890 3.14159 1,000,000 -42 1e-9 0xFF 2024-01-31",
    "def f(x):\n    return {k: v for k, v in x.items() if v != '\\n'}  # why\n\treturn None\n",
    '<div class="a">&amp;</div> http://example.com/a?b=c&d=%20#e',
    "supercalifragilisticexpialidocious " + "a" * 100 + "ab" * 50,
    "▁",
    "a ▁ literal▁block ▁▁ ",
    "▁▁leading",
    "<0x41> <0x0A><0x> a literal byte piece",
    "A chat between a curious user and an artificial intelligence assistant. USER: hi ASSISTANT: hello</s>USER:",
]


def _first_difference(original: OriginalTokenizer, tokenizer: Tokenizer) -> tuple[str, list[int], list[int]] | None:
    """The first text the two give different ids for, with the original's ids and the others."""
    for text in _texts(original):
        expected, found = original.encode(text), tokenizer.encode(text, bos=False)
        if found != expected:
            return text, expected, found
    return None


def _texts(original: OriginalTokenizer) -> list[str]:
    rng = random.Random(0)
    pieces = [piece.piece.replace(SPACE, " ") for piece in original.model.pieces if piece.type == _Piece.NORMAL]
    symbols = [piece.piece for piece in original.model.pieces if piece.type == _Piece.USER_DEFINED]
    texts = list(_CHECKED_TEXTS)
    texts += [" " * n + "a" + " " * (n + 1) + "b" for n in range(1, 40)]
    texts += ["".join(rng.choices(pieces, k=30)) for _ in range(200)]
    for token in [*original.tokens, *symbols]:
        texts += [token, f"{token}a", f" {token} a", f"a{token}b", f"a {token} b", f"a{token}", f"a  {token}{token}  "]
    return texts
