"""Comparisons with the reference and their bounds."""

from dataclasses import dataclass

import numpy as np

from runtime.errors import UserError


class ParityError(Exception):
    """An exported graph does not compute what the checkpoint does; the table above the message says where."""

    exit_code = 1


@dataclass(frozen=True)
class Difference:
    """One comparison with the reference; `error` is the norm of the difference over the norm of the reference."""

    what: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN

    def __str__(self) -> str:
        return f"{self.what:<42} {self.error:>10.2e} {self.bound:>10.0e}  {'ok' if self.ok else 'TOO LARGE'}"


def compare(what: str, found: np.ndarray, reference: np.ndarray, bound: float) -> Difference:
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    if found.shape != reference.shape:
        raise UserError(f"{what}: shape {found.shape}, but the reference has {reference.shape}")
    error = np.linalg.norm(found - reference) / max(np.linalg.norm(reference), 1e-30)
    return Difference(what, float(error), bound)


def report(rows: list[Difference]) -> bool:
    """Print the table; True if every row is within its bound."""
    print(f"{'relative error against PyTorch':<42} {'found':>10} {'bound':>10}")
    print(*rows, sep="\n", flush=True)
    return all(row.ok for row in rows)
