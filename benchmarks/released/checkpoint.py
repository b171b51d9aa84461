"""A random checkpoint of the released size, in the released layout: Vicuna-7B behind a ConvNeXt-L with a fifth stage.

Weights are those of an initialized model: normal with a deviation of 0.02, so that activations stay finite in float16.
The embedding has a deviation of 1, and what a layer adds to it is small, as in a trained model: with every layer as
large as all before it, rounding the weights to 4 bits would leave nothing of the logits after 32 layers.
All tensors are windows of one table of random numbers, each at an offset of its own, and are written straight from it.
The tokenizer is that of the conformance checkpoint, whose IDs fit into any vocabulary that is larger.
"""

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from train.errors import CheckpointError
from train.model.checkpoint.layout import PROJECTOR, TOKENIZER_FILES
from train.model.configs import language_config, llava_config, preprocessor_config, vision_config
from train.model.encoder import ConvNeXtEncoder, EncoderConfig
from train.model.names import timm_to_hf
from train.model.projector import build_projector

TOKENIZER = Path(__file__).parents[2] / "tests" / "data" / "conformance" / "checkpoint"
DEVIATION = 0.02
SEED = 0
TABLE = 67_108_859  # random numbers, a prime, so that no two rows of a matrix are equal
FACTORS = {"embed_tokens.weight": 50.0, "o_proj.weight": 0.125, "down_proj.weight": 0.125}  # on DEVIATION
PROJECTOR_TYPE = "mlp2x_gelu"
ENCODER = EncoderConfig.from_variant("large", (6, 3072), layer_scale=0.5)


@dataclass(frozen=True)
class Shape:
    """By default that of ConvLLaVA-7B.

    shard_bytes: how large a file of weights may become; a larger tensor has a file of its own.
    """

    layers: int = 32
    kv_heads: int = 32
    hidden: int = 4096
    heads: int = 32
    intermediate: int = 11008
    vocabulary: int = 32000
    positions: int = 4096
    encoder: EncoderConfig = ENCODER
    resolution: int = 1536
    shard_bytes: int = 5_000_000_000


def write_checkpoint(folder: Path, shape: Shape, as_bin: bool = False) -> None:
    """Write the checkpoint to `folder`, which appears whole or not at all. The same shape gives the same bytes.

    Args:
        as_bin: `.bin` shards as torch.save writes them, in place of `.safetensors`.

    Raises:
        CheckpointError: `folder` exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists; name another folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tower = partial / "vision_tower"
    tower.mkdir(parents=True)
    llama = llama_config(shape)
    table = random_table()
    _write_weights(main_shapes(llama, shape.encoder), table, partial, shape.shard_bytes, as_bin)
    _write_weights(tower_shapes(shape.encoder), table, tower, shape.shard_bytes, as_bin)
    _write_json(partial / "config.json", main_config(llama, shape))
    _write_json(tower / "config.json", vision_config(shape.encoder) | {"image_size": shape.resolution})
    preprocessor = preprocessor_config(tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD), shape.resolution)
    _write_json(tower / "preprocessor_config.json", preprocessor)
    for name in TOKENIZER_FILES:
        if (TOKENIZER / name).is_file():
            shutil.copy(TOKENIZER / name, partial / name)
    partial.rename(folder)


def llama_config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        rms_norm_eps=1e-5,
    )


def main_config(llama: LlamaConfig, shape: Shape) -> dict:
    """config.json."""
    return {
        **language_config(llama),
        **llava_config(shape.encoder, PROJECTOR_TYPE, shape.resolution),
        "image_aspect_ratio": "pad",
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
    }


def main_shapes(llama: LlamaConfig, encoder: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the language model's and the projector's tensors."""
    with torch.device("meta"):
        state = LlamaForCausalLM(llama).state_dict()
        projector = build_projector(PROJECTOR_TYPE, encoder.widths[-1], llama.hidden_size).state_dict()
    state |= {PROJECTOR + key: tensor for key, tensor in projector.items()}
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def tower_shapes(encoder: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the image encoder's tensors, by Hugging Face's names."""
    state = ConvNeXtEncoder(encoder, device="meta").state_dict()
    return {timm_to_hf(key): tuple(tensor.shape) for key, tensor in state.items()}


def random_table() -> np.ndarray:
    """[TABLE] float16, normal with DEVIATION."""
    values = np.random.default_rng(SEED).standard_normal(TABLE, np.float32)
    values *= DEVIATION
    return values.astype(np.float16)


def windows(key: str, shape: tuple[int, ...], table: np.ndarray) -> Iterator[np.ndarray]:
    """The values of a tensor, in pieces: random ones; scales (of norms and layers) lie around their initial value."""
    factor = next((factor for name, factor in FACTORS.items() if key.endswith(name)), 1.0)
    count = int(np.prod(shape))
    at = zlib.crc32(key.encode()) % len(table)
    norm = len(shape) == 1 and key.endswith(".weight")
    center = 0.5 if "layer_scale" in key else float(norm)
    while count:
        piece = table[at : at + count]
        piece = piece * np.float16(factor) if factor != 1 else piece
        yield piece + np.float16(center) if center else piece
        count, at = count - len(piece), 0


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Keys of each shard, in order. sizes: bytes of each tensor. limit: bytes of a shard with more than one."""
    shards: list[list[str]] = [[]]
    taken = 0
    for key, size in sizes.items():
        if shards[-1] and taken + size > limit:
            shards.append([])
            taken = 0
        shards[-1].append(key)
        taken += size
    return shards


def _write_weights(
    shapes: Mapping[str, tuple[int, ...]], table: np.ndarray, folder: Path, shard_bytes: int, as_bin: bool
) -> None:
    """Shards with an index."""
    sizes = {key: int(np.prod(shape)) * table.itemsize for key, shape in shapes.items()}
    shards = split(sizes, shard_bytes)
    stem, suffix = ("pytorch_model", ".bin") if as_bin else ("model", ".safetensors")
    weight_map = {}
    with tqdm(total=sum(sizes.values()), desc=folder.name, unit="B", unit_scale=True, disable=None) as bar:
        for number, keys in enumerate(shards, 1):
            file = folder / f"{stem}-{number:05}-of-{len(shards):05}{suffix}"
            weight_map |= dict.fromkeys(keys, file.name)
            _write_safetensors({key: shapes[key] for key in keys}, table, file, bar)
            if as_bin:
                mapped = file.rename(file.with_suffix(".mapped"))
                torch.save(load_file(mapped), file)
                mapped.unlink()
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    _write_json(folder / f"{stem}{suffix}.index.json", index)


def _write_safetensors(shapes: Mapping[str, tuple[int, ...]], table: np.ndarray, file: Path, bar: tqdm) -> None:
    """A header of 8 bytes (its length) and JSON, then the tensors, see https://github.com/huggingface/safetensors."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        begin, end = end, end + int(np.prod(shape)) * table.itemsize
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            for piece in windows(key, shape, table):
                stream.write(piece.data)
                bar.update(piece.nbytes)


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
