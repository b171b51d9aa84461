"""Runs bundles: image and prompt -> text, with numpy, tokenizers, Pillow and ONNX Runtime; no PyTorch.

`runtime.load(bundle)` is where to begin. The names below are looked up on first use, so that importing the package
costs nothing. It turns the telemetry of other packages off (`runtime.telemetry`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from runtime.telemetry import switch_off

if TYPE_CHECKING:
    from runtime.backends.select import Backends
    from runtime.errors import UserError
    from runtime.model import Conversation, Model, load
    from runtime.types import Options, Piece, Result, Sampling, Trace

_HOMES = {
    "Backends": "runtime.backends.select",
    "Conversation": "runtime.model",
    "Model": "runtime.model",
    "Options": "runtime.types",
    "Piece": "runtime.types",
    "Result": "runtime.types",
    "Sampling": "runtime.types",
    "Trace": "runtime.types",
    "UserError": "runtime.errors",
    "load": "runtime.model",
}
__all__ = ["Backends", "Conversation", "Model", "Options", "Piece", "Result", "Sampling", "Trace", "UserError", "load"]
switch_off()


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
