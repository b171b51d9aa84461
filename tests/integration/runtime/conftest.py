import shutil

import pytest
from PIL import Image

from runtime import kernels


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (300, 200), (20, 120, 220)).save(file)
    return file


@pytest.fixture(scope="module")
def built():
    """The kernels: skips where they cannot run, fails where they should have been compiled."""
    reason = kernels.unavailable()
    if reason and (kernels.processor_flags() >= kernels.NEEDED) and shutil.which("c++"):
        pytest.fail(f"there is a compiler, and yet {reason}")
    if reason:
        pytest.skip(f"the kernels cannot run: {reason}")
