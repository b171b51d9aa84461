"""A built wheel, installed elsewhere: the console command answers from a bundle, with the kernels."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.commands import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves folders beside the sources
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of an environment with the wheel. Dependencies are those of the running environment."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", wheel]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(installed: Path, cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [installed / "bin" / arguments[0], *arguments[1:]]
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)


def test_it_holds_the_packages_and_their_data_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"runtime", "train", "export", "calib"}
    for part in (
        "runtime/serve/web/index.html",
        "runtime/kernels/src/ort_op.cpp",
        "runtime/kernels/include/gemm.h",
        "train/recipes/",
    ):
        assert any(name.startswith(part) for name in names), part
    assert not any(name.endswith((".safetensors", ".jsonl")) for name in names)


def test_the_command_lists_its_commands(installed, tmp_path):
    done = run(installed, tmp_path, "convllava", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "  infer " in done.stdout


def test_it_answers_as_the_sources_do(installed, tmp_path, conformance_bundle, conformance):
    options = ("infer", "--bundle", conformance_bundle, "--image", conformance / "case0.png", "--prompt", "What?")
    options += ("--max-new-tokens", "4", "--json")
    done = run(installed, tmp_path, "convllava", *options)
    assert done.returncode == 0, done.stderr
    here = [sys.executable, "-m", "runtime.cli", *map(str, options)]
    expected = json.loads(subprocess.run(here, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert json.loads(done.stdout)["token_ids"] == expected["token_ids"]


def test_the_kernels_are_there(installed, tmp_path):
    code = "import runtime, runtime.kernels as k; print(runtime.__file__); print(k.library())"
    done = run(installed, tmp_path, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    package, library = done.stdout.split()
    assert Path(package).is_relative_to(installed)
    assert Path(library).is_file() == bool(list((ROOT / "runtime/kernels").glob("*.so")))
    assert Path(library).is_relative_to(installed)


def test_the_demo_needs_a_clone(installed, tmp_path):
    done = run(installed, tmp_path, "convllava", "demo")
    assert done.returncode == 2
    assert "run it from a clone" in done.stderr
    assert len(done.stderr.splitlines()) == 1
