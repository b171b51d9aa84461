"""What an export takes, from the sizes in config.json: memory, disk and time, against what the machine has.

Memory is what a process cannot give back, so without pages of mapped files. The constants were measured on two cores
with ConvNeXt-L at 1536 and layers of a Llama-7B.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.device.host_memory import available_bytes
from runtime.errors import UserError

if TYPE_CHECKING:  # estimates are computed without PyTorch
    from train.model import Checkpoint

GIB, GB = 1 << 30, 10**9
# Bits of a weight in the body of the decoder's graph, in its head, in its embeddings where they are not the head's
BITS = {
    "fp32": (32, 32, 32),
    "fp16": (16, 16, 16),
    "int8": (9, 9, 32),
    "int4": (5.3, 9, 32),
    "w4a16": (4.5, 4.5, 16),
}
# The same of what a bundle has beside it for the project's own operators
KERNEL_BITS = {"int8": (0.5, 0.5), "int4": (1.03, 0.5)}
ENCODER_KERNEL_BITS = {"fp32": 8}
VARIANTS = {"fp32": 2, "int8": 4, "int4": 4}  # graphs of a bundle's decoder that are compared
BASE_BYTES = 0.45 * GIB  # the process with its libraries
MAP_COPIES = 24  # of the encoder's largest feature map in float32, while a block is compared
MATRIX_COPIES = 3.5  # of the decoder's largest matrix in float32, while it is written or compared
LAYER_COPIES = 1.5  # of a decoder's layer in float32, while it is compared
# Seconds on one core
SECONDS_TO_START = 15
SECONDS_A_GB = 6  # written
SECONDS_A_TERAFLOP = 33  # of the encoder, once in PyTorch and once in ONNX Runtime
SECONDS_TO_ROUND = {"int8": 12, "int4": 30, "w4a16": 12}  # 10^9 weights
SECONDS_TO_COMPARE = 8  # 10^9 weights of a decoder


@dataclass(frozen=True)
class Sizes:
    """Of a checkpoint. depths, widths: of the encoder's stages; the others as in config.json."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    hidden: int
    layers: int
    mlp: int
    kv_share: float  # key and value heads to a query head
    vocabulary: int
    tied: bool  # embeddings and head are one matrix

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Sizes:
        encoder, llama = checkpoint.encoder_config, checkpoint.llama_config
        return cls(
            encoder.depths,
            encoder.widths,
            llama.hidden_size,
            llama.num_hidden_layers,
            llama.intermediate_size,
            llama.num_key_value_heads / llama.num_attention_heads,
            llama.vocab_size,
            llama.tie_word_embeddings,
        )

    @property
    def encoder_weights(self) -> int:
        blocks = sum(depth * (8 * width + 49) * width for depth, width in zip(self.depths, self.widths, strict=True))
        downsampling = sum(4 * a * b for a, b in zip(self.widths, self.widths[1:], strict=False))
        return blocks + downsampling + (self.widths[-1] + self.hidden) * self.hidden

    def encoder_flops(self, resolution: int) -> float:
        """Of one square image."""
        tokens = [(resolution / 4 / 2**i) ** 2 for i in range(len(self.depths))]
        sizes = zip(tokens, self.depths, self.widths, strict=True)
        return sum(2 * count * depth * (8 * width + 49) * width for count, depth, width in sizes)

    def largest_map(self, resolution: int) -> float:
        """Bytes of the encoder's largest hidden state in float32."""
        return max((resolution / 4 / 2**i) ** 2 * width * 4 for i, width in enumerate(self.widths))

    @property
    def layer_weights(self) -> int:
        return int(self.hidden * (self.hidden * (2 + 2 * self.kv_share) + 3 * self.mlp))

    @property
    def table(self) -> int:
        """Weights of the embeddings, and of the head."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class Job:
    """What is exported: precision of each graph, or None without it.

    variants: encoder and decoder get the other graphs of a bundle: for kernels, for prompts, with a float16 KV cache.
    """

    resolution: int
    encoder: str | None = None
    decoder: str | None = None
    portable: str | None = None
    check: str = "full"
    variants: bool = False


@dataclass(frozen=True)
class Estimate:
    """memory, disk: bytes; seconds: on the machine's cores."""

    memory: float
    disk: float
    seconds: float


