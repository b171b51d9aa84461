"""What training changed in a model, small enough to ship beside weights that are there: low-rank factors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from train.errors import CheckpointError

A, B = ".lora_A", ".lora_B"  # change of `x.weight` = `x.lora_B` @ `x.lora_A`


def factors(base: dict[str, Tensor], trained: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """The best approximation of every changed matrix's difference by factors of `rank` (truncated SVD).

    base, trained: state_dicts with the same keys. Returns `name.lora_B` [out, rank] and `name.lora_A` [rank, in] for
    each changed `name.weight`, and the largest relative error (Frobenius) of a difference; 0, but for rounding, where
    training itself added factors of this rank or less.
    Raises CheckpointError where the keys differ or a tensor that is no matrix has changed.
    """
    found, worst = {}, 0.0
    for name, change in _changes(base, trained):
        if change.ndim != 2 or not name.endswith(".weight"):
            raise CheckpointError(f"{name} was trained, and is not a matrix that factors could stand for")
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        root = s[:rank].sqrt()
        stem = name.removesuffix(".weight")
        found[stem + B] = (u[:, :rank] * root).float()
        found[stem + A] = (root[:, None] * v[:rank]).float()
        worst = max(worst, float(s[rank:].norm() / s.norm()))
    return found, worst


def add_factors(state: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add the changes to a state_dict in place, in its own types. Raises KeyError for a weight it lacks."""
    for key in found:
        if key.endswith(B):
            stem = key.removesuffix(B)
            weight = state[f"{stem}.weight"]
            weight += (found[key].float() @ found[stem + A].float()).to(weight.dtype)


def _changes(base: dict[str, Tensor], trained: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and difference, float64, of every tensor that has changed."""
    if base.keys() != trained.keys():
        raise CheckpointError(f"not the same model: {', '.join(sorted(base.keys() ^ trained.keys())[:3])} in one alone")
    for name, before in base.items():
        change = trained[name].double() - before.double()
        if change.any():
            yield name, change
