"""The PyTorch model and its checkpoints: ConvNeXt with a fifth stage, projector, Llama decoder."""

from train.model.checkpoint.layout import Checkpoint
from train.model.checkpoint.load import (
    check_finite,
    load_embedding,
    load_image_encoder,
    load_language_state,
    load_model,
)
from train.model.checkpoint.save import save_checkpoint, save_image_encoder, save_state
from train.model.convllava import IGNORE_INDEX, IMAGE_TOKEN_INDEX, ConvLLaVA, ImageEncoder
from train.model.encoder import VARIANTS, ConvNeXtEncoder, EncoderConfig
from train.model.projector import build_projector

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "VARIANTS",
    "Checkpoint",
    "ConvLLaVA",
    "ConvNeXtEncoder",
    "EncoderConfig",
    "ImageEncoder",
    "build_projector",
    "check_finite",
    "load_embedding",
    "load_image_encoder",
    "load_language_state",
    "load_model",
    "save_checkpoint",
    "save_image_encoder",
    "save_state",
]
