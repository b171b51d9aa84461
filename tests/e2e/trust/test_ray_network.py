"""Ray Serve's replicas tell nobody of their use; what Ray itself looks up when a cluster starts is known."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.support.network import Watch, compiled
from tests.support.served import free_port

USAGE_HOST = "usage-stats.ray.io"
# Ray asks the kernel which of its addresses would reach these, and sends nothing there
ROUTES = {"8.8.8.8", "2001:4860:4860::8888"}
# Ray asks clouds' link-local metadata services where it runs, whatever its switch says
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
time.sleep(14)
serve.shutdown()
ray.shutdown()
"""


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """With a short name, as names of sockets have at most 107 bytes."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("wanted", [False, True])
def test_ray_reports_its_use_only_where_that_is_wanted(conformance_bundle, ray_folder, tmp_path: Path, wanted):
    watch = Watch(compiled(tmp_path), tmp_path / "watched")
    env = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_REPORT_INTERVAL_S": "1"}
    env |= {"RAY_USAGE_STATS_ENABLED": "1"} if wanted else {}
    output = watch.run("-c", DRIVER, conformance_bundle, ray_folder, free_port(), free_port(), env=env)
    assert '"choices"' in output
    assert watch.asked() - ROUTES - METADATA == ({USAGE_HOST} if wanted else set())
    home = {str(file.relative_to(watch.home)) for file in watch.home.rglob("*") if file.is_file()}
    assert home <= {".cache/convllava-deploy/sha256.json", ".ray/auth_token"}
