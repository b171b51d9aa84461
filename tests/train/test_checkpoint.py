"""Checkpoints in the released layout, written here by transformers and torch, read and written back by ours."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel, LlamaConfig, LlamaForCausalLM

from train.model import (
    IMAGE_TOKEN_INDEX,
    Checkpoint,
    CheckpointError,
    build_projector,
    load_image_encoder,
    load_language_state,
    load_model,
    save_checkpoint,
)

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


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def folder(parts: Parts, tmp_path: Path) -> Path:
    """A good checkpoint for a test to spoil."""
    return parts.write(tmp_path / "checkpoint")


def refusal(load: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as error:
        load()
    return str(error.value)


# Reading


@pytest.mark.parametrize(
    "write",
    [write_safetensors, write_bin, write_parameters, write_old_bin, write_sharded_bin, write_sharded_safetensors],
)
def test_every_file_format_is_read(write: Callable, parts: Parts, tmp_path: Path):
    assert_same_logits(parts.write(tmp_path / "checkpoint", write), parts)


def test_stored_parameters_become_plain_tensors(parts: Parts, tmp_path: Path):
    """Else every use of them outside a module would build a graph for gradients."""
    folder = parts.write(tmp_path / "checkpoint", write_parameters)
    assert not any(tensor.requires_grad for tensor in load_language_state(Checkpoint.open(folder)).values())


@pytest.mark.parametrize("llama", [{}, GQA, TIED, GQA | TIED], ids=["mha", "gqa", "mha-tied", "gqa-tied"])
def test_every_decoder_is_read_as_transformers_writes_it(llama: dict, tmp_path: Path):
    parts = Parts(**llama)
    folder = parts.write(tmp_path / "checkpoint")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    whole = copy.deepcopy(parts.decoder)
    whole.model.mm_projector = parts.projector  # where LLaVA has it
    whole.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    for file in (tmp_path / "saved").glob("model*"):
        shutil.copy(file, folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_same_logits(folder, parts)
    assert load_model(folder).decoder.lm_head.weight.shape == (VOCABULARY, HIDDEN)


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_every_projector_is_read(projector: str, tmp_path: Path):
    parts = Parts(projector=projector)
    assert_same_logits(parts.write(tmp_path / "checkpoint"), parts)


def test_identity_projector_needs_no_weights(parts: Parts, tmp_path: Path):
    parts.vision_config["hidden_sizes"] = [4, 8, 12, 16, HIDDEN]
    torch.manual_seed(0)
    parts.tower = ConvNextModel(ConvNextConfig(**parts.vision_config)).eval()
    parts.projector, parts.config["mm_projector_type"] = nn.Identity(), "identity"
    assert_same_logits(parts.write(tmp_path / "checkpoint"), parts)


def test_encoder_without_a_fifth_stage_is_read(tmp_path: Path):
    parts = Parts(stages=4)
    folder = parts.write(tmp_path / "checkpoint")
    assert Checkpoint.open(folder).encoder_config.stride == 32
    assert_same_logits(folder, parts)


@pytest.mark.parametrize("stored_block", [True, False])
def test_select_layer_minus_two_is_read_and_saved(stored_block: bool, tmp_path: Path):
    parts = Parts(select_layer=-2)
    folder = parts.write(tmp_path / "checkpoint")
    parts.tower.encoder.stages[-1].layers.pop(-1)
    if not stored_block:
        write_safetensors(parts.tower_state(), folder / "vision_tower")
    assert_same_logits(folder, parts)
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved")
    assert_same_logits(tmp_path / "saved", parts)


def test_layer_scale_zero_is_read(parts: Parts, tmp_path: Path):
    parts.vision_config["layer_scale_init_value"] = 0.0
    torch.manual_seed(0)
    parts.tower = ConvNextModel(ConvNextConfig(**parts.vision_config)).eval()
    assert not any("layer_scale" in key for key in parts.tower_state())
    assert_same_logits(parts.write(tmp_path / "checkpoint"), parts)


def test_absent_vision_keys_have_hugging_faces_defaults(folder: Path, parts: Parts):
    shape = {key: parts.vision_config[key] for key in ("depths", "hidden_sizes")}
    write_json(folder / "vision_tower" / "config.json", shape)
    config = Checkpoint.open(folder).encoder_config
    assert (config.layer_scale, config.drop_path_rate, config.stride) == (1e-6, 0.0, 64)
    assert_same_logits(folder, parts)


def test_absent_llama_keys_have_the_defaults_of_the_releases_transformers(folder: Path):
    """Those of transformers 4.39.3; a later version must not move them."""
    keys = ("model_type", "mm_projector_type", "mm_vision_tower")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", {key: config[key] for key in keys} | {"num_attention_heads": 16})
    llama = Checkpoint.open(folder).llama_config
    assert (llama.vocab_size, llama.hidden_size, llama.intermediate_size) == (32000, 4096, 11008)
    assert (llama.num_hidden_layers, llama.num_key_value_heads, llama.head_dim) == (32, 16, 256)
    assert (llama.hidden_act, llama.rms_norm_eps, llama.max_position_embeddings) == ("silu", 1e-6, 2048)
    assert (llama.tie_word_embeddings, llama.attention_bias, llama.mlp_bias) == (False, False, False)
    assert (llama.bos_token_id, llama.eos_token_id) == (1, 2)


@pytest.mark.parametrize("null", ["num_key_value_heads", "head_dim", "pad_token_id", "rope_scaling"])
def test_null_llama_keys_are_absent_ones(null: str, folder: Path, parts: Parts):
    edit_json(folder / "config.json", **{null: None})
    assert_same_logits(folder, parts)


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters"])
def test_rope_theta_is_read_as_transformers_4_and_5_write_it(spelling: str, folder: Path, parts: Parts):
    edit_json(folder / "config.json", **{spelling: 500.0 if spelling == "rope_theta" else {"rope_theta": 500.0}})
    inverse = load_model(folder).decoder.model.rotary_emb.inv_freq
    torch.testing.assert_close(inverse, 500.0 ** -(torch.arange(0, 8, 2) / 8))


@torch.inference_mode()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
)
def test_linear_rope_scaling_halves_the_positions(rope: dict, folder: Path, parts: Parts):
    edit_json(folder / "config.json", **rope)
    ids = torch.arange(1, 9)[None]
    expected = parts.decoder(ids, position_ids=torch.arange(8)[None] / 2).logits
    torch.testing.assert_close(load_model(folder).decoder(ids).logits, expected)


@torch.inference_mode()
def test_dynamic_rope_scaling_begins_past_the_trained_length(folder: Path, parts: Parts):
    scaling = {"type": "dynamic", "factor": 2.0}
    edit_json(folder / "config.json", rope_scaling=scaling, max_position_embeddings=8)
    ids = torch.arange(1, 13)[None]
    decoder = load_model(folder).decoder
    torch.testing.assert_close(decoder(ids[:, :8]).logits, parts.decoder(ids[:, :8]).logits)
    # NTK-aware scaling for 12 positions: the base grows by (factor * 12/8 - (factor - 1)) ** (dim / (dim - 2))
    edit_json(folder / "config.json", rope_scaling=None, rope_theta=10000.0 * 2.0 ** (8 / 6))
    torch.testing.assert_close(decoder(ids).logits, load_model(folder).decoder(ids).logits)


def test_reading_leaves_the_configuration_as_it_is_stored(folder: Path):
    edit_json(folder / "config.json", rope_scaling={"type": "linear", "factor": 2.0})
    as_stored = json.loads((folder / "config.json").read_text())
    checkpoint = Checkpoint.open(folder)
    load_model(checkpoint)
    assert checkpoint.config == as_stored


@pytest.mark.parametrize("resolution, expected", [(..., 128), (256, 128), (None, 128), (768, 768)])
def test_resolution_is_the_configured_one_above_256(resolution: int | None, expected: int, folder: Path):
    """As in the original, which keeps the image processor's own size up to 256."""
    edit_json(folder / "config.json", mm_vision_resolution=resolution)
    assert Checkpoint.open(folder).resolution == expected


