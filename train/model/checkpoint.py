"""Checkpoints in the layout that ConvLLaVA's authors released, read and written.

    folder/
      config.json                        LlavaConfig: the language model's shape and the mm_* keys
      *.safetensors | pytorch_model*.bin language model and `model.mm_projector.*`, one file or shards with an index
      tokenizer files
      vision_tower/                      the encoder in Hugging Face's ConvNeXt layout, or elsewhere: `mm_vision_tower`
        config.json, preprocessor_config.json, *.safetensors | pytorch_model*.bin

Weights are read tensor by tensor (memory-mapped), so that one part of a large checkpoint can be taken alone.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from train.model.convllava import ConvLLaVA, ImageEncoder
from train.model.encoder import ConvNeXtEncoder, EncoderConfig
from train.model.names import hf_to_timm, timm_to_hf
from train.model.projector import build_projector

# Keys that old exporters left in checkpoints and that no module needs
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
# config.json keys that belong to the Llama decoder; the rest is LLaVA's
LLAMA_KEYS = (
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
PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower."


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the message names the file, the key, what was expected and what was found."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its configurations and folders. No weight has been read yet.

    folder: the checkpoint; vision_folder: its encoder (may lie elsewhere).
    config, vision_config, preprocessor: the JSON files as they are.
    """

    folder: Path
    vision_folder: Path
    config: dict
    vision_config: dict
    preprocessor: dict

    @classmethod
    def open(cls, source: str | Path) -> "Checkpoint":
        """`source`: a folder or a Hub id. Raises CheckpointError if a file is missing or is not what it should be."""
        folder = _folder_or_hub(str(source))
        config = _read_json(folder / "config.json")
        if "mm_projector_type" not in config and "mm_vision_tower" not in config:
            raise CheckpointError(
                f"{folder / 'config.json'}: not a LLaVA checkpoint (model_type {config.get('model_type')!r}, no "
                "mm_vision_tower); expected the released ConvLLaVA layout with model_type 'llava_llama'"
            )
        vision_folder = _find_vision_folder(folder, config)
        return cls(
            folder,
            vision_folder,
            config,
            _read_json(vision_folder / "config.json"),
            _read_json(vision_folder / "preprocessor_config.json"),
        )

    @property
    def encoder_config(self) -> EncoderConfig:
        """Raises CheckpointError where the vision configuration is not a ConvNeXt this encoder can be."""
        file, vision = self.vision_folder / "config.json", self.vision_config
        if (act := vision.get("hidden_act", "gelu")) != "gelu":
            raise CheckpointError(f"{file}: hidden_act is {act!r}, expected 'gelu'")
        if (channels := vision.get("num_channels", 3)) != 3:
            raise CheckpointError(f"{file}: num_channels is {channels}, expected 3")
        try:
            return EncoderConfig(
                depths=tuple(vision["depths"]),
                widths=tuple(vision["hidden_sizes"]),
                patch_size=vision.get("patch_size", 4),
                layer_scale=vision.get("layer_scale_init_value", 1e-6),
                drop_path_rate=vision.get("drop_path_rate", 0.0),
                norm_eps=vision.get("norm_eps", 1e-6),
                skip_last_block=self.config.get("mm_vision_select_layer", -1) == -2,
            )
        except KeyError as error:
            raise CheckpointError(f"{file}: no key {error}, which a ConvNeXt configuration has") from None
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from None

    @property
    def llama_config(self) -> LlamaConfig:
        return LlamaConfig(**{key: self.config[key] for key in LLAMA_KEYS if key in self.config})

    @property
    def resolution(self) -> int:
        """Default side of the square input, pixels. As in the original, `mm_vision_resolution` counts above 256."""
        configured = self.config.get("mm_vision_resolution", 256)
        if configured > 256:
            return configured
        size = self.preprocessor.get("crop_size", self.preprocessor.get("size"))
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        if not isinstance(size, int):
            raise CheckpointError(f"{self.vision_folder / 'preprocessor_config.json'}: no crop_size or size")
        return size

    def language_tensors(self) -> Iterator[tuple[str, Tensor, Path]]:
        """(key, tensor, file) of the decoder, under Llama's own names."""
        for key, tensor, file in _read_tensors(self.folder):
            if not key.startswith((PROJECTOR, TOWER)) and not HARMLESS.search(key):
                yield key, tensor, file

    def projector_tensors(self) -> Iterator[tuple[str, Tensor, Path]]:
        """(key without its prefix, tensor, file) of the projector."""
        for key, tensor, file in _read_tensors(self.folder, PROJECTOR):
            yield key.removeprefix(PROJECTOR), tensor, file

    def vision_tensors(self) -> Iterator[tuple[str, Tensor, Path]]:
        """(timm's key, tensor, file) of the encoder, from its own folder or else from the main files.

        As in the original, the folder's weights count where both have some. The pooler's `layernorm`, which the model
        does not use, is left out when it has the size of one of the last two stages; a key without a place in a
        ConvNeXt keeps its name, for the caller to refuse.
        """
        own = _weight_files(self.vision_folder)
        source = _read_tensors(self.vision_folder) if own else _read_tensors(self.folder, TOWER)
        config = self.encoder_config
        unused_block = f"stages.{len(config.depths) - 1}.blocks.{config.depths[-1] - 1}."
        for key, tensor, file in source:
            key = key.removeprefix(TOWER).removeprefix("vision_tower.").removeprefix("convnext.")
            if key in ("layernorm.weight", "layernorm.bias") and tensor.shape in [(w,) for w in config.widths[-2:]]:
                continue
            try:
                key = hf_to_timm(key)
            except KeyError:
                pass
            if not (config.skip_last_block and key.startswith(unused_block)):
                yield key, tensor, file


