"""trtexec, or tensorrt_rtx, its namesake of TensorRT for RTX: the command that measures an engine, and what it says."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

TOOLS = {"tensorrt": "trtexec", "rtx": "tensorrt_rtx"}
TABLE = {
    "Latency": "latency_ms",
    "Enqueue Time": "enqueue_ms",
    "H2D Latency": "h2d_ms",
    "GPU Compute Time": "gpu_compute_ms",
    "D2H Latency": "d2h_ms",
}


class TrtexecError(Exception):
    """The tool ran and failed; the message ends with what it said last."""


def command(flavour: str, engine: Path, inputs: list[dict], shapes: dict[str, list[int]], profile: int) -> list[str]:
    """Measures an engine at `shapes`, input name -> shape within the optimisation profile.

    inputs: those of the engine's report; the tool is told the shapes of those that leave something open.
    """
    open_ones = [tensor["name"] for tensor in inputs if -1 in tensor["shape"]]
    sizes = ",".join(f"{name}:{'x'.join(map(str, shapes[name]))}" for name in open_ones)
    choice = [f"--useProfile={profile}"] if profile else []
    return [TOOLS[flavour], f"--loadEngine={engine}", f"--shapes={sizes}", *choice]


def command_line(flavour: str, engine: Path, inputs: list[dict], profiles: list[dict]) -> str:
    """For people to copy: at the shapes that the last profile, the decoder's decode or the encoder's only one, is
    tuned for."""
    usual = {name: sizes[1] for name, sizes in profiles[-1].items()}
    return shlex.join(command(flavour, engine, inputs, usual, len(profiles) - 1))


def on_path(flavour: str) -> bool:
    return shutil.which(TOOLS[flavour]) is not None


def measure(flavour: str, engine: Path, inputs: list[dict], shapes: dict[str, list[int]], profile: int) -> dict:
    """Run the tool and return its figures: `throughput_qps`, and min, max, mean, median and percentiles of
    `latency_ms`, `gpu_compute_ms`, ...

    Raises TrtexecError where it exits with an error, says that it failed, or prints no figures.
    """
    line = command(flavour, engine, inputs, shapes, profile)
    done = subprocess.run(line, capture_output=True, text=True, errors="replace")
    said = done.stdout + done.stderr
    tail = " / ".join(line.strip() for line in said.strip().splitlines()[-4:])
    if done.returncode or "&&&& FAILED" in said:
        raise TrtexecError(f"{TOOLS[flavour]} failed with status {done.returncode}: {tail}")
    figures = parse(said)
    if "throughput_qps" not in figures or "latency_ms" not in figures:
        raise TrtexecError(f"{TOOLS[flavour]} printed no throughput and latency: {tail}")
    return figures


def parse(text: str) -> dict:
    """The performance summary that trtexec prints."""
    figures = {}
    if match := re.search(r"Throughput: ([\d.]+) qps", text):
        figures["throughput_qps"] = float(match[1])
    for title, key in TABLE.items():
        if match := re.search(rf"(?m)(?:^|\] ){title}: (min = .*)$", text):
            pairs = re.findall(r"([\w()%]+) = ([\d.]+) ms", match[1])
            figures[key] = {re.sub(r"percentile\((\d+)%\)", r"p\1", name): float(value) for name, value in pairs}
    return figures