@pytest.mark.parametrize("size", [{"crop_size": 64}, {"size": 64}, {"size": {"shortest_edge": 64}}])
def test_resolution_is_read_from_every_kind_of_preprocessor(size: dict, folder: Path):
    file = folder / "vision_tower" / "preprocessor_config.json"
    write_json(file, size)
    assert Checkpoint.open(folder).resolution == 64
    write_json(file, {})
    message = refusal(lambda: Checkpoint.open(folder).resolution)
    assert f"{file}: no crop_size or size" in message


def test_harmless_keys_are_ignored(folder: Path, parts: Parts):
    harmless = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda state: state.update({harmless: torch.ones(4)}))
    assert harmless not in load_language_state(Checkpoint.open(folder))
    assert_same_logits(folder, parts)


@pytest.mark.parametrize("width", WIDTHS[3:])
def test_pooler_norm_of_either_size_is_ignored(width: int, folder: Path, parts: Parts):
    """Four stages' norm stays behind when the original appends the fifth."""
    pooler = {f"layernorm.{kind}": torch.ones(width) for kind in ("weight", "bias")}
    rewrite(folder / "vision_tower", lambda state: state.update(pooler))
    assert_same_logits(folder, parts)


@pytest.mark.parametrize("prefix", ["convnext.", "vision_tower.", TOWER])
def test_prefixes_of_the_encoders_keys_are_known(prefix: str, folder: Path, parts: Parts):
    write_safetensors({prefix + key: value for key, value in parts.tower_state().items()}, folder / "vision_tower")
    assert_same_logits(folder, parts)


