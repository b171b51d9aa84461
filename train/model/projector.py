"""The projector between encoder and decoder: LLaVA's `linear`, `mlpNx_gelu` and `identity`."""

import re

from torch import nn


def build_projector(kind: str, in_features: int, out_features: int) -> nn.Module:
    """features [..., in_features] -> image embeds [..., out_features].

    kind: `linear`; `mlpNx_gelu`, N linear layers with GELU between; `identity`, which needs equal sizes.
    Parameter names are those of the released checkpoints (`0.weight`, `2.weight`, ... for an MLP).
    Raises ValueError for another kind, or an identity between unequal sizes.
    """
    if kind == "linear":
        return nn.Linear(in_features, out_features)
    if kind == "identity":
        if in_features != out_features:
            raise ValueError(f"projector 'identity' cannot turn {in_features} features into {out_features}")
        return nn.Identity()
    if match := re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind):
        layers: list[nn.Module] = [nn.Linear(in_features, out_features)]
        for _ in range(int(match[1]) - 1):
            layers += [nn.GELU(), nn.Linear(out_features, out_features)]
        return nn.Sequential(*layers)
    raise ValueError(f"unknown projector {kind!r}, expected linear, mlpNx_gelu or identity")
