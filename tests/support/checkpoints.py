"""Checkpoints in the released layout, as transformers and torch write them."""

import json
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel, LlamaConfig, LlamaForCausalLM

from train.errors import CheckpointError
from train.model import IMAGE_TOKEN_INDEX, build_projector, load_model

HIDDEN, VOCABULARY = 32, 48
DEPTHS, WIDTHS = [1, 1, 2, 1, 2], [4, 8, 12, 16, 20]
GQA, TIED = {"num_key_value_heads": 2}, {"tie_word_embeddings": True}
STAGE5 = "encoder.stages.4.layers.1.pwconv1.weight"  # [4 * 20, 20]
QUERY = "model.layers.1.self_attn.q_proj.weight"  # [HIDDEN, HIDDEN]
PROJECTOR = "model.mm_projector.2.weight"  # [HIDDEN, HIDDEN]
TOWER = "model.vision_tower.vision_tower."

State = dict[str, Tensor]


class Parts:
    """What a checkpoint is made of, as transformers' and torch's own modules with random weights."""

    def __init__(self, stages: int = 5, projector: str = "mlp2x_gelu", select_layer: int = -1, **llama):
        torch.manual_seed(0)
        shape = {"hidden_size": HIDDEN, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.decoder = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape, **llama)).eval()
        self.tower = ConvNextModel(
            ConvNextConfig(
                num_stages=stages, depths=DEPTHS[:stages], hidden_sizes=WIDTHS[:stages], layer_scale_init_value=0.5
            )
        ).eval()
        self.projector = build_projector(projector, WIDTHS[stages - 1], HIDDEN)
        with torch.no_grad():
            for module in (self.decoder, self.tower, self.projector):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        self.config = shape | {
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "vocab_size": VOCABULARY,
            "rope_scaling": None,
            "torch_dtype": "float16",
            "transformers_version": "4.39.3",
            "mm_projector_type": projector,
            "mm_vision_tower": "vision_tower",
            "mm_vision_select_layer": select_layer,
            **llama,
        }
        self.vision_config = {
            "model_type": "convnext",
            "depths": DEPTHS[:stages],
            "hidden_sizes": WIDTHS[:stages],
            "hidden_act": "gelu",
            "layer_scale_init_value": 0.5,
            "num_channels": 3,
            "num_stages": stages,
            "patch_size": 4,
        }
        self.preprocessor = {"crop_size": {"height": 128, "width": 128}, "size": {"shortest_edge": 128}}

    def main_state(self) -> State:
        state = {key: value.clone() for key, value in self.decoder.state_dict().items()}
        if self.config.get("tie_word_embeddings"):
            del state["lm_head.weight"]
        return state | {f"model.mm_projector.{key}": value for key, value in self.projector.state_dict().items()}

    def tower_state(self) -> State:
        """As released: without the pooler's layernorm."""
        return {key: value for key, value in self.tower.state_dict().items() if not key.startswith("layernorm.")}

    def write(self, folder: Path, write: Callable[[State, Path], None] | None = None) -> Path:
        write = write or write_safetensors
        (folder / "vision_tower").mkdir(parents=True)
        write_json(folder / "config.json", self.config)
        write_json(folder / "vision_tower" / "config.json", self.vision_config)
        write_json(folder / "vision_tower" / "preprocessor_config.json", self.preprocessor)
        write(self.main_state(), folder)
        write(self.tower_state(), folder / "vision_tower")
        return folder

    @torch.inference_mode()
    def logits(self, input_ids: list[int], pixels: Tensor) -> Tensor:
        """The original's computation for one image: [S', V]."""
        last = self.tower.encoder(self.tower.embeddings(pixels[None])).last_hidden_state
        image = self.projector(last.flatten(2).transpose(1, 2)[0])
        at = input_ids.index(IMAGE_TOKEN_INDEX)
        embed = self.decoder.get_input_embeddings()
        before, after = torch.tensor(input_ids[:at]), torch.tensor(input_ids[at + 1 :])
        embeds = torch.cat([embed(before), image, embed(after)])
        return self.decoder(inputs_embeds=embeds[None]).logits[0]


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def edit_json(file: Path, **changes: object) -> None:
    """Set keys; ... (Ellipsis) removes one."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    write_json(file, {key: value for key, value in content.items() if value is not ...})


def write_safetensors(state: State, folder: Path) -> None:
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def write_bin(state: State, folder: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def write_parameters(state: State, folder: Path) -> None:
    torch.save({key: nn.Parameter(value) for key, value in state.items()}, folder / "pytorch_model.bin")


def write_old_bin(state: State, folder: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_shards(state: State, folder: Path, name: str, save: Callable[[State, Path], None]) -> None:
    stem, suffix = name.split(".")
    split = huggingface_hub.split_torch_state_dict_into_shards(
        state, filename_pattern=stem + "{suffix}." + suffix, max_shard_size=8_000
    )
    for file, keys in split.filename_to_tensors.items():
        save({key: state[key] for key in keys}, folder / file)
    assert len(split.filename_to_tensors) > 2
    write_json(folder / f"{name}.index.json", {"metadata": {}, "weight_map": split.tensor_to_filename})


def write_sharded_bin(state: State, folder: Path) -> None:
    write_shards(state, folder, "pytorch_model.bin", torch.save)


def write_sharded_safetensors(state: State, folder: Path) -> None:
    write_shards(state, folder, "model.safetensors", save_file)


def stored(folder: Path) -> State:
    """What one folder's single weights file holds."""
    if (folder / "model.safetensors").is_file():
        return load_file(folder / "model.safetensors")
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


def assert_bit_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        # Bits, so that -0 is not 0 and a NaN is itself
        assert torch.equal(found[key].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), key


def rewrite(folder: Path, change: Callable[[State], None]) -> None:
    """Change the tensors of one weights file in place."""
    state = stored(folder)
    change(state)
    save_file(state, folder / "model.safetensors")


def assert_same_logits(folder: Path, parts: Parts) -> None:
    model = load_model(folder)
    ids = [1, 7, IMAGE_TOKEN_INDEX, 9, 30, 2]
    pixels = torch.randn(3, 128, 192)
    with torch.inference_mode():
        (logits,) = model(torch.tensor(ids), [pixels])
    expected = parts.logits(ids, pixels)
    assert logits.shape == expected.shape
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as error:
        load()
    return str(error.value)


def elsewhere(folder: Path, target: Path, name: str) -> Path:
    """Move the checkpoint's encoder to `target` and name it `name`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "vision_tower").rename(target)
    edit_json(folder / "config.json", mm_vision_tower=name)
    return target