def test_safetensors_come_before_bin_and_one_file_before_shards(folder: Path, parts: Parts):
    write_json(folder / "model.safetensors.index.json", {"weight_map": {QUERY: "gone.safetensors"}})
    torch.save({}, folder / "pytorch_model.bin")
    assert_same_logits(folder, parts)


def test_stored_dtype_is_kept_or_converted(folder: Path):
    rewrite(folder, lambda state: state.update({QUERY: state[QUERY].to(torch.bfloat16)}))
    checkpoint = Checkpoint.open(folder)
    as_stored = load_language_state(checkpoint)
    assert as_stored[QUERY].dtype == torch.bfloat16
    assert as_stored["model.norm.weight"].dtype == torch.float32
    half = load_language_state(checkpoint, torch.float16)
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    assert {parameter.dtype for parameter in load_model(folder, torch.float16).parameters()} == {torch.float16}
    assert not load_model(folder).training


def test_image_encoder_needs_no_language_model(folder: Path):
    def forget(state: State) -> None:
        for key in [key for key in state if not key.startswith("model.mm_projector.")]:
            del state[key]

    rewrite(folder, forget)
    checkpoint = Checkpoint.open(folder)
    encoder = load_image_encoder(checkpoint)
    assert encoder(torch.zeros(1, 3, 64, 128)).shape == (1, 2, HIDDEN)
    assert "missing key model.embed_tokens.weight" in refusal(lambda: load_model(checkpoint))


# Where the encoder lies


