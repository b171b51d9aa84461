"""Checkpoints that transformers and torch wrote, read by ours."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextModel

from tests.support.checkpoints import (
    GQA,
    HIDDEN,
    QUERY,
    TIED,
    TOWER,
    VOCABULARY,
    WIDTHS,
    Parts,
    State,
    assert_same_logits,
    edit_json,
    refusal,
    rewrite,
    write_bin,
    write_json,
    write_old_bin,
    write_parameters,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)
from train.model import (
    Checkpoint,
    load_image_encoder,
    load_language_state,
    load_model,
    save_checkpoint,
)


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


@pytest.mark.parametrize(
    "size",
    [
        {"crop_size": 64, "size": 64},
        {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}},
        {"size": {"shortest_edge": 224}},  # CLIPImageProcessor crops 224 where nothing else is said
    ],
)
def test_resolution_is_read_from_every_kind_of_preprocessor(size: dict, folder: Path):
    file = folder / "vision_tower" / "preprocessor_config.json"
    write_json(file, size)
    assert Checkpoint.open(folder).resolution == (224 if "crop_size" not in size else 64)
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
