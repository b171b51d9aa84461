"""Scales of block-quantized weights as `runtime.kernels` reads them (`weight_format.h`). Codes are MatMulNBits' own."""

import numpy as np

from export.graphs.block_formats import BLOCK, step_multiples

GROUP = 16  # rows whose scales lie together
HALF_DIGITS, SMALLEST_EXPONENT = 14, -100  # the largest number of a row gets an exponent of the former in float16


def kernel_scales(
    bits: int, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, blocks: int
) -> tuple[np.ndarray, np.ndarray]:
    """The inputs beside the codes.

    Args:
        bits: 4 or 8, these without `zeros`.
        codes: uint8 [N, all blocks, BLOCK * bits / 8]. Those behind `blocks` blocks are of offsets, which multiply the
            means of x's blocks.
        scales: float32 [N, all blocks].
        zeros: uint8 [N, (all blocks + 1) / 2], or None.
        blocks: K / BLOCK.

    Returns:
        (scales uint8 [groups, blocks, bytes], units float32 [GROUP * groups]): int8 scales for symmetric blocks of 4
        bits whose scales are multiples of a unit of their row, else float16 scales, of 4 bits with a float16 offset.
    """
    if bits == 4 and zeros is None and codes.shape[1] == blocks and (found := step_multiples(scales)):
        multiples, units = found
        return _grouped(multiples[..., None]), _units(units)
    given = scales[:, :blocks]
    if bits == 8:
        units = _half_units(np.abs(given))
        return _grouped(_halves(given, units)[..., None]), _units(units)
    points = np.full(scales.shape, 8, np.uint8) if zeros is None else _nibbles(zeros)[:, : scales.shape[1]]
    rest = _rest(codes[:, blocks:], scales[:, blocks:], points[:, blocks:], blocks)
    units = _half_units(np.maximum(np.abs(given), np.abs(rest - given * points[:, :blocks])))
    halves = _halves(given, units)
    rounded = halves.astype(np.float32) * units[:, None]
    offsets = _halves(rest - rounded * points[:, :blocks], units)  # so that they fit the scales as they are rounded
    return _grouped(np.stack([halves, offsets], -1)), _units(units)


def _rest(codes: np.ndarray, scales: np.ndarray, points: np.ndarray, blocks: int) -> np.ndarray:
    """What the blocks of offsets add to each weight of the others, float32 [N, blocks]."""
    if not codes.shape[1]:
        return np.zeros((len(codes), blocks), np.float32)
    levels = _nibbles(codes).astype(np.float32) - points[..., None]
    return (levels * scales[..., None] / BLOCK).reshape(len(codes), -1)[:, :blocks]


def _nibbles(pairs: np.ndarray) -> np.ndarray:
    return np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:-1], -1)


def _half_units(sizes: np.ndarray) -> np.ndarray:
    """Powers of two, float32 [N]: sizes [N, blocks] divided by them use the range of float16."""
    exponents = np.maximum(np.frexp(sizes.max(-1))[1], SMALLEST_EXPONENT)
    return np.ldexp(np.float32(1), exponents - HALF_DIGITS)


def _halves(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    return (values / units[:, None]).astype(np.float16)


def _grouped(values: np.ndarray) -> np.ndarray:
    """[N, blocks, kinds] -> uint8 [groups, blocks, bytes]: of a block, the values of a group of rows, kind by kind."""
    rows, blocks, kinds = values.shape
    padded = np.pad(values, ((0, -rows % GROUP), (0, 0), (0, 0))).reshape(-1, GROUP, blocks, kinds)
    return np.ascontiguousarray(padded.transpose(0, 2, 3, 1)).view(np.uint8).reshape(len(padded), blocks, -1)


def _units(units: np.ndarray) -> np.ndarray:
    return np.pad(units.astype(np.float32), (0, -len(units) % GROUP))