def elsewhere(folder: Path, target: Path, name: str) -> Path:
    """Move the checkpoint's encoder to `target` and name it `name`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "vision_tower").rename(target)
    edit_json(folder / "config.json", mm_vision_tower=name)
    return target


@pytest.mark.parametrize("name", [..., "/home/author/stage2/vision_tower", "author/encoder", "~nobody/encoder"])
def test_encoder_inside_needs_no_right_name(name: str, folder: Path, parts: Parts):
    edit_json(folder / "config.json", mm_vision_tower=name)
    assert Checkpoint.open(folder).vision_folder == folder / "vision_tower"
    assert_same_logits(folder, parts)


def test_encoder_inside_comes_before_another_that_is_named(folder: Path, parts: Parts, tmp_path: Path):
    """A freshly trained checkpoint still names the encoder that its training began with."""
    shutil.copytree(folder / "vision_tower", tmp_path / "before")
    rewrite(tmp_path / "before", lambda state: state[STAGE5].zero_())
    edit_json(folder / "config.json", mm_vision_tower=str(tmp_path / "before"))
    assert_same_logits(folder, parts)


def test_encoder_is_found_by_a_path(folder: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside = elsewhere(folder, folder / "encoder", "encoder")
    assert Checkpoint.open(folder).vision_folder == inside
    beside = tmp_path / "encoder"
    inside.rename(beside)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(beside), "~/encoder", "../encoder"):
        edit_json(folder / "config.json", mm_vision_tower=name)
        assert Checkpoint.open(folder).vision_folder.resolve() == beside
        assert_same_logits(folder, parts)
    monkeypatch.chdir(tmp_path)
    edit_json(folder / "config.json", mm_vision_tower="./encoder")
    assert_same_logits(folder, parts)


def test_hub_ids_are_downloaded(folder: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = {"author/model": folder, "author/encoder": elsewhere(folder, tmp_path / "cache", "author/encoder")}
    asked = {}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(hub[repo_id])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = Checkpoint.open("author/model")
    assert (checkpoint.folder, checkpoint.vision_folder) == (folder, tmp_path / "cache")
    assert asked.keys() == hub.keys()
    files = ["config.json", "tokenizer.model", "model-00001-of-00002.safetensors", "vision_tower/pytorch_model.bin"]
    for patterns in asked.values():
        assert set(files) == set(huggingface_hub.utils.filter_repo_objects([*files, "a.png"], allow_patterns=patterns))
    assert_same_logits("author/model", parts)


def test_hub_failures_name_the_id_and_its_source(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(repo_id: str, **_: object) -> str:
        raise OSError("404 Client Error\nmore than anyone wants to know")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal(lambda: Checkpoint.open("author/model"))
    assert message == "author/model: no such folder, and the Hub gave none: 404 Client Error"
    elsewhere(folder, tmp_path / "moved", "author/encoder")
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder / 'config.json'}: mm_vision_tower: author/encoder: no such folder")
    assert str(folder / "vision_tower") in message


@pytest.mark.parametrize("source", ["/nowhere/checkpoint", "./checkpoint", "../checkpoint", "~/no/such/checkpoint"])
def test_paths_are_not_asked_of_the_hub(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert refusal(lambda: Checkpoint.open(source)).startswith(f"{source}: no such folder, and not a Hub id")


def test_encoder_nowhere_is_an_error(folder: Path):
    shutil.rmtree(folder / "vision_tower")
    edit_json(folder / "config.json", mm_vision_tower=...)
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder}: no vision_tower/config.json inside and no mm_vision_tower in config.json")


def test_encoder_weights_in_the_main_file_are_read(folder: Path, parts: Parts, tmp_path: Path):
    (folder / "vision_tower" / "model.safetensors").unlink()
    inside = {TOWER + key: value for key, value in parts.tower.state_dict().items()}
    rewrite(folder, lambda state: state.update(inside))
    assert_same_logits(folder, parts)
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved")
    assert_bit_equal(stored(tmp_path / "saved" / "vision_tower"), parts.tower_state())
    assert_bit_equal(stored(tmp_path / "saved"), parts.main_state())


def test_folders_encoder_weights_count_where_both_places_have_some(folder: Path, parts: Parts):
    other = {TOWER + key: value + 1 for key, value in parts.tower_state().items()}
    rewrite(folder, lambda state: state.update(other))
    assert_same_logits(folder, parts)


def test_no_encoder_weights_is_one_error(folder: Path):
    (folder / "vision_tower" / "model.safetensors").unlink()
    message = refusal(lambda: load_image_encoder(Checkpoint.open(folder)))
    assert message.startswith(f"{folder / 'vision_tower'}: no encoder weights, expected model.safetensors")
    assert str(folder) in message.split("or keys model.vision_tower.*")[1]


# Writing


def stored_as(dtype: str) -> Callable[[State, Path], None]:
    def cast(key: str, value: Tensor) -> Tensor:
        if dtype == "mixed":
            return value.to((torch.float32, torch.float16, torch.bfloat16)[len(key) % 3])
        return value.to(getattr(torch, dtype))

    return lambda state, folder: write_safetensors({key: cast(key, value) for key, value in state.items()}, folder)


@pytest.mark.parametrize("tied", [{}, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "mixed"])
def test_load_save_load_is_bit_equal(dtype: str, tied: dict, tmp_path: Path):
    parts = Parts(**tied)
    first = parts.write(tmp_path / "first", stored_as(dtype))
    save_checkpoint(load_model(first), Checkpoint.open(first), tmp_path / "second")
    for place in ("", "vision_tower"):
        assert_bit_equal(stored(tmp_path / "second" / place), stored(first / place))
    assert_bit_equal(dict(load_model(tmp_path / "second").state_dict()), dict(load_model(first).state_dict()))


@pytest.mark.parametrize("write", [write_bin, write_old_bin, write_sharded_bin, write_sharded_safetensors])
def test_every_file_format_is_saved_as_one_file(write: Callable, parts: Parts, tmp_path: Path):
    first = parts.write(tmp_path / "first", write)
    save_checkpoint(load_model(first), Checkpoint.open(first), tmp_path / "second")
    assert_bit_equal(stored(tmp_path / "second"), parts.main_state())
    assert_bit_equal(stored(tmp_path / "second" / "vision_tower"), parts.tower_state())


def test_saving_half_precision_from_half_precision_memory(parts: Parts, tmp_path: Path):
    """Weights that were never converted may still be mapped from the file they came from."""
    for name, write in (("bin", write_bin), ("safetensors", write_safetensors)):
        first = parts.write(tmp_path / name, lambda state, to, write=write: write(half(state), to))
        model = load_model(first, torch.float16)
        save_checkpoint(model, Checkpoint.open(first), tmp_path / f"{name}-saved")
        assert_bit_equal(stored(tmp_path / f"{name}-saved"), half(parts.main_state()))


def half(state: State) -> State:
    return {key: value.half() for key, value in state.items()}


def test_saved_checkpoint_can_change_its_dtype(folder: Path, parts: Parts, tmp_path: Path):
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved", torch.bfloat16)
    expected = {key: value.to(torch.bfloat16) for key, value in parts.main_state().items()}
    assert_bit_equal(stored(tmp_path / "saved"), expected)
    assert {value.dtype for value in stored(tmp_path / "saved" / "vision_tower").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_saved_checkpoint_keeps_its_other_files(folder: Path, tmp_path: Path):
    (folder / "tokenizer.model").write_bytes(b"\x0a\x00sentencepiece")
    # transformers refuses to save such a generation_config itself; it must be no obstacle
    write_json(folder / "generation_config.json", {"do_sample": False, "temperature": 0.9, "eos_token_id": 2})
    edit_json(folder / "config.json", image_aspect_ratio="pad", unknown_key=[1, {"a": None}])
    elsewhere(folder, tmp_path / "encoder", str(tmp_path / "encoder"))
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved")
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    saved, first = Checkpoint.open(tmp_path / "saved"), Checkpoint.open(folder)
    assert saved.vision_folder == tmp_path / "saved" / "vision_tower"
    assert saved.config == first.config | {"mm_vision_tower": "vision_tower"}
    assert (saved.vision_config, saved.preprocessor) == (first.vision_config, first.preprocessor)


def test_saved_weights_are_what_transformers_reads(tmp_path: Path):
    parts = Parts(**GQA)
    folder = parts.write(tmp_path / "checkpoint")
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved")
    tower, report = ConvNextModel.from_pretrained(tmp_path / "saved" / "vision_tower", output_loading_info=True)
    assert set(report["missing_keys"]) == {"layernorm.weight", "layernorm.bias"}  # the pooler's, which has no use
    assert not report["unexpected_keys"]
    state = {key: value for key, value in tower.state_dict().items() if not key.startswith("layernorm.")}
    assert_bit_equal(state, parts.tower_state())
    state = stored(tmp_path / "saved")
    decoder = LlamaForCausalLM(parts.decoder.config)
    decoder.model.mm_projector = build_projector("mlp2x_gelu", WIDTHS[-1], HIDDEN)
    decoder.load_state_dict(state)


def test_saving_replaces_nothing(folder: Path):
    model, checkpoint = load_model(folder), Checkpoint.open(folder)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=re.escape(str(folder))):
        save_checkpoint(model, checkpoint, folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_saved_folder_appears_whole_or_not_at_all(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, checkpoint = load_model(folder), Checkpoint.open(folder)
    target = tmp_path / "saved"

    def full_disk(state: State, file: Path, metadata: dict) -> None:
        if file.parent.name == "vision_tower":
            raise OSError("No space left on device")
        save_file(state, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("train.model.checkpoint.save_file", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(model, checkpoint, target)
    assert not target.exists()
    save_checkpoint(model, checkpoint, target)  # what the first attempt left is no obstacle
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "saved"]
    assert_bit_equal(dict(load_model(target).state_dict()), dict(model.state_dict()))


# Refusing


def check_problem(message: str, file: Path, key: str, expected: object, found: object) -> None:
    """The problem's own clause names its file, the key as stored, and both shapes."""
    (clause,) = [clause for clause in message.split("; ") if key in clause]
    assert clause.startswith(f"{file}: ")
    assert re.search(rf"\b{re.escape(key)}: expected (shape )?{re.escape(str(expected))}, found ", clause)
    assert re.search(rf", found (shape )?{re.escape(str(found))}(?= \(do|$)", clause)


