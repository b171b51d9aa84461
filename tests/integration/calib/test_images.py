"""Calibration data that says less than it seems to."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from calib.images import find_pages, split
from runtime.errors import UserError
from tests.support.commands import assert_one_line_error, run_main


def save(folder, pictures) -> None:
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02}.png")


def noise(count, seed=0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(count)]


WHITE, GRAY = Image.new("RGB", (8, 8), "white"), Image.new("RGB", (8, 8), "gray")


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        (noise(20), []),
        (noise(30), []),
        ([*noise(15), *noise(5, 1), *noise(3, 1)], [("3 of 23 images are copies of others", "20.png")]),
        (noise(1) * 20, [("19 of 20 images are copies of others", "01.png")]),
        ([*noise(18), WHITE], [("1 of 19 images are blank", "18.png")]),
        ([WHITE, GRAY] * 9, [("16 of 18 images are copies", "02.png"), ("18 of 18 images are blank", "00.png")]),
        # the same bytes in another shape are another picture
        ([Image.new("RGB", (8, 8 + i), "white") for i in range(16)], [("16 of 16 images are blank", "00.png")]),
    ],
)
def test_copies_and_blank_images_are_counted_in_one_line_each(pictures, expected, tmp_path, capsys):
    save(tmp_path, pictures)
    calibration, held_out = split(find_pages(tmp_path), 64, 100)
    assert len(calibration) + len(held_out) == len(pictures)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(expected)
    for line, (said, first) in zip(lines, expected, strict=True):
        assert line.startswith(f"warning: {said}")
        assert line.endswith(f", first {tmp_path / first}")


@pytest.mark.parametrize("color", ["white", "black", (3, 2, 1)])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_blank_picture_is_refused(color, part, conformance_bundle, tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    save(pages, [Image.new("RGB", (40, 30), color)] * 17)
    arguments = ("--bundle", conformance_bundle, "--data", pages, "--part", part, "--out", tmp_path / "out")
    done = run_main("calib.quantize", *arguments, "--precision", "int8")
    assert_one_line_error(done, pages / "00.png", "images to calibrate with are this one blank picture")
    assert not (tmp_path / "out").exists()


def test_questions_that_repeat_are_counted(tmp_path, capsys):
    save(tmp_path, noise(16))
    asked = [["What?"], ["What?", "Who?", "What?", "What?"], ["Who?", "Who?"], *[["What?"]] * 13]
    records = [
        {"image": f"{number:02}.png", "conversations": talk(questions)} for number, questions in enumerate(asked)
    ]
    (tmp_path / "all.json").write_text(json.dumps(records))
    split(find_pages(tmp_path / "all.json"), 64, 100)
    assert capsys.readouterr().err == (
        f"warning: 3 of 20 questions repeat one about the same image, first 'What?' of {tmp_path / '01.png'}\n"
    )


def talk(questions) -> list[dict]:
    return [
        {"from": role, "value": text} for question in questions for role, text in (("human", question), ("gpt", "It."))
    ]


def test_a_copy_under_another_format_is_a_copy(tmp_path, capsys):
    save(tmp_path, noise(17))
    Image.open(tmp_path / "03.png").save(tmp_path / "99.bmp")
    shutil.copy(tmp_path / "04.png", tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:50])
    split(find_pages(tmp_path), 64, 100)
    skipped, warning = capsys.readouterr().err.splitlines()
    assert skipped.startswith("skipped: ")
    assert warning == f"warning: 1 of 18 images are copies of others, first {tmp_path / '99.bmp'}"


def test_what_is_refused_says_what_to_give(tmp_path):
    save(tmp_path, [WHITE] * 40)
    with pytest.raises(UserError, match=r"00\.png: all 28 images.*; give images like those"):
        split(find_pages(tmp_path), 64, 100)
