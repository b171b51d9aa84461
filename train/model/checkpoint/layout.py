"""Checkpoints in the layout that ConvLLaVA's authors released, read and written.

    folder/
      config.json                        LlavaConfig: the language model's shape and the mm_* keys
      *.safetensors | pytorch_model*.bin language model and `model.mm_projector.*`, one file or shards with an index
      tokenizer files
      vision_tower/                      the encoder in Hugging Face's ConvNeXt layout, or elsewhere: `mm_vision_tower`
        config.json, preprocessor_config.json, *.safetensors | pytorch_model*.bin

Weights are read tensor by tensor (memory-mapped), so that one part of a large checkpoint can be taken alone.
"""

import copy
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from train.errors import CheckpointError
from train.model.checkpoint.preprocessor import check_preprocessor, default_preprocessor, pixel_statistics, side_of
from train.model.checkpoint.tensors import (
    HARMLESS,
    WEIGHTS,
    StoredTensor,
    holds_tensors,
    read_json,
    read_tensors,
    weight_files,
)
from train.model.encoder import EncoderConfig
from train.model.names import hf_to_timm

# config.json keys that belong to the Llama decoder; the rest is LLaVA's
LLAMA_KEYS = (  # noqa: SIM905 - a literal would take twenty-three lines
    "attention_bias attention_dropout bos_token_id eos_token_id pad_token_id head_dim hidden_act hidden_size "
    "initializer_range intermediate_size max_position_embeddings mlp_bias num_attention_heads num_hidden_layers "
    "num_key_value_heads pretraining_tp rms_norm_eps rope_parameters rope_scaling rope_theta tie_word_embeddings "
    "use_cache vocab_size"
).split()
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
# Of LLaVA's keys in config.json, and of the encoder's; transformers checks Llama's
TYPES = {
    "mm_vision_resolution": int | None,
    "mm_vision_tower": str | None,
    "mm_projector_type": str,
    "mm_vision_select_layer": int | None,
    "mm_use_im_start_end": bool | None,
    "image_aspect_ratio": str | None,
    "conversation_template": str,
    "conversation_system": str,
}
VISION_TYPES = dict.fromkeys(("layer_scale_init_value", "drop_path_rate", "norm_eps"), int | float)
log = logging.getLogger("convllava.checkpoint")
PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What may stand before a Hugging Face ConvNeXt's own names: LLaVA's module, transformers' ConvNeXt with a head
TOWER_PREFIX = re.compile(r"(model\.vision_tower\.)?(vision_tower\.)?(convnext\.)?")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its configurations and folders. No weight has been read yet.

    folder: the checkpoint; vision_folder: its encoder (may lie elsewhere).
    config, vision_config, preprocessor: the JSON files as they are; a preprocessor that is missing has the release's
    own settings.
    """

    folder: Path
    vision_folder: Path
    config: dict
    vision_config: dict
    preprocessor: dict

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """`source`: a folder or a Hub id. Raises CheckpointError if a file is missing or is not what it should be."""
        folder = folder_or_hub(str(source))
        refuse_parts(folder)
        config = read_json(folder / "config.json")
        if (kind := config.get("model_type")) != "llava_llama":
            raise CheckpointError(
                f"{folder / 'config.json'}: model_type is {kind!r}, expected 'llava_llama': give a checkpoint in the "
                "layout that ConvLLaVA was released in"
            )
        _check_types(config, TYPES, folder / "config.json")
        vision_folder = _find_vision_folder(folder, config)
        vision_config, file = read_json(vision_folder / "config.json"), vision_folder / "preprocessor_config.json"
        preprocessor = read_json(file) if file.exists() else default_preprocessor(config, vision_config, file)
        checkpoint = cls(folder, vision_folder, config, vision_config, preprocessor)
        check_preprocessor(checkpoint.preprocessor, file, checkpoint.squares)
        return checkpoint

    @property
    def encoder_config(self) -> EncoderConfig:
        """Raises CheckpointError where the vision configuration is not a ConvNeXt this encoder can be."""
        file, vision = self.vision_folder / "config.json", self.vision_config
        fixed = {
            "model_type": "convnext",
            "hidden_act": "gelu",
            "num_channels": 3,
            "patch_size": EncoderConfig.patch_size,
        }
        for key, value in fixed.items():
            if (found := vision.get(key, value)) != value:
                raise CheckpointError(f"{file}: {key} is {found!r}, expected {value!r}: no other encoder is supported")
        _check_types(vision, VISION_TYPES, file)
        for key in ("depths", "hidden_sizes"):
            if key in vision and not _is_counts(vision[key]):
                raise CheckpointError(f"{file}: {key} is {vision[key]!r}, expected a list of whole numbers above 0")
        try:
            if (stages := vision.get("num_stages", len(vision["depths"]))) != len(vision["depths"]):
                raise ValueError(f"num_stages is {stages}, but depths are {vision['depths']}")
            return EncoderConfig(
                depths=tuple(vision["depths"]),
                widths=tuple(vision["hidden_sizes"]),
                layer_scale=vision.get("layer_scale_init_value", 1e-6),
                drop_path_rate=vision.get("drop_path_rate", 0.0),
                norm_eps=vision.get("norm_eps", 1e-6),
                skip_last_block=self.config.get("mm_vision_select_layer", -1) == -2,
            )
        except KeyError as error:
            raise CheckpointError(f"{file}: no key {error}, which a ConvNeXt configuration has") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}") from None

    @property
    def llama_config(self) -> LlamaConfig:
        """The decoder's shape; an absent key has Llama's default, as in the original. Raises CheckpointError."""
        keys = {key: copy.deepcopy(self.config[key]) for key in LLAMA_KEYS if key in self.config}
        try:
            if rope := keys.pop("rope_parameters", None):  # transformers 5's spelling of the two that both 4 and 5 read
                keys["rope_theta"] = rope.pop("rope_theta", 10000.0)
                keys["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
            return LlamaConfig(**keys)
        except Exception as error:  # transformers 4 and 5 raise different ones
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.folder / 'config.json'}: not a Llama's configuration: {reason}") from error

    @property
    def resolution(self) -> int:
        """Default side of the square input, pixels. As in the original, `mm_vision_resolution` counts above 256."""
        configured = self.config.get("mm_vision_resolution") or 256
        if configured > 256:
            return configured
        return side_of(self.preprocessor, self.vision_folder / "preprocessor_config.json", self.squares)

    @property
    def squares(self) -> bool:
        """Whether images are padded to a square, or sized as the encoder wants them, rather than cropped."""
        return self.config.get("image_aspect_ratio") in ("pad", "any")

    @property
    def pixel_statistics(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation of each channel, of pixels from 0 to 1; CLIP's where the preprocessor has none,
        as in the original."""
        return pixel_statistics(self.preprocessor, self.vision_folder / "preprocessor_config.json")

    @property
    def projector_type(self) -> str:
        return self.config.get("mm_projector_type", "linear")

    def language_tensors(self) -> Iterator[StoredTensor]:
        """Those of the decoder, under Llama's own names."""
        for key, tensor, file in read_tensors(self.folder):
            if not key.startswith((PROJECTOR, TOWER)) and not HARMLESS.search(key):
                yield StoredTensor(key, key, tensor, file)

    def projector_tensors(self) -> Iterator[StoredTensor]:
        for key, tensor, file in read_tensors(self.folder, PROJECTOR):
            yield StoredTensor(key.removeprefix(PROJECTOR), key, tensor, file)

    def vision_tensors(self) -> Iterator[StoredTensor]:
        """Those of the encoder under timm's names, from its own folder or else from the main files.

        The pooler's `layernorm`, which the model does not use, is left out; it may have the size of the fourth stage or
        of the fifth.
        """
        folder, prefix = self.vision_source
        config, found = self.encoder_config, False
        pooler = [(width,) for width in config.widths[3:]]
        unused_block = f"stages.{len(config.depths) - 1}.blocks.{config.depths[-1] - 1}."
        for key, tensor, file in read_tensors(folder, prefix):
            found, bare = True, TOWER_PREFIX.sub("", key, count=1)
            if bare in ("layernorm.weight", "layernorm.bias"):
                if tensor.shape not in pooler:
                    expected = " or ".join(map(str, pooler))
                    raise CheckpointError(
                        f"{file}: wrong shape of {key}: expected {expected}, found {tuple(tensor.shape)}"
                    )
                continue
            try:
                name = hf_to_timm(bare)
            except KeyError:
                name = None
            if not (config.skip_last_block and name and name.startswith(unused_block)):
                yield StoredTensor(name, key, tensor, file)
        if not found:
            raise CheckpointError(
                f"{self.vision_folder}: no encoder weights, expected {WEIGHTS[0]}, {WEIGHTS[2]} or shards of one, or "
                f"keys {TOWER}* in the files of {self.folder}"
            )

    @cached_property
    def vision_source(self) -> tuple[Path, str]:
        """The folder whose files hold the encoder's weights, and what their keys begin with there.

        As in the original, the encoder's own folder counts where both have some; a log line says so.
        """
        if not (own := weight_files(self.vision_folder)):
            return self.folder, TOWER
        if holds_tensors(self.folder, TOWER):
            log.warning(
                "encoder weights are stored twice: those of %s are used, those of %s (%s*) are not",
                own,
                weight_files(self.folder),
                TOWER,
            )
        return self.vision_folder, ""