PLACES = {  # place of the weights -> (folder, key, its shape)
    "language": ("", QUERY, (HIDDEN, HIDDEN)),
    "projector": ("", PROJECTOR, (HIDDEN, HIDDEN)),
    "encoder": ("vision_tower", STAGE5, (80, 20)),
    "encoder-in-main": ("", TOWER + STAGE5, (80, 20)),
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, folder: Path, parts: Parts) -> tuple[Path, str, tuple[int, ...]]:
    if request.param == "encoder-in-main":
        (folder / "vision_tower" / "model.safetensors").unlink()
        rewrite(folder, lambda state: state.update({TOWER + k: v for k, v in parts.tower_state().items()}))
    where, key, shape = PLACES[request.param]
    return folder / where, key, shape


def test_missing_key_is_named(place: tuple, folder: Path):
    where, key, shape = place
    rewrite(where, lambda state: state.pop(key))
    message = refusal(lambda: load_model(folder))
    check_problem(message, where / "model.safetensors", key, shape, "none")
    assert "missing key" in message
    assert message.endswith("(do these weights and their config.json belong together?)")


def test_wrong_shape_is_named(place: tuple, folder: Path):
    where, key, shape = place
    rewrite(where, lambda state: state.update({key: torch.zeros(7, 3)}))
    message = refusal(lambda: load_model(folder))
    check_problem(message, where / "model.safetensors", key, shape, (7, 3))
    assert "wrong shape" in message
    assert "missing" not in message


