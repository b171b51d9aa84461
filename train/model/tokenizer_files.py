"""The JSON files around a checkpoint's tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from train.errors import TokenizerError

CHATML_TURN_START = "<|im_start|>"


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

    def role(self, name: str) -> str | None:
        """The token with a role such as "bos_token"."""
        return content_of(self.tokenizer.get(name, self.special.get(name)))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def content_of(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def bos_token_id(files: CheckpointFiles, tokenizer: tokenizers.Tokenizer) -> int | None:
    """The token put in front of a text: tokenizer_config.json's word, else what the post-processor adds.

    Raises:
        TokenizerError: the post-processor adds more than one.
    """
    if "add_bos_token" in files.tokenizer:
        bos = files.role("bos_token") if files.tokenizer["add_bos_token"] else None
        token_id = None if bos is None else tokenizer.token_to_id(bos)
    else:
        bare, full = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
        front = full[: len(full) - len(bare)]
        if len(front) > 1 or front + bare != full:
            raise TokenizerError(f"{files.folder}: tokenizer.json adds more than one BOS to a text: {full} for {bare}")
        token_id = front[0] if front else None
    # Where BOS also opens each turn of a chat, the prompt template writes it, and a second one would open no turn
    return None if token_id == tokenizer.token_to_id(CHATML_TURN_START) else token_id
