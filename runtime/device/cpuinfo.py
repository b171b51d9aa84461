"""What the processor can do."""

import platform
from pathlib import Path


def int8_sums_saturate(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor adds products of bytes in 16 bits, as x86 does without VNNI: sums above 32,767 are cut off
    unless a library takes care. cpuinfo: Linux's description of the processor; without it the answer is yes."""
    return is_x86() and not {"avx512_vnni", "avx_vnni"} & processor_flags(cpuinfo)


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What Linux says that the processor has, such as `avx2`; empty where it does not say."""
    return set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