@pytest.mark.parametrize(
    "where, key",
    [
        ("", "model.layers.2.mlp.up_proj.weight"),
        ("", "model.image_newline"),
        ("", "model.mm_projector.4.weight"),
        ("vision_tower", "encoder.stages.4.layers.2.dwconv.weight"),
        ("vision_tower", "classifier.weight"),
        ("vision_tower", "stem.0.weight"),  # timm's name has no place in the layout
    ],
)
def test_unexpected_key_is_named_as_it_is_stored(where: str, key: str, folder: Path):
    rewrite(folder / where, lambda state: state.update({key: torch.zeros(7, 3)}))
    message = refusal(lambda: load_model(folder))
    check_problem(message, folder / where / "model.safetensors", key, "none", (7, 3))
    assert "unexpected key" in message


def test_wrong_pooler_norm_is_named(folder: Path):
    rewrite(folder / "vision_tower", lambda state: state.update({"layernorm.bias": torch.ones(7)}))
    message = refusal(lambda: load_model(folder))
    check_problem(message, folder / "vision_tower" / "model.safetensors", "layernorm.bias", "(16,) or (20,)", "(7,)")


@pytest.mark.parametrize("name, write", [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_the_shard_at_fault_is_named(name: str, write: Callable, parts: Parts, tmp_path: Path):
    folder = parts.write(tmp_path / "checkpoint", lambda state, to: write_shards(state, to, name, write))
    index = folder / f"{name}.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"][QUERY]
    state = load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard)
    write({key: value for key, value in state.items() if key != QUERY}, shard)
    message = refusal(lambda: load_language_state(Checkpoint.open(folder)))
    check_problem(message, shard, QUERY, (HIDDEN, HIDDEN), "none")

    left = {key: file for key, file in json.loads(index.read_text())["weight_map"].items() if key != QUERY}
    edit_json(index, weight_map=left)
    message = refusal(lambda: load_language_state(Checkpoint.open(folder)))
    check_problem(message, index, QUERY, (HIDDEN, HIDDEN), "none")


