"""The parts of a model that a recipe names, and what of them is trained how.

    projector            between encoder and language model
    fifth_stage          the encoder's fifth stage
    encoder.stages.N     the encoder's stages from index N (0 to 4) on, the fifth included where there is one; as the
                         original's `tune_vit_from_layer N`
    encoder              the whole encoder, stem and fifth stage included
    language_model       the whole decoder, embedding and head included; with `lora`, its adapters alone

Where several of a recipe's parts hold a parameter, the one that comes first in this list decides its learning rate; of
several `encoder.stages.N`, the one with the highest N.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from train.errors import RecipeError
from train.recipe import FROM_STAGE, Recipe

_PREFIX = {"projector": "image_encoder.projector.", "encoder": "image_encoder.encoder.", "language_model": "decoder."}
_STAGE = re.compile(r"image_encoder\.encoder\.stages\.(\d+)\.")


def check_parts(train: Iterable[str], stages: int, projector: str) -> None:
    """Raises RecipeError for a part that there is none of in a model with `stages` stages and such a projector."""
    for part in train:
        if (match := FROM_STAGE.fullmatch(part)) and int(match[1]) >= stages:
            raise RecipeError(f"train: {part}, but this encoder has {stages} stages, the last is {stages - 1}")
    if "fifth_stage" in train and stages < 5:
        raise RecipeError(
            f"train: fifth_stage, but this encoder has {stages} stages; give it one with encoder.fifth_stage, or "
            "remove the part"
        )
    if "projector" in train and projector == "identity":
        raise RecipeError("train: projector, but this model's is the identity, which has no weights; remove the part")


def part_of(name: str, train: Iterable[str]) -> str | None:
    """The part in `train` that a ConvLLaVA's parameter is trained with; None for a frozen one."""
    return min((part for part in train if _holds(part, name)), key=_precedence, default=None)


def freeze_others(model: nn.Module, train: Iterable[str]) -> None:
    """Train the parts in `train` of a ConvLLaVA, or of a module with some of its children, and nothing else."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, train) is not None)


def parameter_groups(model: nn.Module, recipe: Recipe, prefix: str = "") -> list[dict[str, Any]]:
    """AdamW's groups for the trained parameters of a ConvLLaVA, or of a module that is `prefix` in one.

    Each at its part's learning rate. Weight decay is for matrices and kernels: as in the original's trainer, biases and
    norms have none, and nor have layer scales.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(prefix + name, recipe.train)
            rate = recipe.learning_rates.get(part, recipe.learning_rate)
            decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
            group["params"].append(parameter)
    return list(groups.values())


def _holds(part: str, name: str) -> bool:
    stage = int(match[1]) if (match := _STAGE.match(name)) else None
    if part == "fifth_stage":
        return stage == 4
    if match := FROM_STAGE.fullmatch(part):
        return stage is not None and stage >= int(match[1])
    return name.startswith(_PREFIX[part])


def _precedence(part: str) -> int:
    """Lower is closer."""
    match = FROM_STAGE.fullmatch(part)
    return -int(match[1]) if match else {"fifth_stage": -5, "encoder": 1}.get(part, 0)
