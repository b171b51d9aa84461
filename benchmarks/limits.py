"""What the machine can do at best, measured: the bounds that other figures stand next to."""

import time

import torch


def read_bandwidth(threads: int, megabytes: int = 2000, rounds: int = 5) -> float:
    """GB/s of summing an array larger than any cache, the best of the rounds."""
    values = torch.ones(megabytes * 250_000)
    return megabytes / 1e3 / _least(values.sum, threads, rounds)


def matmul_rate(threads: int, size: int = 1536, rounds: int = 9) -> float:
    """GFLOP/s of a float32 product of square matrices, the best of the rounds."""
    one = torch.randn(size, size)
    return 2 * size**3 / 1e9 / _least(lambda: one @ one, threads, rounds)


def _least(work, threads: int, rounds: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = []
        for _ in range(rounds):
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)
    finally:
        torch.set_num_threads(before)
