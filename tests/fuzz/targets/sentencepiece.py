"""SentencePiece models, as training reads them and as an export converts them."""

import random
import shutil
import tempfile
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from export.tokenizer.convert import export_tokenizer
from tests.support.commands import ROOT
from train.data.tokenizer import load_tokenizer

CHECKPOINT = ROOT / "tests" / "data" / "conformance" / "checkpoint"
_TEMPORARY = tempfile.TemporaryDirectory()
_FOLDER = Path(_TEMPORARY.name) / "checkpoint"
_PIECES = ("", "a", "▁", "<0x41>", "<0xZZ>", "</s>", "<unk>", "\0", "\n", " ", "a" * 300, "\U0010ffff")
_SCORES = (0.0, -1.0, 1e38, -1e38, float("nan"), float("inf"), float("-inf"))
_CHARSMAPS = (b"", b"\0", b"\xff" * 8, b"\4\0\0\0\0\0\0\0", b"\0\0\1\0", b"\4\0\0\0\xff\xff\xff\xffa\0")


def seeds() -> list[bytes]:
    _FOLDER.mkdir()
    for file in CHECKPOINT.glob("*.json"):
        shutil.copy(file, _FOLDER)
    plain = (CHECKPOINT / "tokenizer.model").read_bytes()
    unigram = ModelProto.FromString(plain)
    unigram.trainer_spec.model_type = 1
    return [plain, unigram.SerializeToString()]


def mutate(content: bytes, seed: int) -> bytes | None:
    chance, model = random.Random(seed), ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        return None
    for _ in range(chance.choice([1, 2, 8])):
        kind = chance.randrange(6)
        if model.pieces and kind < 4:
            at = chance.randrange(len(model.pieces))
            piece = model.pieces[at]
            if kind == 0:
                piece.piece = chance.choice([*_PIECES, piece.piece * 2, model.pieces[0].piece])
            elif kind == 1:
                piece.type = chance.randrange(1, 7)
            elif kind == 2:
                piece.score = chance.choice(_SCORES)
            else:
                del model.pieces[at : at + chance.choice([1, len(model.pieces)])]
        else:
            spec = chance.choice([model.trainer_spec, model.normalizer_spec, model.denormalizer_spec])
            field = chance.choice(spec.DESCRIPTOR.fields)
            if field.is_repeated:
                continue
            if field.cpp_type == field.CPPTYPE_BOOL:
                setattr(spec, field.name, chance.random() < 0.5)
            elif field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT64):
                setattr(spec, field.name, chance.choice([0, 1, 2, 300, (1 << 31) - 1]))
            elif field.type == field.TYPE_BYTES:
                setattr(spec, field.name, chance.choice(_CHARSMAPS))
            elif field.type == field.TYPE_STRING:
                setattr(spec, field.name, chance.choice(_PIECES))
            elif field.cpp_type == field.CPPTYPE_ENUM:
                setattr(spec, field.name, chance.choice([1, 2, 3, 4]))
    return model.SerializeToString()


def fuzz(content: bytes) -> None:
    (_FOLDER / "tokenizer.model").write_bytes(content)
    load_tokenizer(_FOLDER).encode("Plain text, </s> and <0x41>")
    export_tokenizer(_FOLDER, Path(_TEMPORARY.name) / "out")
