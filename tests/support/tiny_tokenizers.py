"""Tokenizers trained for the tests in a fraction of a second, and checkpoints that hold them."""

import io
import json
from pathlib import Path

import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from export.tokenizer.convert import export_tokenizer
from runtime.text.tokenizer import Tokenizer

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "USER: What is the total amount? ASSISTANT: It is 1,234.50 < 2,000 > 12, or 0x7CF.",
    "def f(x):\n    return {k: v for k, v in x.items()}  # indented\n",
    "Le café est à côté de la naïve forêt;    four spaces, 你好世界",
] * 4
LLAMA_LIKE = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SYMBOLS = {"user_defined_symbols": ["<foo>", "<foo bar>", "ab"], "control_symbols": ["<ctl>"]}
MODELS = {
    "bpe": {"model_type": "bpe", "vocab_size": 500, **LLAMA_LIKE},
    "bpe, runs of spaces": {"model_type": "bpe", "vocab_size": 500, "allow_whitespace_only_pieces": True, **LLAMA_LIKE},
    "bpe, symbols": {"model_type": "bpe", "vocab_size": 500, **LLAMA_LIKE, **SYMBOLS},
    "bpe, no prefix": {"model_type": "bpe", "vocab_size": 500, "add_dummy_prefix": False, **LLAMA_LIKE},
    "bpe, normalised": {"model_type": "bpe", "vocab_size": 250, **SYMBOLS},
    "unigram": {"model_type": "unigram", "vocab_size": 450, **LLAMA_LIKE, **SYMBOLS},
    "unigram, normalised": {"model_type": "unigram", "vocab_size": 200},
}
FRAGMENTS = [
    *(
        "hello",
        " ",
        "  ",
        "    ",
        "\n",
        "\t",
        "▁",
        "a",
        "é",
        "e\u0301",
        "你好",
        "😀",
        "👩‍👩‍👧",
        "\x00",
        "\x7f",
        "\u3000",
        "ﬁ",
    ),
    *("<foo>", "<foo bar>", "abab", "<ctl>", "<0x41>", "<", "</", "USER:", " ASSISTANT:", "1,234.50", "return", "."),
]
SPECIAL_TOKENS = ["<s>", "</s>", "<unk>", "<pad>", "<tool>", "<strip>"]


def texts(*fragments: str) -> st.SearchStrategy[str]:
    """Texts put together of FRAGMENTS and of those given."""
    return st.lists(st.sampled_from([*FRAGMENTS, *fragments]), max_size=8).map("".join)


def train_sentencepiece(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


def train_byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_checkpoint(folder: Path, model: bytes, legacy: bool = False) -> Path:
    """A Llama-like checkpoint with a SentencePiece model and little else."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model)
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=legacy)
    change(folder / "config.json", model_type="llama", bos_token_id=1, eos_token_id=2)
    return folder


def add_tokens(checkpoint: Path, size: int) -> None:
    """Put two special tokens and an ordinary one beyond the vocabulary's `size` pieces."""
    added = [entry("<unk>"), entry("<s>"), entry("</s>")]
    added += [entry("<pad>"), entry("<tool>", special=False), entry("<strip>", lstrip=True, rstrip=True)]
    ids = [0, 1, 2, size, size + 1, size + 2]
    change(
        checkpoint / "tokenizer_config.json",
        pad_token="<pad>",
        additional_special_tokens=["<strip>"],
        added_tokens_decoder=dict(zip(map(str, ids), added, strict=True)),
    )


def entry(content: str, special: bool = True, **flags: bool) -> dict:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, "special": special, **plain, **flags}


def change(file: Path, **values) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))


def export_and_load(checkpoint: Path, out: Path) -> tuple[dict, Tokenizer]:
    section = json.loads(json.dumps(export_tokenizer(checkpoint, out)))
    return section, Tokenizer(out / "tokenizer.json", section)
