import pytest
from PIL import Image


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (300, 200), (20, 120, 220)).save(file)
    return file
