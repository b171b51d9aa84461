"""What the processor can do, and for whom first."""

import os
import platform
from contextlib import suppress
from pathlib import Path


def int8_sums_saturate(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether INT8 dot products are summed in 16 bits, as on x86 without VNNI: sums above 32,767 saturate unless a
    library takes care. cpuinfo: Linux's description of the processor; without it the answer is yes."""
    return is_x86() and not {"avx512_vnni", "avx_vnni"} & processor_flags(cpuinfo)


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The processor's features as Linux names them, such as `avx2`; empty on other systems."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def lower_priority(nice: int) -> None:
    """Add to the niceness of the calling thread, and of those that it starts; for good, where the system has such."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + nice)
