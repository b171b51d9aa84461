"""Products of this project's own, for decoders of 4 and 8 bits on x86 processors: `block_matmul.cpp`.

They are compiled when the package is installed, where there is a C++ compiler, and loaded into ONNX Runtime as
operators of the domain `convllava`.
"""

import ctypes
import importlib.util
from pathlib import Path

from runtime.device.cpuinfo import processor_flags

ACTIVATION_BITS = "convllava.activation_bits"  # entry of a session's options: 8, or 24 for products as of float32
NEEDED = {"avx2", "fma", "f16c"}


def library() -> Path | None:
    """The compiled operators, for `SessionOptions.register_custom_ops_library`; None where they were not built."""
    found = importlib.util.find_spec("runtime.kernels._block_matmul")
    return Path(found.origin) if found and found.origin else None


def unavailable(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why they cannot be used here, in words; None if they can."""
    if missing := NEEDED - processor_flags(cpuinfo):
        return f"the processor has no {', '.join(sorted(missing))}"
    if (found := library()) is None:
        return "they were not built: pip install --editable '.[cpu]' with a C++ compiler at hand (see -v)"
    try:
        ctypes.CDLL(str(found))
    except OSError as error:
        return f"their library cannot be loaded: {error}"
    return None