def folder_or_hub(source: str) -> Path:
    """The folder `source`, or that of the Hub id, fetched first. Raises CheckpointError."""
    folder = Path(os.path.expanduser(source))  # unlike Path's own, it lets an unknown ~user be
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise CheckpointError(f"{source}: no such folder, and not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.bin", "*.model"]  # in vision_tower/ too: * goes past a slash here
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{source}: no such folder, and the Hub gave none: {reason}") from error


def _check_types(content: dict, types: dict[str, Any], file: Path) -> None:
    for key, kind in types.items():
        value = content.get(key)
        if key in content and (
            not isinstance(value, kind) or (isinstance(value, bool) and key != "mm_use_im_start_end")
        ):
            expected = getattr(kind, "__name__", str(kind))
            raise CheckpointError(f"{file}: {key} is {value!r}, expected {expected}")


def _is_counts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is int and value > 0 for value in values)


def refuse_parts(folder: Path) -> None:
    """Raises CheckpointError for what training with LoRA, or of the projector alone, leaves: no whole model."""

    def found(*names: str) -> str:
        return ", ".join(name for name in names if (folder / name).is_file())

    if (folder / "adapter_config.json").is_file():
        weights = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin")
        files = found("adapter_config.json", *weights)
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{folder}: LoRA adapters ({files}), no whole model; merge them into their base model"
            f"{f' {base}' if base else ''} (peft's merge_and_unload, LLaVA's merge_lora_weights.py) and give the result"
        )
    if not weight_files(folder) and (files := found("mm_projector.bin", "mm_projector.safetensors")):
        raise CheckpointError(
            f"{folder}: a projector ({files}), no whole model; give the checkpoint of the stage after it, or one with "
            "the language model's weights and these together"
        )


def _find_vision_folder(folder: Path, config: dict) -> Path:
    """Inside the checkpoint, else where `mm_vision_tower` says: a path, or a Hub id.

    Inside comes first: the key of a freshly trained checkpoint still names the encoder that its training began with.
    """
    name = config.get("mm_vision_tower")
    inside = [folder / "vision_tower"]
    if name and not Path(name).is_absolute():
        inside.insert(0, folder / name)
    for candidate in inside:
        if candidate != folder and (candidate / "config.json").is_file():
            return candidate
    if not name:
        raise CheckpointError(
            f"{folder}: no vision_tower/config.json inside and no mm_vision_tower in config.json, one of which has to "
            "say where the encoder is"
        )
    try:
        return folder_or_hub(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: mm_vision_tower: {error}; put the encoder into {folder / 'vision_tower'}, or "
            "its folder or Hub id here"
        ) from error
