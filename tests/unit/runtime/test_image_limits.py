"""Small files that would take long are refused by their structure, and no other file is."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import UserError
from runtime.image.decode import open_image
from runtime.image.limits import MAX_SCANS, MAX_SEGMENTS, check_structure
from tests.support.hostile_images import (
    bmp_with_alpha,
    gif_of_many_comments,
    jpeg,
    jpeg_of_many_scans,
    jpeg_of_many_segments,
    jpeg_of_much_filling,
    png,
    png_chunk,
    png_of_many_chunks,
    png_of_many_pixel_chunks,
    tiff_of_overlapping_entries,
    webp_of_a_large_canvas,
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (jpeg_of_many_scans(1000, 1000, 1001), "1001000 pixels with more than 999 scans"),
        (jpeg_of_many_scans(MAX_SCANS, 7000, 8000), "56000000 pixels with more than 20 scans"),
        (jpeg_of_many_segments(), "more than 4096 segments"),
        (jpeg_of_much_filling(), "filling"),
        (png_of_many_chunks(), "more than 65536 chunks"),
        (png_of_many_pixel_chunks(), "more than 65536 chunks"),
        (webp_of_a_large_canvas(), "too many pixels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_asks_for_much_is_refused(content, said):
    with pytest.raises(UserError, match=f"^image data: .*{said}"):
        open_image(content)


def segment(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content


USUAL = jpeg()
LARGE = jpeg(3000, progressive=True)
WITH_THUMBNAIL = USUAL[:2] + segment(0xE1, b"Exif\0\0" + jpeg(32, progressive=True) * 10) + USUAL[2:]


@pytest.mark.parametrize(
    ("content", "size"),
    [
        (jpeg_of_many_scans(1500, 300, 200), (300, 200)),
        (LARGE, (3000, 3000)),
        (jpeg_of_many_scans(4, 7000, 7000), (7000, 7000)),
        (WITH_THUMBNAIL, (64, 64)),
        (USUAL + b"\xff\xda" * 10_000, (64, 64)),  # another file after its end, as of a motion photo
        (USUAL[:2] + segment(0xE2, bytes(60_000)) * 300 + USUAL[2:], (64, 64)),
        (USUAL[:2] + b"\xff" * 100 + USUAL[2:], (64, 64)),
        (jpeg(64, restart_marker_blocks=1), (64, 64)),
        (png(png_chunk(b"prVt", b"x") * 1000), (8, 8)),
        (gif_of_many_comments(), (8, 8)),
    ],
)
def test_what_is_only_unusual_is_opened(content, size):
    assert open_image(content).size == size


@pytest.mark.filterwarnings("ignore:Tag data")
def test_a_directory_whose_entries_overlap_is_opened_within_memory():
    """Pillow skips what is larger than the file in all."""
    assert open_image(tiff_of_overlapping_entries()).size == (8, 8)


@given(data=st.data(), whole=st.sampled_from([USUAL, jpeg(16, progressive=True), png(), WITH_THUMBNAIL]))
def test_damage_passes_to_whoever_decodes(data, whole):
    at = data.draw(st.integers(2, len(whole) - 1))
    content = whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + data.draw(st.integers(0, 4)) :]
    check_structure(content, "x")
    check_structure(content[: data.draw(st.integers(0, len(content)))], "x")


def test_the_number_of_segments_is_what_is_said():
    between = USUAL[:2] + segment(0xEC, b"") * (MAX_SEGMENTS // 2) + USUAL[2:]
    check_structure(between, "x")


@pytest.mark.parametrize("header", [56, 108, 124])
def test_a_bitmap_of_no_opaque_pixel_is_opaque(header):
    """As viewers show it: whoever wrote it knew of no alpha."""
    picture = open_image(bmp_with_alpha([(200, 10, 20, 0)] * 16, header))
    assert picture.getcolors() == [(16, (200, 10, 20))]


@pytest.mark.parametrize("header", [56, 108, 124])
def test_a_bitmap_with_alpha_is_over_white(header):
    picture = open_image(bmp_with_alpha([(200, 10, 20, 255), *[(0, 0, 0, 0)] * 14, (0, 0, 255, 128)], header))
    assert picture.getpixel((0, 3)) == (200, 10, 20)  # rows come from the bottom up
    assert picture.getpixel((1, 1)) == (255, 255, 255)
    assert picture.getpixel((3, 0)) == (127, 127, 255)


def test_alpha_zero_is_transparent_in_other_formats():
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (200, 10, 20, 0)).save(file, "PNG")
    assert open_image(file.getvalue()).getcolors() == [(16, (255, 255, 255))]
