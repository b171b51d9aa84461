"""Weights in 4 or 8 bits, in blocks of 32 along the input: the numbers."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

BLOCK = 32
METHODS = {"rtn": (4, 8), "q4_1": (4,)}  # and the bits it is for


@dataclass(frozen=True)
class Blocks:
    """A matrix [K, N] in blocks along K. levels: uint8 [N, blocks, BLOCK], 0 to 2**bits - 1; scales: float32
    [N, blocks]; zeros: uint8 [N, blocks], the level that stands for 0, or None: the one in the middle."""

    bits: int
    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        """MatMulNBits' inputs by the ending of their names, as it wants them packed."""
        packed = self.levels if self.bits == 8 else _pairs(self.levels)
        zeros = {} if self.zeros is None else {"zeros": _pairs(self.zeros)}
        return {f"Q{self.bits}": packed, "scales": self.scales, **zeros}


def nearest(weights: np.ndarray, bits: int) -> Blocks:
    """[K, N] around zero: the weight of a block that is furthest from it takes the lowest level."""
    blocks, half = _blocks(weights), 2 ** (bits - 1)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scales = np.where(furthest == 0, 1, furthest / -half).astype(np.float32)
    levels = np.clip(np.rint(blocks / scales) + half, 0, 2 * half - 1).astype(np.uint8)
    return Blocks(bits, levels, scales[..., 0])


def with_offsets(weights: np.ndarray) -> Blocks:
    """[K, N], K a multiple of BLOCK -> 4-bit blocks of K + K / BLOCK rows: those of `weights`, then what the mean of
    each block of inputs is multiplied by."""
    return Grid.of(weights).nearest(weights)


@dataclass(frozen=True)
class Grid:
    """Sixteen levels for each block of a matrix: level * step + lowest. steps, lowest: float32 [N, blocks]."""

    steps: np.ndarray
    lowest: np.ndarray

    @classmethod
    def of(cls, weights: np.ndarray) -> Self:
        """The least that [K, N] fits on, K a multiple of BLOCK."""
        blocks = _blocks(weights)
        lowest, highest = blocks.min(-1), blocks.max(-1)
        # Far from zero, an offset would leave more than half a step, and coarsen what 31 others leave
        step = (highest - lowest) / 15
        far = np.maximum(lowest, -highest) > step / 2
        lowest = np.where(far, np.minimum(lowest, 0), lowest)
        highest = np.where(far, np.maximum(highest, 0), highest)
        steps = (highest - lowest) / 15
        steps[steps == 0] = 1
        return cls(steps, lowest)

    def nearest(self, weights: np.ndarray) -> Blocks:
        """[K, N], each weight rounded to the nearest level."""
        levels = (_blocks(weights) - self.lowest[..., None]) / self.steps[..., None]
        return self.stored(np.clip(np.rint(levels), 0, 15).astype(np.uint8))

    def stored(self, levels: np.ndarray) -> Blocks:
        """levels: uint8 [N, blocks, BLOCK]."""
        zeros, rest = self._offsets()
        return Blocks(
            4,
            np.concatenate([levels, rest.levels], 1),
            np.concatenate([self.steps, rest.scales], 1),
            np.concatenate([zeros, np.full(rest.scales.shape, 8)], 1).astype(np.uint8),
        )

    def as_stored(self) -> Self:
        """The levels that products get: `lowest` is rounded when it is stored."""
        zeros, rest = self._offsets()
        means = (rest.levels.astype(np.float32) - 8) * rest.scales[..., None]
        offsets = means.reshape(len(means), -1)[:, : zeros.shape[1]] / BLOCK
        return replace(self, lowest=(offsets - zeros * self.steps).astype(np.float32))

    def _offsets(self) -> tuple[np.ndarray, Blocks]:
        """(the whole level that is nearest to zero [N, blocks], what the rest of the offsets is in blocks)."""
        zeros = np.clip(np.rint(-self.lowest / self.steps), 0, 15)
        return zeros, nearest((BLOCK * (self.lowest + zeros * self.steps)).T, 4)


def _blocks(weights: np.ndarray) -> np.ndarray:
    """[K, N] -> float32 [N, blocks, BLOCK], padded with zeros."""
    rows = weights.T.astype(np.float32)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK)))
    return padded.reshape(len(rows), -1, BLOCK)


def _pairs(levels: np.ndarray) -> np.ndarray:
    """Two levels of 4 bits in a byte, along the last axis."""
    padded = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, levels.shape[-1] % 2)])
    return padded[..., ::2] | padded[..., 1::2] << 4


def rounded(weights: np.ndarray, bits: int, method: str) -> Blocks:
    return with_offsets(weights) if method == "q4_1" else nearest(weights, bits)
