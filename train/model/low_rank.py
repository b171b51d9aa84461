"""What training changed in a model, as low-rank factors: small enough to ship beside weights that are there already."""

from collections.abc import Iterator

import torch
from torch import Tensor

A, B = ".lora_A", ".lora_B"  # change of `x.weight` = `x.lora_B` @ `x.lora_A`


def factors(base: dict[str, Tensor], trained: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """The best approximation of every changed matrix's difference by factors of `rank` (truncated SVD).

    base, trained: state_dicts with the same keys. Returns `name.lora_B` [out, rank] and `name.lora_A` [rank, in] for
    each changed `name.weight`, and the largest relative error (Frobenius) of a difference; 0, but for rounding, where
    training itself added factors of this rank or less.
    Raises ValueError where the keys differ or a tensor that is no matrix has changed.
    """
    found, worst = {}, 0.0
    for name, change in _changes(base, trained):
        if change.ndim != 2 or not name.endswith(".weight"):
            raise ValueError(f"{name} was trained, and is not a matrix that factors could stand for")
        worst = max(worst, _factorise(found, name, change, rank))
    return found, worst


def factors_or_whole(base: dict[str, Tensor], trained: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """As `factors`, for tensors of any shape.

    A convolution's weights [out, in, h, w] are a matrix [out, in * h * w]; what factors would not make smaller is
    returned as it is, under its own name.
    """
    found, worst = {}, 0.0
    for name, change in _changes(base, trained):
        matrix = change.flatten(1) if change.ndim > 1 else change[:, None]
        if not name.endswith(".weight") or rank * sum(matrix.shape) >= matrix.numel():
            found[name] = trained[name]
        else:
            worst = max(worst, _factorise(found, name, matrix, rank))
    return found, worst


def add_factors(state: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Add the changes to a state_dict in place, in its own types; tensors that came whole take the place of what is
    there. Raises KeyError for a weight it lacks."""
    for key, value in found.items():
        if key.endswith(B):
            stem = key.removesuffix(B)
            weight = state[f"{stem}.weight"]
            weight += (value.float() @ found[stem + A].float()).view_as(weight).to(weight.dtype)
        elif not key.endswith(A):
            state[key].copy_(value)


def _changes(base: dict[str, Tensor], trained: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and difference, float64, of every tensor that has changed."""
    if base.keys() != trained.keys():
        raise ValueError(f"not the same model: {', '.join(sorted(base.keys() ^ trained.keys())[:3])} in one alone")
    for name, before in base.items():
        change = trained[name].double() - before.double()
        if change.any():
            yield name, change


def _factorise(found: dict[str, Tensor], name: str, change: Tensor, rank: int) -> float:
    """Put the factors of a matrix into `found`; returns the relative error."""
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    root, stem = s[:rank].sqrt(), name.removesuffix(".weight")
    found[stem + B] = (u[:, :rank] * root).float()
    found[stem + A] = (root[:, None] * v[:rank]).float()
    return float(s[rank:].norm() / s.norm())
