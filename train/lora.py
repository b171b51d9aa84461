"""Low-rank adapters on the decoder (arXiv 2106.09685), by peft: y = W x + (alpha / rank) B A x."""

import warnings

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from train.errors import CheckpointError, RecipeError
from train.model.low_rank import A, B, factors
from train.recipe import Lora

ROUNDED = 0.1  # of a difference, relative: what a checkpoint in 16 bits may have lost of it
_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def add_lora(decoder: nn.Module, lora: Lora) -> None:
    """Put adapters on `decoder` in place, and freeze everything else of it. B begins as 0: the output is the same.

    Raises RecipeError where no layer has one of the target names.
    """
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, decoder)
    except ValueError as error:
        raise RecipeError(f"lora.targets: {' '.join(str(error).split())}") from error
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_("lora_" in name)


@torch.no_grad()
def go_on_from(decoder: nn.Module, base: dict[str, Tensor], lora: Lora) -> None:
    """Put `base`, a decoder's state_dict in float32, under the adapters of `decoder`, which become what its weights
    have beyond that.

    Raises RecipeError where a weight without an adapter differs, or a difference has a higher rank than adapters.
    """
    state = merge_lora(decoder.state_dict(), lora)
    try:
        found, error = factors(base, {name: state[name] for name in base}, lora.rank)
    except KeyError as wrong:
        raise RecipeError(f"lora.base: has {wrong.args[0]}, which the checkpoint lacks") from wrong
    except (CheckpointError, RuntimeError) as wrong:  # other shapes
        raise RecipeError(f"lora.base: {wrong}") from wrong
    if error > ROUNDED:
        raise RecipeError(
            f"lora.base: what the checkpoint has beyond it is off by {error:.0%} in adapters of rank {lora.rank}"
        )
    scale = (lora.rank / lora.alpha) ** 0.5
    for stem in [key.removesuffix(A) for key in found if key.endswith(A)]:
        layer = decoder.get_submodule(stem)
        if not hasattr(layer, "base_layer"):
            raise RecipeError(f"lora.base: {stem} differs, which none of lora.targets names")
        a, b = (scale * found[stem + which] for which in (A, B))
        layer.base_layer.weight.copy_(base[f"{stem}.weight"])
        layer.lora_A.default.weight[: len(a)] = a
        layer.lora_B.default.weight[:, : len(a)] = b


def merge_lora(state: dict[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The state_dict of the model without adapters: W + (alpha / rank) B A in float32, under W's own name."""
    merged = {}
    for name, tensor in state.items():
        if _A in name or _B in name:
            continue
        if name.endswith(f"{_BASE}weight"):
            a, b = (state[name.replace(_BASE, which)].float() for which in (_A, _B))
            tensor = tensor.float() + (lora.alpha / lora.rank) * (b @ a)
        merged[name.replace(_BASE, ".")] = tensor
    return merged
