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
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from train.model.convllava import ConvLLaVA, ImageEncoder
from train.model.encoder import ConvNeXtEncoder, EncoderConfig
from train.model.names import hf_to_timm, timm_to_hf
from train.model.projector import build_projector

# Keys that old exporters left in checkpoints and that no module needs
HARMLESS = re.compile(r"rotary_emb\.inv_freq$")
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
PROJECTOR = "model.mm_projector."
TOWER = "model.vision_tower."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What may stand before a Hugging Face ConvNeXt's own names: LLaVA's module, transformers' ConvNeXt with a head
TOWER_PREFIX = re.compile(r"(model\.vision_tower\.)?(vision_tower\.)?(convnext\.)?")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the message names the file, the key, what was expected and what was found."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor under `key` in `file`; `name` is what the module calls it, None if no module has a place for it."""

    name: str | None
    key: str
    tensor: Tensor
    file: Path


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
        folder = folder_or_hub(str(source))
        config = read_json(folder / "config.json")
        if (kind := config.get("model_type")) != "llava_llama":
            raise CheckpointError(
                f"{folder / 'config.json'}: model_type is {kind!r}, expected 'llava_llama': give a checkpoint in the "
                "layout that ConvLLaVA was released in"
            )
        vision_folder = _find_vision_folder(folder, config)
        return cls(
            folder,
            vision_folder,
            config,
            read_json(vision_folder / "config.json"),
            read_json(vision_folder / "preprocessor_config.json"),
        )

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
        size = self.preprocessor.get("crop_size", self.preprocessor.get("size"))
        if isinstance(size, dict):
            size = size.get("height", size.get("shortest_edge"))
        if not isinstance(size, int):
            raise CheckpointError(f"{self.vision_folder / 'preprocessor_config.json'}: no crop_size or size")
        return size

    @property
    def pixel_statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of pixels from 0 to 1; CLIP's where the preprocessor has none,
        as in the original."""
        image = self.preprocessor
        return tuple(image.get("image_mean", OPENAI_CLIP_MEAN)), tuple(image.get("image_std", OPENAI_CLIP_STD))

    @property
    def projector_type(self) -> str:
        return self.config.get("mm_projector_type", "linear")

    def language_tensors(self) -> Iterator[StoredTensor]:
        """Those of the decoder, under Llama's own names."""
        for key, tensor, file in _read_tensors(self.folder):
            if not key.startswith((PROJECTOR, TOWER)) and not HARMLESS.search(key):
                yield StoredTensor(key, key, tensor, file)

    def projector_tensors(self) -> Iterator[StoredTensor]:
        for key, tensor, file in _read_tensors(self.folder, PROJECTOR):
            yield StoredTensor(key.removeprefix(PROJECTOR), key, tensor, file)

    def vision_tensors(self) -> Iterator[StoredTensor]:
        """Those of the encoder under timm's names, from its own folder or else from the main files.

        As in the original, the folder's weights count where both have some. The pooler's `layernorm`, which the model
        does not use, is left out; it may have the size of the fourth stage or of the fifth.
        """
        folder, prefix = self.vision_source
        config, found = self.encoder_config, False
        pooler = [(width,) for width in config.widths[3:]]
        unused_block = f"stages.{len(config.depths) - 1}.blocks.{config.depths[-1] - 1}."
        for key, tensor, file in _read_tensors(folder, prefix):
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

    @property
    def vision_source(self) -> tuple[Path, str]:
        """The folder whose files hold the encoder's weights, and what their keys begin with there."""
        return (self.vision_folder, "") if _weights(self.vision_folder) else (self.folder, TOWER)