@pytest.mark.parametrize("write", [write_sharded_bin, write_sharded_safetensors])
def test_an_absent_shard_is_named(write: Callable, parts: Parts, tmp_path: Path):
    folder = parts.write(tmp_path / "checkpoint", write)
    (index,) = folder.glob("*.index.json")
    shard = folder / json.loads(index.read_text())["weight_map"][QUERY]
    shard.unlink()
    message = refusal(lambda: load_model(folder))
    assert message == f"{shard}: no such file, but {index} names it; is the download complete?"


def test_many_problems_are_counted(folder: Path):
    edit_json(folder / "config.json", num_hidden_layers=3)
    message = refusal(lambda: load_language_state(Checkpoint.open(folder)))
    assert message.count("missing key model.layers.2.") == 5
    assert "; and 4 more (do" in message


def test_untied_head_is_missed(tmp_path: Path):
    parts = Parts(**TIED)
    folder = parts.write(tmp_path / "checkpoint")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    message = refusal(lambda: load_model(folder))
    check_problem(message, folder / "model.safetensors", "lm_head.weight", (VOCABULARY, HIDDEN), "none")


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path):
    """transformers 4 would silently drop one that differs, transformers 5 would use it."""
    parts = Parts(**TIED)
    folder = parts.write(tmp_path / "checkpoint")
    rewrite(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    assert_same_logits(folder, parts)
    assert "lm_head.weight" not in load_language_state(Checkpoint.open(folder))
    rewrite(folder, lambda state: state["lm_head.weight"].mul_(2))
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{folder / 'model.safetensors'}: lm_head.weight differs from model.embed_tokens.weight")
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("name", ["config.json", "vision_tower/config.json", "vision_tower/preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"], ids=["cut off", "not UTF-8", "a list"])
def test_corrupt_json_is_named(name: str, content: bytes, folder: Path):
    (folder / name).write_bytes(content)
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder / name}: ")
    assert "JSON" in message


