"""Nothing leaves the machine: no command looks up a name, connects to another machine or leaves files behind."""

import json
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bundles import CHECKPOINT
from tests.support.commands import run_module
from tests.support.network import Watch, compiled, kill
from tests.support.served import WAIT, free_port, wait_for

# What commands may leave in the home folder: hashes of bundles, and matplotlib's list of fonts
CACHES = (".cache/convllava-deploy/", ".cache/matplotlib/")
# What a process does that only loads ONNX Runtime, for longer than it waits before it sends
LOAD_ORT = "import time, onnxruntime; time.sleep(60)"
TELEMETRY_HOST = "mobile.events.data.microsoft.com"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("watch"))


@pytest.fixture
def watch(library: Path, tmp_path: Path) -> Watch:
    return Watch(library, tmp_path / "watched")


def assert_quiet(watch: Watch) -> None:
    assert watch.asked() == set()
    assert {file for file in watch.left() if not file.startswith(CACHES)} == set()


def test_the_watch_sees_what_onnx_runtime_does_unasked(watch):
    process = watch.start("-c", LOAD_ORT)
    try:
        wait_for(lambda: TELEMETRY_HOST in watch.asked())
    finally:
        kill(process)
    assert ".cache/Microsoft/DeveloperTools/.onnxruntime/deviceid" in watch.left()


def test_the_watch_sees_what_openvino_does_unasked(watch):
    watch.run("-c", "import openvino")
    assert watch.asked() == {"www.google-analytics.com"}


@pytest.mark.parametrize("code", [
    "import socket; socket.getaddrinfo('name.test', 80)",
    "import socket; socket.gethostbyname('name.test')",
    "import ctypes; ctypes.CDLL(None).gethostbyname(b'name.test')",
    "import urllib.request; urllib.request.urlopen('https://name.test')",
])  # fmt: skip
def test_the_watch_sees_look_ups(watch, code):
    watch.run("-c", f"try:\n {code}\nexcept OSError: pass")
    assert watch.asked() == {"name.test"}


@pytest.mark.parametrize("code", [
    "socket.create_connection(('192.0.2.1', 80))",
    "socket.create_connection(('2001:db8::1', 80))",
    "socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))",
])  # fmt: skip
def test_the_watch_sees_connections(watch, code):
    watch.run("-c", f"import socket\ntry:\n {code}\nexcept OSError: pass")
    assert watch.asked() in ({"192.0.2.1"}, {"2001:db8::1"})


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images for calibration."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(16):
        shutil.copy(CHECKPOINT.parent / f"case{number % 3}.png", folder / f"{number}.png")
    return folder


ASK = ("--image", CHECKPOINT.parent / "case0.png", "--prompt", "What?", "--max-new-tokens", 4)
# Command -> its arguments, of (bundle, folder with images, folder for its output)
COMMANDS: dict[str, Callable[[Path, Path, Path], tuple[object, ...]]] = {
    "infer": lambda bundle, pages, out: ("runtime.cli", "infer", "--bundle", bundle, *ASK),
    "infer openvino": lambda bundle, pages, out: ("runtime.infer", "--bundle", bundle, *ASK, "--encoder", "openvino"),
    "check": lambda bundle, pages, out: ("runtime.cli", "serve", "--bundle", bundle, "--check"),
    "export": lambda bundle, pages, out: ("runtime.cli", "export", "--checkpoint", CHECKPOINT, "--out", out),
    "encoder": lambda bundle, pages, out: ("export.encoder", "--checkpoint", CHECKPOINT, "--out", out),
    "decoder": lambda bundle, pages, out: ("export.decoder", "--checkpoint", CHECKPOINT, "--out", out),
    "parity": lambda bundle, pages, out: (
        *("runtime.cli", "parity", "--checkpoint", CHECKPOINT, "--bundle", bundle, *ASK),
    ),
    "engine": lambda bundle, pages, out: ("runtime.cli", "engine", "--bundle", bundle, "--target", "sm89"),
    "quantize": lambda bundle, pages, out: (
        *("runtime.cli", "quantize", "--bundle", bundle, "--data", pages, "--questions", 4, "--out", out),
    ),
    "quantize decoder": lambda bundle, pages, out: (
        *("runtime.cli", "quantize", "--part", "decoder", "--bundle", bundle, "--data", pages, "--out", out),
    ),
    "demo": lambda bundle, pages, out: ("runtime.cli", "demo"),
    "synth": lambda bundle, pages, out: ("train.synth", "--out", out, "--pages", 2),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_quiet(watch, conformance_bundle, pages, tmp_path, command):
    bundle = shutil.copytree(conformance_bundle, tmp_path / "bundle") if command == "engine" else conformance_bundle
    if command == "demo":
        run_module("train.model.demo").check_returncode()  # fetches the demo's language model where it is not there
    watch.run("-m", *COMMANDS[command](bundle, pages, tmp_path / "out"))
    assert_quiet(watch)


def test_training_is_quiet(watch, tmp_path):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It is 5."}]
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"id": n, "image": "case0.png", "conversations": talk} for n in range(4)]))
    recipe = tmp_path / "recipe.yaml"
    keys = {"out": str(tmp_path / "run"), "checkpoint": str(CHECKPOINT), "train": ["projector"], "learning_rate": 1e-3}
    keys |= {"global_batch": 2, "micro_batch": 2, "steps": 2, "workers": 0, "precision": "fp32"}
    keys |= {"data": [{"records": str(records), "images": str(CHECKPOINT.parent)}]}
    recipe.write_text(json.dumps(keys))
    watch.run("-m", "train", recipe)
    assert_quiet(watch)


def test_a_server_is_quiet(watch, conformance_bundle):
    """For longer than ONNX Runtime waits before it looks its host up."""
    port = free_port()
    process = watch.start("-m", "runtime.cli", "serve", "--bundle", conformance_bundle, "--port", port)
    try:
        wait_for(lambda: process.poll() is not None or ready(port))
        body = json.dumps({"messages": [{"role": "user", "content": "What?"}], "max_tokens": 4}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=WAIT) as answer:
            assert json.load(answer)["choices"]
        time.sleep(15)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=WAIT)
        assert process.returncode in (0, 143, -signal.SIGTERM), output
    finally:
        kill(process)
    assert_quiet(watch)


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=WAIT) as answer:
            return answer.status == 200
    except OSError:
        return False
