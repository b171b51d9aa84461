"""The model a run starts from: a checkpoint in the released layout, or an encoder, a projector and a language model.

Opening (`Source.open`) reads configurations alone, so that what does not fit is known before gigabytes are read.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from train.errors import CheckpointError, RecipeError
from train.model import (
    Checkpoint,
    ConvLLaVA,
    ConvNeXtEncoder,
    EncoderConfig,
    ImageEncoder,
    build_projector,
    load_language_state,
    load_model,
)
from train.model.checkpoint.layout import folder_or_hub, refuse_parts
from train.model.checkpoint.tensors import read_json
from train.model.configs import llava_config, preprocessor_config, sized, vision_config
from train.recipe import Encoder, Recipe

DEFAULT_RESOLUTION = 768  # of a new model; the original's first


@dataclass(frozen=True)
class Source:
    """What a run starts from, opened but not loaded.

    like: the configurations and tokenizer files that the run's checkpoints are written with. `checkpoint`: what is
    read, None where the model is put together. encoder_config: of the model to be trained, new fifth stage included.
    """

    like: Checkpoint
    checkpoint: Checkpoint | None
    encoder_config: EncoderConfig
    recipe: Recipe

    @classmethod
    def open(cls, recipe: Recipe) -> "Source":
        """Raises CheckpointError or RecipeError where there is no such thing, or it is not what it should be."""
        if recipe.checkpoint is not None:
            checkpoint = Checkpoint.open(recipe.checkpoint)
            config = checkpoint.encoder_config
            return cls(_as_trained(checkpoint, recipe), checkpoint, config, recipe)
        _check_projector(recipe.projector, 1, 1)  # its name, before anything is fetched
        config, preprocessor = _encoder_to_build(recipe.encoder)
        language = _open_llama(recipe.language_model)
        like = dataclasses.replace(
            language,
            config=language.config
            | llava_config(config, recipe.projector, recipe.resolution or DEFAULT_RESOLUTION)
            | {"tokenizer_model_max_length": recipe.max_length},
            vision_config=vision_config(config),
            preprocessor=preprocessor,
        )
        _check_projector(recipe.projector, config.widths[-1], like.llama_config.hidden_size)
        return cls(_as_trained(like, recipe), None, config, recipe)

    def load(self) -> ConvLLaVA:
        """The model in float32; what is new is drawn from torch's global generator."""
        if self.checkpoint:
            return load_model(self.checkpoint)
        encoder = _build_encoder(self.recipe.encoder, self.encoder_config)
        llama = self.like.llama_config
        decoder = LlamaForCausalLM.from_pretrained(
            None, config=llama, state_dict=load_language_state(self.like, torch.float32), dtype=torch.float32
        )
        projector = build_projector(self.like.projector_type, self.encoder_config.widths[-1], llama.hidden_size)
        return ConvLLaVA(ImageEncoder(encoder, projector), decoder)

    def stored_dtype(self) -> torch.dtype | None:
        """Of the run's checkpoints: a model put together has its language model's; None: each tensor its own."""
        return None if self.checkpoint else next(self.like.language_tensors()).tensor.dtype


def _as_trained(like: Checkpoint, recipe: Recipe) -> Checkpoint:
    """`like` with what the recipe says of resolution, aspect and template, for whoever uses the checkpoints."""
    config = like.config | {"image_aspect_ratio": recipe.aspect}
    vision, preprocessor = like.vision_config, like.preprocessor
    if recipe.template and recipe.template != config.get("conversation_template", "vicuna_v1"):
        config["conversation_template"] = recipe.template
        config.pop("conversation_system", None)  # it was the other template's
    if recipe.system is not None:
        config["conversation_system"] = recipe.system
    if recipe.resolution and recipe.resolution != like.resolution:
        side = recipe.resolution
        config["mm_vision_resolution"] = side
        vision = vision | {"image_size": side}
        preprocessor = preprocessor | sized(side)
    return dataclasses.replace(like, config=config, vision_config=vision, preprocessor=preprocessor)


def _check_projector(kind: str, in_features: int, out_features: int) -> None:
    try:
        with torch.device("meta"):
            build_projector(kind, in_features, out_features)
    except ValueError as error:
        raise RecipeError(f"projector: {error}") from None


def _open_llama(source: str) -> Checkpoint:
    """A Llama's folder or Hub id, as a checkpoint without an encoder."""
    folder = folder_or_hub(source)
    refuse_parts(folder)
    config = read_json(folder / "config.json")
    if (kind := config.get("model_type")) != "llama":
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {kind!r}, expected 'llama'")
    return Checkpoint(folder, folder, config, {}, {})


