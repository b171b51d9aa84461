"""Switches that keep other packages from telling their makers how they are used."""

import os
import sys
from typing import Any, cast

# Environment variable -> the value that turns telemetry off. What a user has set is kept: that is how one asks for it.
SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime: a host of Microsoft's, and a device ID under the user's cache
    "RAY_USAGE_STATS_ENABLED": "0",  # Ray: usage statistics of a cluster that this process starts
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and transformers, timm and peft through it
}


def switch_off() -> None:
    """Set SWITCHES, and hide `openvino_telemetry`, which has no such variable.

    OpenVINO and NNCF tell an analytics host that they are imported, and write a client ID, unless this package is
    missing. A program that wants it so imports it first. Switches are read when a package is imported, so that this
    comes before such imports.
    """
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))


def is_off(name: str) -> bool:
    """Whether the variable has the value that turns telemetry off."""
    return os.environ.get(name) == SWITCHES[name]
