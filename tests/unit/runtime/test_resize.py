"""The image kernels against Pillow and numpy, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.image import resize
from runtime.image.preprocess import preprocess
from tests.unit.runtime.test_image import RULE, noise

BICUBIC = Image.Resampling.BICUBIC
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 2000))


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if resize._kernels() is None:
        pytest.skip("the kernels were not built, or the processor has no AVX2")


@st.composite
def pictures(draw: st.DrawFn, rows: st.SearchStrategy[int], columns: st.SearchStrategy[int]) -> Image.Image:
    """Noise, or black and white alone, where the filter leaves 0..255 most often."""
    seed, is_binary = draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
    image = noise(draw(columns), draw(rows), seed)
    return image.point(lambda value: 255 * (value > 127)) if is_binary else image


@settings(max_examples=200, deadline=None)
@given(pictures(st.integers(1, 9), SIDES), SIDES)
def test_rows_are_pillows(image: Image.Image, width: int):
    out = np.empty((image.height, width, 3), np.uint8)
    resize.resize_rows(np.asarray(image), out)
    np.testing.assert_array_equal(out, image.resize((width, image.height), BICUBIC))


@settings(max_examples=200, deadline=None)
@given(pictures(SIDES, st.integers(1, 40)), SIDES)
def test_columns_are_pillows(image: Image.Image, height: int):
    out = resize.resize_columns(np.asarray(image), height)
    np.testing.assert_array_equal(out, image.resize((image.width, height), BICUBIC))


@pytest.mark.parametrize(("width", "out"), [(24_576, 64), (24_576, 1), (1, 8192), (8191, 8192)])
def test_the_longest_sides_are_pillows(width: int, out: int):
    pixels, resized = np.asarray(noise(width, 5)), np.empty((5, out, 3), np.uint8)
    resize.resize_rows(pixels, resized)
    np.testing.assert_array_equal(resized, Image.fromarray(pixels).resize((out, 5), BICUBIC))
    columns = np.ascontiguousarray(pixels.swapaxes(0, 1))
    np.testing.assert_array_equal(resize.resize_columns(columns, out), resized.swapaxes(0, 1))


@pytest.mark.parametrize("size", [(768, 768), (500, 768), (768, 130), (31, 997), (2500, 1201), (9, 300)])
def test_preprocessing_is_the_same_without_kernels(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    with_kernels = preprocess(noise(*size), RULE)
    monkeypatch.setattr(resize, "_kernels", lambda: None)
    np.testing.assert_array_equal(with_kernels, preprocess(noise(*size), RULE))


def test_an_older_library_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resize, "library", lambda: tmp_path / "absent.so")
    assert resize._kernels.__wrapped__() is None
    monkeypatch.setattr(resize, "library", lambda: "libc.so.6")  # it has none of these functions
    assert resize._kernels.__wrapped__() is None
