"""Checkpoints unlike the released one, from folder to answer: bundle and runtime against PyTorch."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from export.bundle import export_bundle
from export.decoder.export import export_decoder
from export.parity import Reference, compare_image
from runtime.errors import UserError
from runtime.model import load
from train.model import (
    Checkpoint,
    ConvLLaVA,
    ConvNeXtEncoder,
    EncoderConfig,
    ImageEncoder,
    build_projector,
    save_checkpoint,
)

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
# depths, projector, Llama's keys, LLaVA's keys
VARIANTS = {
    "stride 32, linear projector": ((1, 1, 1, 1), "linear", {}, {}),
    "tied embeddings, one key-value head, identity": (
        (1, 1, 1, 1, 1), "identity", {"tie_word_embeddings": True, "num_key_value_heads": 1}, {},
    ),
    "last block skipped, centre crop, all heads": (
        (1, 1, 1, 1, 2), "mlp3x_gelu", {"num_key_value_heads": 4, "rope_theta": 5e5},
        {"image_aspect_ratio": "square", "mm_vision_select_layer": -2},
    ),
    "linear rotary scaling": ((1, 1, 1, 1, 1), "mlp2x_gelu", {"rope_scaling": {"type": "linear", "factor": 2.0}}, {}),
    "llama3 rotary scaling": ((1, 1, 1, 1, 1), "mlp2x_gelu", {"rope_scaling": LLAMA3_ROPE}, {}),
}  # fmt: skip


def make_checkpoint(conformance, folder, depths, projector, llama, llava) -> Checkpoint:
    """A random tiny model with the conformance checkpoint's tokenizer and preprocessing."""
    torch.manual_seed(1)
    widths = (8, 16, 24, 32, 64)[: len(depths)]
    encoder = ConvNeXtEncoder(EncoderConfig(depths, widths, layer_scale=0.3))
    llama = LLAMA | llama
    image_encoder = ImageEncoder(encoder, build_projector(projector, widths[-1], LLAMA["hidden_size"]))
    model = ConvLLaVA(image_encoder, LlamaForCausalLM(LlamaConfig(**llama)))
    for parameter in model.decoder.parameters():
        parameter.data.mul_(3)  # so that the answer is not one token again and again
    tower = conformance / "checkpoint" / "vision_tower"
    config = {"model_type": "llava_llama", "mm_vision_resolution": 320, "image_aspect_ratio": "pad"} | llava
    vision = {"depths": depths, "hidden_sizes": widths, "layer_scale_init_value": 0.3}
    preprocessor = json.loads((tower / "preprocessor_config.json").read_text())
    like = Checkpoint(
        conformance / "checkpoint", tower, llama | config | {"mm_projector_type": projector}, vision, preprocessor
    )
    save_checkpoint(model, like, folder, torch.float32)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bundle_answers_as_pytorch_does(conformance, tmp_path, variant):
    checkpoint = make_checkpoint(conformance, tmp_path / "checkpoint", *VARIANTS[variant])
    export_bundle(checkpoint, tmp_path / "bundle", checkpoint.resolution)
    image = str(conformance / "case0.png")
    rows, expected, result = compare_image(Reference(checkpoint), load(tmp_path / "bundle"), image, "What?", 16)
    assert all(row.ok for row in rows), rows
    assert result.token_ids == expected
    assert result.visual_tokens == (320 // checkpoint.encoder_config.stride) ** 2


def test_rotary_scaling_that_no_table_can_hold_is_refused(conformance, tmp_path):
    rope = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    checkpoint = make_checkpoint(conformance, tmp_path / "checkpoint", (1, 1, 1, 1, 1), "mlp2x_gelu", rope, {})
    with pytest.raises(UserError, match="dynamic"):
        export_decoder(checkpoint, tmp_path / "decoder", "fp32")
