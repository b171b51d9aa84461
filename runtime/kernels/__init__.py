"""This project's own matmuls for 4-bit and 8-bit decoders, attention over int8 KV caches, and layers of an INT8
encoder, on the CPU, in C++.

They are compiled when the package is installed, where there is a C++ compiler. `_block_matmul` is a plain shared
library, built as an extension only so that setuptools builds it: it has no `PyInit_` function and cannot be imported.
ONNX Runtime loads it (`src/ort_op.cpp`) as operators of the domain `convllava`.
"""

import ctypes
import importlib.util
import os
from pathlib import Path

from runtime.device.cpuinfo import processor_flags

ACTIVATION_BITS = "convllava.activation_bits"  # entry of a session's options: 8, or 24 for the accuracy of float32
NEEDED = {"avx2", "fma", "f16c"}


def library() -> Path | None:
    """The compiled operators, for `SessionOptions.register_custom_ops_library`; None where they were not built."""
    found = importlib.util.find_spec("runtime.kernels._block_matmul")
    return Path(found.origin) if found and found.origin else None


def unavailable(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Why the kernels cannot be used here, or not faster than ONNX Runtime's; None if they can.

    Args:
        cpuinfo: Linux's description of the processor. One without AVX2 runs the scalar reference, which is slow: it is
            used only where the environment says CONVLLAVA_KERNELS=reference.
    """
    asked_for_reference = os.environ.get("CONVLLAVA_KERNELS") == "reference"
    if (missing := NEEDED - processor_flags(cpuinfo)) and not asked_for_reference:
        return f"the processor has no {', '.join(sorted(missing))}"
    if (found := library()) is None:
        return "they were not built: pip install --editable '.[cpu]' with a C++ compiler at hand (see -v)"
    try:
        ctypes.CDLL(str(found))
    except OSError as error:
        return f"their library cannot be loaded: {error}"
    return None