def load_image_encoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> ImageEncoder:
    """Encoder and projector alone, in evaluation mode; the language model's weights are not read.

    Raises CheckpointError naming every key that is missing, unexpected or of the wrong shape.
    """
    config, folder = checkpoint.encoder_config, checkpoint.folder
    encoder = ConvNeXtEncoder(config, device="meta")
    kind, out_features = checkpoint.projector_type, checkpoint.llama_config.hidden_size
    try:
        with torch.device("meta"):
            projector = build_projector(kind, config.widths[-1], out_features)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: mm_projector_type: {error}") from None
    vision_folder, prefix = checkpoint.vision_source
    prefix = prefix and prefix + "vision_tower."
    for module, stored, source, key_of in (
        (encoder, checkpoint.vision_tensors(), vision_folder, lambda name: prefix + timm_to_hf(name)),
        (projector, checkpoint.projector_tensors(), folder, PROJECTOR.__add__),
    ):
        module.load_state_dict(_collect(module.state_dict(), stored, source, key_of, dtype), assign=True)
    return ImageEncoder(encoder, projector).eval()


def load_language_state(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The decoder's weights under Llama's names; dtype None keeps the stored one. Raises CheckpointError likewise.

    A tied `lm_head.weight` is not among them, stored or not: it is the embedding.
    """
    config, folder = checkpoint.llama_config, checkpoint.folder
    try:
        with torch.device("meta"):
            expected = LlamaForCausalLM(config).state_dict()
    except Exception as error:  # such as KeyError for an activation or a rope_type that transformers does not have
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot build a Llama from it: {type(error).__name__}: {error}"
        ) from error
    optional = {HEAD} if config.tie_word_embeddings else set()
    state = _collect(expected, checkpoint.language_tensors(), folder, str, dtype, optional)
    # transformers 4 would take the embedding for the head here, transformers 5 the stored head
    if optional and HEAD in state and not torch.equal(state.pop(HEAD), state[EMBEDDING]):
        raise CheckpointError(
            f"{_file_for(folder, HEAD)}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings in "
            f"{folder / 'config.json'} is true; make it false if the head was trained apart"
        )
    return state


def load_embedding(checkpoint: Checkpoint) -> Tensor:
    """The decoder's embedding alone, [vocabulary, hidden] float32. Raises CheckpointError likewise."""
    config = checkpoint.llama_config
    expected = {EMBEDDING: torch.empty(config.vocab_size, config.hidden_size, device="meta")}
    stored = (item for item in checkpoint.language_tensors() if item.name == EMBEDDING)
    return _collect(expected, stored, checkpoint.folder, str, torch.float32)[EMBEDDING]


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
    save_state(model.state_dict(), like, folder, dtype)


def save_image_encoder(changed: dict[str, Tensor], like: Checkpoint, folder: Path) -> None:
    """Write `like` once more to `folder`, with other weights for some of an `ImageEncoder`'s."""
    encoder = load_image_encoder(like).state_dict()
    if unknown := changed.keys() - encoder.keys():
        raise KeyError(min(unknown))
    state = {f"decoder.{name}": tensor for name, tensor in load_language_state(like).items()}
    save_state(state | {f"image_encoder.{name}": tensor for name, tensor in (encoder | changed).items()}, like, folder)


def save_state(state: dict[str, Tensor], like: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> None:
    """`save_checkpoint` of a ConvLLaVA's state_dict, which may be on any device."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a checkpoint is written to a new folder")
    main = _under("decoder.", state)
    if like.config.get("tie_word_embeddings"):
        main.pop(HEAD, None)  # the embedding once more
    main |= {PROJECTOR + key: tensor for key, tensor in _under("image_encoder.projector.", state).items()}
    tower = {timm_to_hf(key): tensor for key, tensor in _under("image_encoder.encoder.", state).items()}
    if dtype is None:
        stored = {item.key: item.tensor.dtype for item in like.language_tensors()}
        stored |= {item.key: item.tensor.dtype for item in like.projector_tensors()}
        stored |= {timm_to_hf(item.name): item.tensor.dtype for item in like.vision_tensors()}
    else:
        stored = dict.fromkeys([*main, *tower], dtype)

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "vision_tower").mkdir(parents=True)
    for tensors, target in ((main, partial), (tower, partial / "vision_tower")):
        tensors = {key: tensor.detach().to("cpu", stored[key]).contiguous() for key, tensor in tensors.items()}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = like.config | {"mm_vision_tower": "vision_tower"}
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(partial / "config.json", config)
    _write_json(partial / "vision_tower" / "config.json", like.vision_config)
    _write_json(partial / "vision_tower" / "preprocessor_config.json", like.preprocessor)
    for name in TOKENIZER_FILES:
        if (like.folder / name).is_file():
            shutil.copy(like.folder / name, partial / name)
    partial.rename(folder)


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _collect(
    expected: dict[str, Tensor],
    stored: Iterable[StoredTensor],
    folder: Path,
    key_of: Callable[[str], str],
    dtype: torch.dtype | None,
    optional: Set[str] = frozenset(),
) -> dict[str, Tensor]:
    """The tensors by name, in `dtype` (None: as stored), after checking that they are exactly the expected ones.

    key_of: name -> key in the files of `folder`.
    """
    state, problems, seen = {}, [], set(optional)
    for item in stored:
        found = tuple(item.tensor.shape)
        if item.name not in expected:
            problems.append(f"{item.file}: unexpected key {item.key}: expected none, found shape {found}")
            continue
        seen.add(item.name)
        if found != (shape := tuple(expected[item.name].shape)):
            problems.append(f"{item.file}: wrong shape of {item.key}: expected {shape}, found {found}")
        else:
            state[item.name] = item.tensor if dtype is None else item.tensor.to(dtype)
    for name, tensor in expected.items():
        if name not in seen:
            key, shape = key_of(name), tuple(tensor.shape)
            problems.append(f"{_file_for(folder, key)}: missing key {key}: expected shape {shape}, found none")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{'; '.join(problems[:5])}{more} (do these weights and their config.json belong together?)"
        )
    return state


def _weights(folder: Path) -> Path | None:
    """The file or the index of shards that holds the folder's weights; transformers' choice where there are several."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _shards(index: Path) -> dict[str, Path]:
    """key -> file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map from keys to files, expected the index of a sharded checkpoint")
    return {key: index.parent / name for key, name in weight_map.items()}


def _file_for(folder: Path, key: str) -> Path:
    """Where `key` should be: the only file, or its shard, or the index that does not have it."""
    weights = _weights(folder)
    return _shards(weights).get(key, weights) if weights.suffix == ".json" else weights


def _read_tensors(folder: Path, prefix: str = "") -> Iterator[tuple[str, Tensor, Path]]:
    """Every (key, tensor, file) of a folder whose key begins with `prefix`."""
    weights = _weights(folder)
    if not weights:
        raise CheckpointError(f"{folder}: no weights, expected {WEIGHTS[0]}, {WEIGHTS[2]} or shards of one")
    for file in sorted(set(_shards(weights).values())) if weights.suffix == ".json" else [weights]:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file, but {weights} names it; is the download complete?")
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
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}; is the download complete?") from error


def _read_bin(file: Path) -> dict[str, Tensor]:
    """A torch.save archive of tensors; anything else a pickle may hold is refused (`weights_only`)."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:
        # torch's own words on a pickle tell how to run its code after all
        if asked := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{file}: refused: its pickle asks for {asked[1]}, and a checkpoint may hold tensors only; have its "
                "author save it as safetensors"
            ) from None
        reason = "no valid pickle" if isinstance(error, UnpicklingError) else str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{file}: cannot be read as a torch file of tensors: {reason}; is the download complete?"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, expected a dictionary of tensors")
    for key, value in state.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise CheckpointError(f"{file}: {key!r} is a {type(value).__name__}, expected a dictionary of tensors")
    return {key: tensor.detach() for key, tensor in state.items()}


def _is_zip(file: Path) -> bool:
    """torch can map the zip format of version 1.6 and later, not the older one."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


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


def read_json(file: Path) -> dict:
    """Raises CheckpointError for a file that is missing or no JSON object."""
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
