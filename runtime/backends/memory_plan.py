"""What a model's sequences and caches may take of the machine's memory."""

from dataclasses import dataclass

import numpy as np

from runtime.bundle.manifest import Bundle
from runtime.image.embedding_cache import DEFAULT_BYTES

DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "int8"}
KV_PRECISIONS = ("auto", *DTYPES)
AUTO_PRECISIONS = ("fp32", "fp16")
MAX_SLOTS = 8
# Attention over a float16 cache takes ONNX Runtime about twice as long: fewer slots in float32 decode more tokens
MIN_SLOTS = 2
PROCESS_BYTES = 512 << 20  # the interpreter, its libraries, and what a prompt takes in the decoder
ENCODER_BYTES_A_PIXEL = 640  # of activations, in ConvNeXt-L; smaller ones take less
CACHE_SHARE = 16  # at most one part of so many goes to image embeddings
CONTEXT_STEP = 64  # a context that had to be cut is a multiple of it
MIN_CONTEXT = 256


@dataclass(frozen=True)
class Costs:
    """What a bundle takes, bytes.

    Attributes:
        weights: of its encoder and decoder, mapped.
        encoder: activations of one image at the largest resolution.
        positions: KV precision -> one position of one sequence; the preferred precision first.
        context: positions of the model.
    """

    weights: int
    encoder: int
    positions: dict[str, int]
    context: int

    @classmethod
    def of(cls, bundle: Bundle, resolution: int = 0) -> "Costs":
        """resolution: of images, where it is larger than the bundle's."""
        graphs = tuple(filter(None, (bundle.encoder.file, bundle.decoder.file, bundle.decoder.kernels_file)))
        weights = sum(entry["size"] for file, entry in bundle.files.items() if file.startswith(graphs))
        parts = {name: bundle.decoder_with_cache(dtype) for name, dtype in DTYPES.items()}
        positions = {
            name: 2 * part.layers * part.kv_heads * part.kv_width * np.dtype(part.kv_dtype).itemsize
            for name, part in parts.items()
            if part is not None
        }
        side = max(bundle.image.resolution, resolution)
        return cls(weights, ENCODER_BYTES_A_PIXEL * side**2, positions, bundle.decoder.context_length)

    @property
    def fixed(self) -> int:
        """All but KV cache and embeddings."""
        return self.weights + self.encoder + PROCESS_BYTES


@dataclass(frozen=True)
class Plan:
    """What was chosen, and what it takes at most, bytes.

    Attributes:
        slots: sequences.
        context: positions of each.
        kv_precision: of the KV cache, fp32, fp16 or int8.
        cache_bytes: of image embeddings that are kept.
        costs: of the bundle.
        available: memory for all of it; None where that is not known.
    """

    slots: int
    context: int
    kv_precision: str
    cache_bytes: int
    costs: Costs
    available: int | None

    @property
    def kv_bytes(self) -> int:
        return self.slots * self.context * self.costs.positions[self.kv_precision]

    @property
    def total(self) -> int:
        return self.costs.fixed + self.cache_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        return self.available is None or self.total <= self.available

    def rows(self) -> list[tuple[str, str]]:
        """What takes how much, for people."""
        parts = (
            ("weights, mapped", self.costs.weights),
            ("KV cache", self.kv_bytes),
            ("image encoding", self.costs.encoder),
            ("image cache", self.cache_bytes),
            ("process", PROCESS_BYTES),
            ("total at most", self.total),
        )
        there = () if self.available is None else (("available", self.available),)
        return [(name, mebibytes(size)) for name, size in (*parts, *there)]

    def __str__(self) -> str:
        name = self.kv_precision
        return f"{self.slots} slots of {self.context} positions, KV cache in {name}: {mebibytes(self.kv_bytes)}"


def plan(
    costs: Costs,
    available: int | None,
    slots: int | None = None,
    context: int | None = None,
    kv_precision: str = "auto",
    cache_bytes: int | None = None,
) -> Plan:
    """What is not chosen yet comes down until all fits.

    A float16 KV cache is taken where fewer than `MIN_SLOTS` sequences (or than `slots`) fit in float32, and the context
    is cut where a single one does not fit.

    Args:
        costs: of the bundle.
        available: bytes of memory; None: no limit.
        slots, context, kv_precision, cache_bytes: chosen by the user; None and "auto": by this function.

    Returns:
        A plan that does not fit only where it cannot.
    """
    room = max(available - costs.fixed, 0) if available is not None else None
    if cache_bytes is None:
        cache_bytes = DEFAULT_BYTES if room is None else min(DEFAULT_BYTES, room // CACHE_SHARE)
    wanted, longest = slots or MAX_SLOTS, min(context or costs.context, costs.context)
    precisions = [name for name in AUTO_PRECISIONS if name in costs.positions]
    if kv_precision != "auto":
        precisions = [kv_precision]
    if room is None:
        return Plan(wanted, longest, precisions[0], cache_bytes, costs, None)
    room = max(room - cache_bytes, 0)
    counts = {name: min(wanted, room // (longest * costs.positions[name])) for name in precisions}
    enough = min(slots or MIN_SLOTS, wanted)
    name = next((name for name in precisions if counts[name] >= enough), precisions[-1])
    chosen = slots or max(counts[name], 1)
    if context is None and (positions := room // (chosen * costs.positions[name])) < longest:
        longest = min(longest, max(positions // CONTEXT_STEP * CONTEXT_STEP, MIN_CONTEXT))
    return Plan(chosen, longest, name, cache_bytes, costs, available)


def mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