def _encoder_to_build(encoder: Encoder) -> tuple[EncoderConfig, dict[str, Any]]:
    """The shape of a new model's encoder, fifth stage included, and its preprocessor_config.json."""
    if encoder.variant:
        try:
            config = EncoderConfig.from_variant(encoder.variant)
        except ValueError as error:
            raise RecipeError(f"encoder.variant: {error}") from None
        preprocessor = preprocessor_config(
            OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, DEFAULT_RESOLUTION
        )  # which every ConvLLaVA was trained with
    elif encoder.timm:
        model = _timm_model(encoder.timm, pretrained=False)
        config = _timm_config(model)
        mean, std = (model.pretrained_cfg[key] for key in ("mean", "std"))
        preprocessor = preprocessor_config(mean, std, DEFAULT_RESOLUTION)
    else:
        tower = _open_convnext(encoder.pretrained)
        config = tower.encoder_config
        preprocessor = preprocessor_config(*tower.pixel_statistics, DEFAULT_RESOLUTION)
    if encoder.layer_scale is not None:
        if config.layer_scale <= 0:
            raise RecipeError("encoder.layer_scale: this encoder's blocks have none; remove the key")
        config = dataclasses.replace(config, layer_scale=encoder.layer_scale)  # what is loaded overwrites its own
    if encoder.fifth_stage is None:
        return config, preprocessor
    if len(config.depths) == 5:
        raise RecipeError(f"encoder.fifth_stage: {encoder.pretrained} has one already; remove the key")
    depth, width = encoder.fifth_stage
    five = dataclasses.replace(config, depths=(*config.depths, depth), widths=(*config.widths, width))
    return five, preprocessor


def _build_encoder(encoder: Encoder, config: EncoderConfig) -> ConvNeXtEncoder:
    """The encoder with what is pretrained of it loaded. Raises CheckpointError where that does not fit."""
    built = ConvNeXtEncoder(config)
    if encoder.variant:
        return built
    found = _timm_state(encoder.timm) if encoder.timm else _convnext_state(encoder.pretrained)
    new = "stages.4." if encoder.fifth_stage else None
    expected = {name: tensor for name, tensor in built.state_dict().items() if not (new and name.startswith(new))}
    wrong = [name for name in expected.keys() | found.keys() if _shape(expected, name) != _shape(found, name)]
    if wrong:
        name = min(wrong)
        raise CheckpointError(
            f"{encoder.timm or encoder.pretrained}: {name}: expected shape {_shape(expected, name)}, found "
            f"{_shape(found, name)}; it is not a plain ConvNeXt"
        )
    built.load_state_dict(found, strict=False)
    return built


def _shape(state: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _open_convnext(source: str) -> Checkpoint:
    """A Hugging Face ConvNeXt's folder or Hub id, as a checkpoint without a language model."""
    folder = folder_or_hub(source)
    file = folder / "preprocessor_config.json"
    return Checkpoint(folder, folder, {}, read_json(folder / "config.json"), read_json(file) if file.is_file() else {})


def _convnext_state(source: str) -> dict[str, Tensor]:
    """By timm's names; a key that has none of those keeps its own."""
    tensors = _open_convnext(source).vision_tensors()
    return {item.name or item.key: item.tensor for item in tensors if not item.key.startswith("classifier.")}


def _timm_model(name: str, pretrained: bool) -> ConvNeXt:
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # an unknown name, or no network
        raise RecipeError(f"encoder.timm: {name}: {' '.join(str(error).split())}") from error
    if not isinstance(model, ConvNeXt):
        raise RecipeError(f"encoder.timm: {name} is a {type(model).__name__}, not a ConvNeXt")
    return model


def _timm_config(model: ConvNeXt) -> EncoderConfig:
    block = model.stages[0].blocks[0]
    return EncoderConfig(
        depths=tuple(len(stage.blocks) for stage in model.stages),
        widths=tuple(stage["num_chs"] for stage in model.feature_info),
        layer_scale=1e-6 if block.gamma is not None else 0.0,
        norm_eps=block.norm.eps,
    )


def _timm_state(name: str) -> dict[str, Tensor]:
    """Some of timm's have 1x1 convolutions for the blocks' linear layers, which compute the same."""
    state = _timm_model(name, pretrained=True).state_dict()
    return {
        name: tensor.flatten(1) if ".mlp.fc" in name and tensor.ndim == 4 else tensor
        for name, tensor in state.items()
        if name.startswith(("stem.", "stages."))
    }
