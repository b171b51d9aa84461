"""The tokenizer of a checkpoint, as the one `tokenizer.json` a bundle holds and the section of its manifest.

A checkpoint comes with a `tokenizer.json` or with a SentencePiece `tokenizer.model`. The first is taken over as it is.
The second is converted, and every conversion is compared with the original before it is handed out.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from export.tokenizer.convert_sentencepiece import build, first_difference
from runtime.text.detokenize import SPACE
from runtime.text.tokenizer import Tokenizer
from train.errors import TokenizerError
from train.model.original_tokenizer import SENTENCEPIECE_FILE, OriginalTokenizer, Piece, special_token
from train.model.tokenizer_files import CheckpointFiles, bos_token_id

TOKENIZER_FILE = "tokenizer.json"
CHATML_TURN_END = "<|im_end|>"


def export_tokenizer(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes the checkpoint's tokenizer to `out/tokenizer.json`.

    Args:
        checkpoint: folder with `tokenizer.json` or `tokenizer.model`, and, as far as there are any,
            `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `config.json` and
            `generation_config.json`.
        out: folder of the bundle the file goes to; made if missing.

    Returns:
        The manifest's tokenizer section, for `runtime.text.tokenizer.Tokenizer`:
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


def _take_over(files: CheckpointFiles, file: Path) -> dict[str, Any]:
    """Writes the checkpoint's tokenizer.json to `file`, unchanged unless it lacks an image token."""
    source = files.folder / TOKENIZER_FILE
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(source))
    except Exception as error:  # tokenizers raises nothing more specific
        raise TokenizerError(f"{source}: cannot be read: {error}") from None
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if missing := [token for token in files.image_tokens() if token not in known]:
        tokenizer.add_special_tokens([special_token(token) for token in missing])
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
    section = _original_section(original, files, tokenizer) | {"prefix": None}
    if first_difference(original, Tokenizer(file, section)) is None:
        return section
    return _convert(files, original, file)


def _space_word_id(tokenizer: tokenizers.Tokenizer) -> int:
    """A piece that is a space and something more."""
    return next(i for piece, i in tokenizer.get_vocab().items() if len(piece) > 1 and piece[0] == SPACE != piece[1])


def _common_section(files: CheckpointFiles, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """The part of the section that does not depend on the family, for a tokenizer.json that was taken over."""
    return {
        "bos_token_id": bos_token_id(files, tokenizer),
        "eos_token_ids": _eos_token_ids(files, tokenizer),
        "special_ids": [i for i, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special],
    }


def _eos_token_ids(files: CheckpointFiles, tokenizer: tokenizers.Tokenizer) -> list[int]:
    """What ends an answer: generate()'s setting, else the tokenizer's, and ChatML's end of a turn in any case.

    The tokenizer's setting comes last because it is about training text, and is wrong for some chat models.
    """
    trained = tokenizer.token_to_id(files.role("eos_token") or "</s>")
    settings = [files.generation.get("eos_token_id"), files.config.get("eos_token_id"), trained]
    setting = next((setting for setting in settings if setting is not None), None)
    ids: list[Any] = setting if isinstance(setting, list) else [setting]
    turn_end = tokenizer.token_to_id(CHATML_TURN_END)
    ids = list(dict.fromkeys(ids if turn_end is None else [*ids, turn_end]))
    for token_id in ids:
        if not isinstance(token_id, int) or token_id < 0 or tokenizer.id_to_token(token_id) is None:
            raise TokenizerError(f"{files.folder}: eos_token_id {token_id!r} is not in the tokenizer's vocabulary")
    return ids


def _original_section(
    original: OriginalTokenizer, files: CheckpointFiles, tokenizer: tokenizers.Tokenizer
) -> dict[str, Any]:
    """For `tokenizer`, which holds the same vocabulary."""
    spec, pieces = original.model.normalizer_spec, original.model.pieces
    texts = {Piece.CONTROL: "", Piece.UNKNOWN: original.model.trainer_spec.unk_surface}
    return {
        "family": "sentencepiece",
        "bos_token_id": original.bos_token_id,
        "eos_token_ids": _eos_token_ids(files, tokenizer),
        "special_ids": original.special_ids,
        "prefix": None if original.legacy else SPACE if original.add_prefix_space else "",
        "strip_first_piece": original.add_prefix_space,
        "strip_start": "every" if spec.remove_extra_whitespaces else "one" if spec.add_dummy_prefix else "none",
        "surfaces": {
            str(i): texts[piece.type]
            for i, piece in enumerate(pieces)
            if piece.type in texts and piece.piece not in original.tokens
        },
    }


def _check_byte_level_decoding(tokenizer: tokenizers.Tokenizer, ours: Tokenizer) -> None:
    rng = random.Random(0)
    vocabulary = range(tokenizer.get_vocab_size())
    samples = [[i] for i in vocabulary] + [rng.choices(vocabulary, k=50) for _ in range(200)]
    for ids in samples:
        expected, found = tokenizer.decode(ids), ours.decode(ids)
        if found != expected:
            raise TokenizerError(f"{TOKENIZER_FILE}: ids {ids} decode to {found!r}, but tokenizers gives {expected!r}")


def _convert(files: CheckpointFiles, original: OriginalTokenizer, file: Path) -> dict[str, Any]:
    """Writes `original` as a tokenizer.json to `file`, checked to give the same ids."""
    tokenizer = build(original)
    tokenizer.save(str(file))
    section = _original_section(original, files, tokenizer)
    if difference := first_difference(original, Tokenizer(file, section)):
        text, expected, found = difference
        raise TokenizerError(
            f"{files.folder / SENTENCEPIECE_FILE}: the converted tokenizer differs from SentencePiece on {text!r}: "
            f"{found}, expected {expected}"
        )
    return section