@pytest.mark.parametrize("name", ["config.json", "vision_tower/preprocessor_config.json"])
def test_missing_json_is_named(name: str, folder: Path):
    (folder / name).unlink()
    assert refusal(lambda: Checkpoint.open(folder)).startswith(f"{folder / name}: no such file")


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {QUERY: 3}}])
def test_corrupt_index_is_named(index: dict, folder: Path):
    (folder / "model.safetensors").unlink()
    file = folder / "model.safetensors.index.json"
    write_json(file, index)
    assert refusal(lambda: load_model(folder)).startswith(f"{file}: no weight_map")


def test_missing_weights_are_named(folder: Path):
    (folder / "model.safetensors").unlink()
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{folder}: no weights, expected model.safetensors, pytorch_model.bin or shards")


@pytest.mark.parametrize("write", [write_safetensors, write_bin, write_old_bin])
@pytest.mark.parametrize("keep", [0, 3, 0.5])
def test_cut_off_weights_are_named(write: Callable, keep: float, parts: Parts, tmp_path: Path):
    folder = parts.write(tmp_path / "checkpoint", write)
    (file,) = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{file}: cannot be read as ")
    assert message.endswith("is the download complete?")
    assert "\n" not in message
    assert "weights_only" not in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointer_in_place_of_weights_is_named(name: str, folder: Path):
    """What a clone without Git LFS has."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13476835328\n")
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{folder / name}: cannot be read as ")
    assert message.endswith("is the download complete?")
    assert "weights_only" not in message


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(zipped: bool, folder: Path, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({QUERY: Trap(tmp_path / "sprung")}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{file}: refused: its pickle asks for ")
    assert "safetensors" in message
    assert "weights_only" not in message  # torch's advice is to run the code
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content, told",
    [
        ([torch.zeros(1)], "holds a list"),
        ({"state_dict": {QUERY: torch.zeros(1)}}, "'state_dict' is a dict"),
        ({3: torch.zeros(1)}, "3 is a Tensor"),
    ],
)
def test_bin_without_a_dictionary_of_tensors_is_refused(content: object, told: str, folder: Path):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    message = refusal(lambda: load_model(folder))
    assert message == f"{folder / 'pytorch_model.bin'}: {told}, expected a dictionary of tensors"


@pytest.mark.parametrize("model_type", ["llava_mistral", "llama", ...])
def test_other_models_are_refused(model_type: str, folder: Path):
    """A Mistral's keys are a Llama's: nothing later would tell."""
    edit_json(folder / "config.json", model_type=model_type)
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder / 'config.json'}: model_type is ")
    assert "expected 'llava_llama'" in message


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model_type": "convnextv2"}, "model_type is 'convnextv2', expected 'convnext'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
        ({"num_channels": 4}, "num_channels is 4, expected 3"),
        ({"patch_size": 8}, "patch_size is 8, expected 4"),
        ({"num_stages": 4}, "num_stages is 4, but depths are [1, 1, 2, 1, 2]"),
        ({"depths": ...}, "no key 'depths'"),
        ({"hidden_sizes": WIDTHS[:4]}, "a depth and a width each"),
        ({"hidden_sizes": None}, "NoneType"),
    ],
)
def test_other_encoders_are_refused(change: dict, told: str, folder: Path):
    file = folder / "vision_tower" / "config.json"
    edit_json(file, **change)
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{file}: ")
    assert told in message


@pytest.mark.parametrize(
    "change, told",
    [
        ({"mm_projector_type": "resampler"}, "mm_projector_type: unknown projector 'resampler'"),
        ({"mm_projector_type": "identity"}, f"'identity' cannot turn {WIDTHS[-1]} features into {HIDDEN}"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "spiral"),
        ({"hidden_act": "swoosh"}, "swoosh"),
        ({"hidden_size": "wide"}, "int"),
        ({"rope_parameters": [1]}, "not a Llama's configuration"),
    ],
)
def test_impossible_configurations_are_named(change: dict, told: str, folder: Path):
    edit_json(folder / "config.json", **change)
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert told in message