def estimate(sizes: Sizes, job: Job, cores: int) -> Estimate:
    """Temporary files lie within what the output takes."""
    memory, disk, seconds = [0.0], 0.0, float(SECONDS_TO_START)
    if job.encoder is not None:
        kernel_bits = ENCODER_KERNEL_BITS.get(job.encoder, 0) if job.variants else 0
        disk += sizes.encoder_weights * (BITS[job.encoder][0] + kernel_bits) / 8
        if job.check == "full":
            memory.append(MAP_COPIES * sizes.largest_map(job.resolution))
            seconds += SECONDS_A_TERAFLOP * sizes.encoder_flops(job.resolution) / 1e12
    body = sizes.layers * sizes.layer_weights
    for precision in filter(None, (job.decoder, job.portable)):
        body_bits, head_bits, table_bits = BITS[precision]
        compared_graphs = int(job.check == "full")
        if job.variants and precision == job.decoder:
            more = KERNEL_BITS.get(precision, (0, 0))
            body_bits, head_bits = body_bits + more[0], head_bits + more[1]
            compared_graphs *= VARIANTS.get(precision, 1)
        disk += (body * body_bits + sizes.table * (head_bits + (0 if sizes.tied else table_bits))) / 8
        memory.append(MATRIX_COPIES * 4 * max(sizes.table, sizes.hidden * sizes.mlp))
        seconds += SECONDS_TO_ROUND.get(precision, 0) * (body + sizes.table) / 1e9
        if compared_graphs:
            memory.append(LAYER_COPIES * 4 * sizes.layer_weights)
            seconds += compared_graphs * SECONDS_TO_COMPARE * (body + sizes.table) / 1e9
    return Estimate(BASE_BYTES + max(memory), disk, (seconds + SECONDS_A_GB * disk / GB) / cores)


def require_room(sizes: Sizes, job: Job, out: Path, options: dict[str, str]) -> str:
    """A line with what `job` takes and what there is.

    Args:
        out: where the files are going to lie.
        options: `encoder` and `decoder` -> the command's option for that precision.

    Raises:
        UserError: it does not fit; with the option that would, if there is one. Or a file is in the way of `out`.
    """
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"--out {out}: {there} is a file, expected a folder")
    cores, memory = len(os.sched_getaffinity(0)), available_bytes()
    return check_room(sizes, job, memory, shutil.disk_usage(there).free, cores, options)


def check_room(sizes: Sizes, job: Job, memory: int | None, disk: int, cores: int, options: dict[str, str]) -> str:
    """The line of `require_room`, for `memory` and `disk` bytes that are available; None where unknown."""

    def fits(found: Estimate) -> bool:
        return (memory is None or found.memory <= memory) and found.disk <= disk

    needed = estimate(sizes, job, cores)
    line = f"{needed.memory / GIB:.1f} GiB of memory"
    line += "" if memory is None else f" ({memory / GIB:.1f} available)"
    line += f" and {_size(needed.disk)} of disk ({disk / GB:.1f} free)"
    if fits(needed):
        return f"the export takes about {line}, {max(needed.seconds / 60, 0.1):.1f} minutes on {cores} cores"
    for option, other in _alternatives(job, options):
        if fits(found := estimate(sizes, other, cores)):
            less = f"{option} takes {found.memory / GIB:.1f} GiB and {_size(found.disk)}"
            raise UserError(f"the export takes about {line}: it does not fit; {less}")
    raise UserError(f"the export takes about {line}: it does not fit, whatever its options")


def _size(disk: float) -> str:
    return f"{disk / GB:.1f} GB" if disk >= GB / 10 else f"{disk / 1e6:.0f} MB"


def _alternatives(job: Job, options: dict[str, str]) -> Iterator[tuple[str, Job]]:
    """(options to add, what is exported with them), from what changes the outcome least to what takes least."""
    changes: list[tuple[str, dict[str, str]]] = []
    if job.check == "full":
        changes.append(("--check none", {"check": "none"}))
    for part in ("encoder", "decoder"):
        precisions = ("fp16",) if part == "encoder" else ("fp16", "int8", "int4")
        current = getattr(job, part)
        if current in ("fp32", *precisions):
            smaller = precisions[precisions.index(current) + 1 if current in precisions else 0 :]
            changes += [(f"{options[part]} {precision}", {part: precision}) for precision in smaller]
    for option, change in changes:
        yield option, replace(job, **change)
    together = {key: value for _, change in changes for key, value in change.items()}
    if together:
        texts = {next(iter(change)): option for option, change in changes}
        yield " ".join(texts.values()), replace(job, **together)
