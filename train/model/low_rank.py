"""What training changed in a model, small enough to ship beside weights that are there: low-rank factors, 8 bits."""

from collections.abc import Iterator

import torch
from torch import Tensor

A, B = ".lora_A", ".lora_B"  # change of `x.weight` = `x.lora_B` @ `x.lora_A`
SCALE = ".scale"


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
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        root = s[:rank].sqrt()
        stem = name.removesuffix(".weight")
        found[stem + B] = (u[:, :rank] * root).float()
        found[stem + A] = (root[:, None] * v[:rank]).float()
        worst = max(worst, float(s[rank:].norm() / s.norm()))
    return found, worst


def changed(base: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """The difference, float32, of every tensor that has changed. Raises ValueError where the keys differ."""
    return {name: change.float() for name, change in _changes(base, trained)}


def rounded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices (of convolutions: [out, in * h * w]) in 8 bits with a float32 scale for each row, or each column where
    there are fewer, as `name.scale`; vectors in float16. The error is at most half a 127th of the row's largest."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2:
            found[name] = tensor.half()
            continue
        matrix = tensor.flatten(1).float()
        axis = 1 if len(matrix) <= matrix.shape[1] else 0
        scale = matrix.abs().amax(axis, keepdim=True).clamp(min=1e-30) / 127
        found[name] = (matrix / scale).round().to(torch.int8).view(tensor.shape)
        found[name + SCALE] = scale
    return found


def restored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `rounded` was given, but for rounding, float32."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        scale = tensors.get(name + SCALE)
        whole = tensor.float() if scale is None else tensor.flatten(1).float() * scale
        found[name] = whole.view(tensor.shape)
    return found


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
        raise ValueError(f"not the same model: {', '.join(sorted(base.keys() ^ trained.keys())[:3])} in one alone")
    for name, before in base.items():
        change = trained[name].double() - before.double()
        if change.any():
            yield name, change