def load_image_encoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """Encoder and projector alone, in evaluation mode; the language model's weights are not read.

    Raises CheckpointError naming every key that is missing, unexpected or of the wrong shape.
    """
    config = checkpoint.encoder_config
    encoder = ConvNeXtEncoder(config, device="meta")
    with torch.device("meta"):
        try:
            projector = build_projector(
                checkpoint.config.get("mm_projector_type", "linear"),
                config.widths[-1],
                checkpoint.config["hidden_size"],
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.folder / 'config.json'}: {error}") from None
    _assign(encoder, checkpoint.vision_tensors(), checkpoint.vision_folder, dtype, timm_to_hf)
    _assign(projector, checkpoint.projector_tensors(), checkpoint.folder, dtype, PROJECTOR.__add__)
    return ImageEncoder(encoder, projector).eval()


def load_language_state(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The decoder's weights under Llama's names; dtype None keeps the stored one. Raises CheckpointError likewise."""
    config = checkpoint.llama_config
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return _collect(expected, checkpoint.language_tensors(), checkpoint.folder, dtype, str, optional)


def load_model(source: str | Path | Checkpoint, dtype: torch.dtype = torch.float32) -> ConvLLaVA:
    """The whole model, in evaluation mode. Raises CheckpointError as `load_image_encoder` does."""
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    state = load_language_state(checkpoint, dtype)
    decoder = LlamaForCausalLM.from_pretrained(None, config=checkpoint.llama_config, state_dict=state, dtype=dtype)
    return ConvLLaVA(load_image_encoder(checkpoint, dtype), decoder).eval()


def save_checkpoint(model: ConvLLaVA, like: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write `model` in the released layout: `like`'s configurations and tokenizer files, the model's weights.

    dtype: of the weights on disk; None keeps the one each tensor has in `like`'s files, so that loading and saving
    again changes no bit. The folder appears whole or not at all. Raises FileExistsError if it is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a checkpoint is written to a new folder")
    main = {key: tensor for key, tensor in model.decoder.state_dict().items()}
    if like.config.get("tie_word_embeddings"):
        main.pop("lm_head.weight", None)  # the embedding once more
    main |= {PROJECTOR + key: tensor for key, tensor in model.image_encoder.projector.state_dict().items()}
    tower = {timm_to_hf(key): tensor for key, tensor in model.image_encoder.encoder.state_dict().items()}
    if dtype is None:
        stored = {key: tensor.dtype for key, tensor, _ in like.language_tensors()}
        stored |= {PROJECTOR + key: tensor.dtype for key, tensor, _ in like.projector_tensors()}
        stored |= {timm_to_hf(key): tensor.dtype for key, tensor, _ in like.vision_tensors()}
    else:
        stored = dict.fromkeys([*main, *tower], dtype)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "vision_tower").mkdir(parents=True)
    for tensors, target in ((main, partial), (tower, partial / "vision_tower")):
        tensors = {key: tensor.detach().to("cpu", stored[key]).contiguous() for key, tensor in tensors.items()}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    _write_json(partial / "config.json", like.config | {"mm_vision_tower": "vision_tower"})
    _write_json(partial / "vision_tower" / "config.json", like.vision_config)
    _write_json(partial / "vision_tower" / "preprocessor_config.json", like.preprocessor)
    for name in TOKENIZER_FILES:
        if (like.folder / name).is_file():
            shutil.copy(like.folder / name, partial / name)
    partial.rename(folder)


def _assign(
    module: nn.Module,
    tensors: Iterator[tuple[str, Tensor, Path]],
    folder: Path,
    dtype: torch.dtype,
    stored_name: Callable[[str], str],
) -> None:
    """Fill a module built on the meta device."""
    state = _collect(module.state_dict(), tensors, folder, dtype, stored_name)
    module.load_state_dict(state, assign=True)


def _collect(
    expected: dict[str, Tensor],
    tensors: Iterator[tuple[str, Tensor, Path]],
    folder: Path,
    dtype: torch.dtype | None,
    stored_name: Callable[[str], str],
    optional: set[str] = frozenset(),
) -> dict[str, Tensor]:
    """The tensors by key, in `dtype` (None: as stored), after checking that they are exactly the expected ones."""
    state, problems = {}, []
    for key, tensor, file in tensors:
        found = tuple(tensor.shape)
        if key not in expected:
            problems.append(f"{file}: unexpected key {key}: expected none, found shape {found}")
        elif found != tuple(expected[key].shape):
            shape = tuple(expected[key].shape)
            problems.append(f"{file}: wrong shape of {stored_name(key)}: expected {shape}, found {found}")
        else:
            state[key] = tensor if dtype is None else tensor.to(dtype)
    seen = state.keys() | optional
    files = ", ".join(str(file) for file in _weight_files(folder)) or str(folder)
    for key in expected.keys() - seen:
        if not any(f" {stored_name(key)}:" in problem for problem in problems):
            shape = tuple(expected[key].shape)
            problems.append(f"{files}: missing key {stored_name(key)}: expected shape {shape}, found none")
    if problems:
        raise CheckpointError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else ""))
    return state


def _weight_files(folder: Path) -> list[Path]:
    """Files that hold the folder's weights, safetensors before .bin; empty if there are none."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            weight_map = _read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{folder / index}: no weight_map, expected the index of a sharded checkpoint")
            return [folder / name for name in sorted(set(weight_map.values()))]
        if (folder / single).is_file():
            return [folder / single]
    return []


def _read_tensors(folder: Path, prefix: str = "") -> Iterator[tuple[str, Tensor, Path]]:
    """Every (key, tensor, file) of a folder whose key begins with `prefix`."""
    files = _weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: no weights, expected model.safetensors, pytorch_model.bin or shards of one")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, but the index in {folder} names it")
        if file.suffix == ".safetensors":
            yield from _read_safetensors(file, prefix)
        else:
            for key, tensor in _read_bin(file).items():
                if key.startswith(prefix):
                    yield key, tensor, file


