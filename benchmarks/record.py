"""What every results file says beside its figures: the machine, the versions, the command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "gguf",
    "nncf",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "optimum-onnx",
    "polygraphy",
    "tensorrt_rtx_cu13",
    "timm",
    "torch",
    "transformers",
)
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def write(name: str, rows: list[dict], file: Path | None = None, more: dict | None = None) -> Path:
    """Write `file`, by default benchmarks/results/<name>.json; the command is the running process's own.

    more: further keys of the file.
    """
    from export.cli import installed_versions  # here, so that reading the results takes no torch

    module = sys.modules["__main__"].__spec__.name.removesuffix(".__main__")
    content = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": _commit(),
        "machine": {
            "processor": _cpuinfo("model name") or platform.processor(),
            "instructions": instructions(),
            "cores": os.cpu_count(),
            "memory_gib": _memory_gib(),
        },
        "versions": {"python": platform.python_version(), **installed_versions(PACKAGES)},
        **(more or {}),
        "rows": rows,
    }
    file = file or RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {os.path.relpath(file)}")
    return file


def instructions() -> list[str]:
    """Those of INSTRUCTIONS that the processor has."""
    flags = _cpuinfo("flags").split()
    return [name for name in INSTRUCTIONS if name in flags]


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def _cpuinfo(key: str) -> str:
    """What Linux says of the first processor; "" where it does not."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(key):
            return line.partition(":")[2].strip()
    return ""


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
