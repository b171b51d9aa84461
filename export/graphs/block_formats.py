"""Weights in 4 or 8 bits, in blocks of 32 along the input: the numbers."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

BLOCK = 32
METHODS = {"rtn": (4, 8), "q4_1": (4,)}  # and the bits it is for
LARGEST_STEP = 127  # of a symmetric grid, in units of its row
SMALLEST_STEP = 1e-30  # rows whose steps are smaller are 0
STEP_FACTORS = (0.85, 0.93, 1, 1.07)  # of the step that puts a block's furthest weight on the lowest level
CHUNK = 1 << 12  # blocks


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
    """[K, N] in symmetric blocks: 4 bits on a `SymmetricGrid`; in 8 bits the weight of a block that is furthest from
    zero takes the lowest level, and scales have the digits of a float16."""
    if bits == 4:
        return SymmetricGrid.of(weights).nearest(weights)
    blocks = _by_furthest(_blocks(weights), bits)
    mantissa, exponent = np.frexp(blocks.scales)
    return replace(blocks, scales=np.ldexp(np.rint(mantissa * 2**11), exponent - 11).astype(np.float32))


def _by_furthest(blocks: np.ndarray, bits: int) -> Blocks:
    half = 2 ** (bits - 1)
    scales = np.where((furthest := _furthest(blocks)) == 0, 1, furthest / -half).astype(np.float32)
    levels = np.clip(np.rint(blocks / scales[..., None]) + half, 0, 2 * half - 1).astype(np.uint8)
    return Blocks(bits, levels, scales)


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

    def _offsets(self) -> tuple[np.ndarray, Blocks]:
        """(the whole level that is nearest to zero [N, blocks], what the rest of the offsets is in blocks)."""
        zeros = np.clip(np.rint(-self.lowest / self.steps), 0, 15)
        return zeros, _by_furthest(_blocks((BLOCK * (self.lowest + zeros * self.steps)).T), 4)


@dataclass(frozen=True)
class SymmetricGrid:
    """Sixteen levels for each block of a matrix: (level - 8) * step. steps: float32 [N, blocks], which may be negative:
    whole multiples, up to LARGEST_STEP, of a unit of the row. One byte stores each."""

    steps: np.ndarray

    @classmethod
    def of(cls, weights: np.ndarray) -> Self:
        """For [K, N]: of some steps near that of the weight furthest from zero, and of those that fit their levels in
        the sense of least squares, the one whose rounding loses least."""
        rows = [_least_squares_steps(blocks) for blocks in _in_chunks(_blocks(weights))]
        return cls(_whole_steps(np.concatenate(rows)))

    def nearest(self, weights: np.ndarray) -> Blocks:
        """[K, N], each weight rounded to the nearest level."""
        blocks = _blocks(weights)
        levels = np.empty(blocks.shape, np.uint8)
        for chunk, steps, out in zip(*map(_in_chunks, (blocks, self.steps, levels)), strict=True):
            out[:] = _signed_levels(chunk, steps) + 8
        return self.stored(levels)

    def stored(self, levels: np.ndarray) -> Blocks:
        """levels: uint8 [N, blocks, BLOCK]."""
        return Blocks(4, levels, self.steps)


def step_multiples(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(int8 [N, blocks], units float32 [N]) whose products are the steps of a `SymmetricGrid`, or scales
    [N, blocks] of other blocks; None if these are no such products."""
    units = np.abs(steps).max(-1) / np.float32(LARGEST_STEP)
    multiples = np.rint(np.divide(steps, units[:, None], out=np.zeros_like(steps), where=units[:, None] > 0))
    exact = np.isfinite(units).all() and np.array_equal(multiples * units[:, None], steps)
    return (multiples.astype(np.int8), units) if exact else None


def _least_squares_steps(blocks: np.ndarray) -> np.ndarray:
    """float32 [N, blocks, BLOCK] -> [N, blocks]."""
    widest = _furthest(blocks) / -8
    widest[np.abs(widest) < SMALLEST_STEP] = 0
    best, least = widest, np.full(widest.shape, np.inf, np.float32)
    for factor in STEP_FACTORS:
        levels = _signed_levels(blocks, widest * np.float32(factor))
        # |blocks - step levels|^2 at the best step is |blocks|^2 - (blocks . levels)^2 / |levels|^2
        product, square = (levels * blocks).sum(-1), (levels * levels).sum(-1)
        step = product / np.maximum(square, 1)
        error = -step * product
        better = error < least
        best, least = np.where(better, step, best), np.where(better, error, least)
    return best


def _whole_steps(steps: np.ndarray) -> np.ndarray:
    """[N, blocks] rounded to multiples of a unit of each row. No step is 0."""
    largest = np.abs(steps).max(-1, keepdims=True)
    steps = np.where(largest > SMALLEST_STEP, steps, 1)
    mantissa, exponent = np.frexp(np.abs(steps).max(-1, keepdims=True) / LARGEST_STEP)
    units = np.ldexp(np.ceil(mantissa * 2**16), exponent - 16).astype(np.float32)  # so that multiples are exact
    multiples = np.rint(steps / units)
    multiples = np.where(multiples == 0, np.where(steps < 0, -1, 1), multiples)
    return (multiples * units).astype(np.float32)


def _signed_levels(blocks: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float32, -8 to 7."""
    inverse = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    levels = blocks * inverse[..., None]
    return np.clip(np.rint(levels, out=levels), -8, 7, out=levels)


def _in_chunks(rows: np.ndarray) -> list[np.ndarray]:
    """Views of some rows each, which fit a processor's cache."""
    count = max(1, CHUNK * BLOCK // max(1, rows.shape[1] * BLOCK))
    return [rows[begin : begin + count] for begin in range(0, len(rows), count)]


def _furthest(blocks: np.ndarray) -> np.ndarray:
    """The value of each block that is furthest from zero, [N, blocks]."""
    return np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]


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