def _read_safetensors(file: Path, prefix: str) -> Iterator[tuple[str, Tensor, Path]]:
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                if key.startswith(prefix):
                    yield key, tensors.get_tensor(key), file
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # the class is not importable by a stable name
            raise
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    """A torch.save archive of tensors; anything else a pickle may hold is refused (`weights_only`)."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:
        raise CheckpointError(f"{file}: cannot be read as a weights-only torch file: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file}: expected a dictionary of tensors")
    return state


def _is_zip(file: Path) -> bool:
    """torch can map the zip format of version 1.6 and later, not the older one."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _folder_or_hub(source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise CheckpointError(f"{source}: no such folder, and not a Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "vision_tower/*"]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:
        raise CheckpointError(f"{source}: no such folder, and the Hub gave none: {error}") from error


def _find_vision_folder(folder: Path, config: dict) -> Path:
    """Inside the checkpoint, else where `mm_vision_tower` says: a path, or a Hub id."""
    name = config.get("mm_vision_tower")
    for inside in (folder / name if name else folder, folder / "vision_tower"):
        if inside != folder and (inside / "config.json").is_file():
            return inside
    if not name:
        raise CheckpointError(f"{folder}: no vision_tower/ inside and no mm_vision_tower in config.json")
    return _folder_or_hub(name)


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, expected a checkpoint's configuration") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return content


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
