"""Low-rank adapters on the decoder (arXiv 2106.09685), by peft: y = W x + (alpha / rank) B A x."""

import warnings

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from train.recipe import Lora, RecipeError

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
