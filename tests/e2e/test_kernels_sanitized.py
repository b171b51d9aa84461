"""The kernels' C++ tests, under the sanitizers of addresses and of undefined behaviour."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.commands import ROOT


def test_the_kernels_cpp_tests_pass_under_sanitizers():
    compiler = os.environ.get("CXX", "g++")
    for tool in ("make", compiler):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    command = ["make", "--old-file=setup", "kernels-test", f"CXX={compiler}", f"RUN={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
