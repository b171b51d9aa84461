"""Ray Serve's replicas tell nobody of their use; what Ray itself looks up when a cluster starts is known."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.support.network import Watch, compiled
from tests.support.served import free_port

# Ray asks the kernel which of its addresses would reach these, and sends nothing there
ROUTES = {"8.8.8.8", "2001:4860:4860::8888"}
# Ray asks clouds' link-local metadata services where it runs
METADATA = {"169.254.169.254", "metadata.google.internal"}
DRIVER = """
import json, sys, time, urllib.request
from runtime.serve import ray_app
import ray
from ray import serve

bundle, folder, port, dashboard = sys.argv[1:]
ray.init(num_cpus=2, _temp_dir=folder, dashboard_port=int(dashboard), log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(ray_app.build({"bundle": bundle, "threads": "1"}))
body = json.dumps({"messages": [{"role": "user", "content": "What?"}], "max_tokens": 4}).encode()
with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/chat/completions", body) as answer:
    print(answer.read().decode())
time.sleep(14)  # longer than ONNX Runtime waits before it looks its host up
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """With a short name, as names of sockets have at most 107 bytes."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield folder
    shutil.rmtree(folder)


def test_replicas_look_nothing_up(conformance_bundle, ray_folder, tmp_path: Path):
    watch = Watch(compiled(tmp_path), tmp_path / "watched")
    ports = free_port(), free_port()
    output = watch.run("-c", DRIVER, conformance_bundle, ray_folder, *ports, env={"PYTHONPATH": str(ROOT)})
    assert '"choices"' in output
    assert watch.asked() <= ROUTES | METADATA
    home = {str(file.relative_to(watch.home)) for file in watch.home.rglob("*") if file.is_file()}
    assert home <= {".cache/convllava-deploy/sha256.json", ".ray/auth_token"}
