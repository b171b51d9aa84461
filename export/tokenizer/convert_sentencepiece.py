"""A SentencePiece model as a `tokenizer.json`.

It is built anew with the `tokenizers` package from the SentencePiece model's own description
(`sentencepiece_model.proto`, `normalizer.cc`, `bpe_model.cc`, `unigram_model.cc`), not with transformers' converter,
whose result differs between its versions and drops the prefix space of a text that opens with a space.
"""

import random
import re

import tokenizers
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec  # pyright: ignore
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from runtime.text.detokenize import SPACE
from runtime.text.tokenizer import Tokenizer
from train.errors import TokenizerError
from train.model.original_tokenizer import OriginalTokenizer, Piece, TrainerSpec

_SENTINEL = "\ue000"  # private use: no text has it, no normalisation changes it


def build(original: OriginalTokenizer) -> tokenizers.Tokenizer:
    """The original as one of `tokenizers`. Raises TokenizerError where an added token's id cannot be kept."""
    model, bpe = original.model, original.model.trainer_spec.model_type == TrainerSpec.BPE
    tokenizer = tokenizers.Tokenizer(_bpe(original) if bpe else _unigram(original))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(model.normalizer_spec, original.legacy))
    symbols = [piece.piece for piece in model.pieces if piece.type == Piece.USER_DEFINED]
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
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}
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
        unk_token=next(piece.piece for piece in model.pieces if piece.type == Piece.UNKNOWN),
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=any(piece.type == Piece.USER_DEFINED for piece in model.pieces),
    )


def _symbols_apart(model: ModelProto, symbols: list[str]) -> pre_tokenizers.PreTokenizer:
    """Cuts user-defined symbols out of the text, which `ignore_merges` then looks up whole.

    An added token would not do: it is cut out before the prefix space gets in front of it. The second cut keeps
    `ignore_merges` from taking text that happens to spell a byte or control piece for one.
    """
    longest_first = sorted(symbols, key=len, reverse=True)
    reserved = [piece.piece for piece in model.pieces if piece.type in (Piece.BYTE, Piece.CONTROL, Piece.UNKNOWN)]
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
    normal = [piece.score for piece in model.pieces if piece.type == Piece.NORMAL]
    losing = min(normal) - 10_000.0
    best = max(0.0, *normal)
    vocabulary = []
    for piece in model.pieces:
        if piece.type == Piece.USER_DEFINED:
            score = len(piece.piece.encode()) * best - 0.1
        else:
            score = piece.score if piece.type == Piece.NORMAL else losing
        vocabulary.append((piece.piece, score))
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == Piece.UNKNOWN)
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.trainer_spec.byte_fallback)


def _normalizers(spec: NormalizerSpec, legacy: bool) -> list[normalizers.Normalizer]:
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


def first_difference(original: OriginalTokenizer, tokenizer: Tokenizer) -> tuple[str, list[int], list[int]] | None:
    """The first text the two give different ids for, with the original's ids and the others."""
    for text in _texts(original):
        expected, found = original.encode(text), tokenizer.encode(text, bos=False)
        if found != expected:
            return text, expected, found
    return None


def _texts(original: OriginalTokenizer) -> list[str]:
    rng = random.Random(0)
    pieces = [piece.piece.replace(SPACE, " ") for piece in original.model.pieces if piece.type == Piece.NORMAL]
    symbols = [piece.piece for piece in original.model.pieces if piece.type == Piece.USER_DEFINED]
    texts = list(_CHECKED_TEXTS)
    texts += [" " * n + "a" + " " * (n + 1) + "b" for n in range(1, 40)]
    texts += ["".join(rng.choices(pieces, k=30)) for _ in range(200)]
    for token in [*original.tokens, *symbols]:
        texts += [token, f"{token}a", f" {token} a", f"a{token}b", f"a {token} b", f"a{token}", f"a  {token}{token}  "]
    return texts
