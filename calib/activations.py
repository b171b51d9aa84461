"""How large the values are that convolutions and products take, on calibration images, and the ranges that follow.

One histogram of magnitudes for each tensor, whose bins are a power of two wide, so that it does not depend on the order
of the images and serves every method. It is kept in a file and goes on where it was interrupted.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx

from calib.pieces import Pieces
from runtime.bundle.verify import file_sha256
from runtime.errors import UserError

METHODS = ("mse", "minmax", "percentile")
QUANTIZED = ("Conv", "MatMul")
BINS = 2048  # of a histogram; at least half of them hold something
LARGEST = {"int8": 127.0, "fp8": 448.0}  # fp8: E4M3
REMOVED_METHODS = {"entropy": "mse loses less (ANLS 0.963 against 0.935 on the demo model); use --method mse"}
KINDS = {"int8": np.dtype(np.int8), "fp8": np.dtype(ml_dtypes.float8_e4m3fn)}
PERCENTILE = 99.99
CHUNK = 1 << 15  # values that are counted at a time, within the caches
CANDIDATES = np.linspace(0.1, 1.0, 91)  # thresholds that are tried, of the largest magnitude
INPUT = "pixel_values"
CUT_AFTER = "Conv"  # a block of the encoder at a time


def activations_of(graph: onnx.GraphProto) -> list[str]:
    """What convolutions and products with weights take, in the order of the graph, each once."""
    weights = {tensor.name for tensor in graph.initializer}
    taken = [node.input[0] for node in graph.node if node.op_type in QUANTIZED and node.input[1] in weights]
    return list(dict.fromkeys(taken))


@dataclass
class Histogram:
    """Of magnitudes. counts: int64 [BINS], bin i from i to i + 1 times `width`. largest: exactly."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    width: float = 0.0
    largest: float = 0.0

    def add(self, values: np.ndarray) -> bool:
        """values: float32. Returns False, and counts nothing, where one is not finite."""
        flat = values.reshape(-1)
        largest = max(-float(flat.min(initial=0.0)), float(flat.max(initial=0.0)))
        if not np.isfinite(largest):
            return False
        if largest > 0:
            self._widen(float(np.exp2(np.frexp(largest)[1])) / BINS)
        self.largest = max(self.largest, largest)
        per_bin = np.float32(1 / (self.width or 1.0))  # exact: widths are powers of two
        scaled, bins = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int64)
        for begin in range(0, flat.size, CHUNK):
            part = flat[begin : begin + CHUNK]
            np.multiply(part, per_bin, out=scaled[: part.size])
            np.abs(scaled[: part.size], out=scaled[: part.size])
            bins[: part.size] = scaled[: part.size]
            self.counts += np.bincount(bins[: part.size], minlength=BINS)
        return True

    def _widen(self, width: float) -> None:
        while 0 < self.width < width:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros_like(pairs)])
            self.width *= 2
        self.width = max(self.width, width)

    def threshold(self, method: str, precision: str = "int8") -> float:
        """The magnitude that the largest value of the precision stands for. method: one of `METHODS`."""
        if method == "minmax" or self.largest == 0:
            return self.largest
        if method == "mse":
            return self._mse(precision)
        return min(self._percentile(), self.largest)

    def _mse(self, precision: str) -> float:
        """Least squared error of rounding and clipping together."""
        filled = np.nonzero(self.counts)[0]
        centres, counts = (filled + 0.5) * self.width, self.counts[filled]
        scales = self.largest * CANDIDATES[:, None] / LARGEST[precision]
        levels = np.minimum(centres / scales, LARGEST[precision])
        levels = np.rint(levels) if precision == "int8" else levels.astype(KINDS[precision]).astype(np.float64)
        errors = np.square(levels * scales - centres) @ counts
        return float(self.largest * CANDIDATES[errors.argmin()])

    def _percentile(self) -> float:
        share = np.cumsum(self.counts) / self.counts.sum()
        return self.width * float(np.searchsorted(share, PERCENTILE / 100) + 1)


class Activations:
    """The histograms of a graph's tensors over calibration images.

    source: a float32 graph. file: where they are kept from image to image; None keeps them nowhere.
    Raises UserError where `file` holds another model's.
    """

    def __init__(self, source: Path, file: Path | None = None):
        self._source, self._file = source, file
        self._model = _hash_of(source)
        graph = onnx.load(str(source), load_external_data=False).graph
        names = activations_of(graph)
        self._outputs = [value.name for value in graph.output]
        self.histograms = {name: Histogram() for name in names}
        self._images: list[str] = []
        if file is not None and file.exists():
            self._read(file)

    def collect(self, images: Iterable[tuple[str, np.ndarray]]) -> None:
        """images: (name, float32 [1, 3, H, W]) each; those that the file holds already are passed over.

        Raises UserError where the file begins with other images, and for a tensor that is not finite, naming it and
        the image.
        """
        known = list(self._images)
        seen = 0
        pieces = None
        for name, pixels in images:
            digest = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()
            seen += 1
            if seen <= len(known):
                if digest != known[seen - 1]:
                    raise self._other_images()
                continue
            pieces = pieces or Pieces(self._source, [*self.histograms, *self._outputs], CUT_AFTER)
            for values in pieces({INPUT: pixels}):
                self._add(name, values)
            self._images.append(digest)
            self._write()
        if seen < len(known):
            raise self._other_images()

    def _other_images(self) -> UserError:
        return UserError(f"{self._file} holds ranges of other images; delete it or name another --cache")

    def _add(self, image: str, values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            finite = self.histograms[name].add(value) if name in self.histograms else np.isfinite(value).all()
            if not finite:
                raise UserError(f"{name} is not finite on {image}; the checkpoint or the image is broken")

    def ranges(self, method: str, precision: str = "int8") -> tuple[dict[str, float], list[str]]:
        """(largest magnitude of each tensor that is told apart, warnings that name a tensor). method: of `METHODS`."""
        found = {name: histogram.threshold(method, precision) for name, histogram in self.histograms.items()}
        zero = [name for name, largest in found.items() if largest == 0]
        return found, [f"{name} is zero on every calibration image; its scale means nothing" for name in zero]

    def _read(self, file: Path) -> None:
        try:
            with np.load(file) as kept:
                model, names = str(kept["model"]), kept["names"].tolist()
                counts, widths, largest = kept["counts"], kept["widths"].tolist(), kept["largest"].tolist()
                images = kept["images"].tolist()
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} cannot be read as ranges ({error}); delete it") from error
        if model != self._model or names != list(self.histograms) or counts.shape != (len(names), BINS):
            raise UserError(f"{file} holds ranges of another model; delete it or name another --cache")
        kept = zip(names, counts, widths, largest, strict=True)
        self.histograms = {name: Histogram(row, width, most) for name, row, width, most in kept}
        self._images = images

    def _write(self) -> None:
        if self._file is None:
            return
        histograms = list(self.histograms.values())
        partial = self._file.with_name(f".{self._file.name}.partial")
        with open(partial, "wb") as stream:
            np.savez(
                stream,
                model=self._model,
                images=self._images,
                names=list(self.histograms),
                counts=[histogram.counts for histogram in histograms],
                widths=[histogram.width for histogram in histograms],
                largest=[histogram.largest for histogram in histograms],
            )
        os.replace(partial, self._file)


def _hash_of(source: Path) -> str:
    data = source.with_name(f"{source.name}.data")
    return " ".join(file_sha256(file) for file in (source, data) if file.is_file())
