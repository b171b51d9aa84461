"""The configurations of the released layout, for checkpoints that are made here."""

from typing import Any

from transformers import LlamaConfig

from train.model.encoder import EncoderConfig


def language_config(llama: LlamaConfig) -> dict[str, Any]:
    """What a LlavaConfig says of its Llama, but for `rope_theta` and `torch_dtype`."""
    return {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": llama.hidden_size,
        "intermediate_size": llama.intermediate_size,
        "max_position_embeddings": llama.max_position_embeddings,
        "num_attention_heads": llama.num_attention_heads,
        "num_hidden_layers": llama.num_hidden_layers,
        "num_key_value_heads": llama.num_key_value_heads,
        "rms_norm_eps": llama.rms_norm_eps,
        "tie_word_embeddings": llama.tie_word_embeddings,
        "vocab_size": llama.vocab_size,
    }


def llava_config(encoder: EncoderConfig, projector: str, resolution: int) -> dict[str, Any]:
    """What a LlavaConfig has beside its Llama's keys. resolution: side of the images, pixels."""
    return {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_hidden_size": encoder.widths[-1],
        "mm_projector_type": projector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_resolution": resolution,
        "mm_vision_select_layer": -1,
        "mm_vision_tower": "vision_tower",
        "vision_add_five_stage": 0,
    }


def vision_config(encoder: EncoderConfig) -> dict[str, Any]:
    """The image encoder's config.json, a fifth stage among its stages."""
    return {
        "model_type": "convnext",
        "depths": list(encoder.depths),
        "hidden_sizes": list(encoder.widths),
        "hidden_act": "gelu",
        "layer_scale_init_value": encoder.layer_scale,
        "norm_eps": encoder.norm_eps,
        "num_channels": 3,
        "num_stages": len(encoder.depths),
        "patch_size": encoder.patch_size,
    }


def preprocessor_config(mean: tuple[float, ...], std: tuple[float, ...], side: int) -> dict[str, Any]:
    """The image encoder's preprocessor_config.json. mean, std: of pixels from 0 to 1. side: of the images, pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        **sized(side),
        "image_mean": list(mean),
        "image_std": list(std),
        "resample": 3,
    }


def sized(side: int) -> dict[str, Any]:
    """The keys of a preprocessor_config.json that say how large images are."""
    return {"crop_size": {"height": side, "width": side}, "size": {"shortest_edge": side}}
