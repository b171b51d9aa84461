"""Preprocessing against the original's pixels, values worked out by hand and properties."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import UserError
from runtime.image.decode import open_image
from runtime.image.preprocess import ASPECTS, ImageRule, preprocess, target_size

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
RULE = ImageRule(mean=MEAN, std=STD, aspect="pad", resolution=768, multiple=64, max_visual_tokens=576)
MEAN_COLOUR = (122, 116, 104)  # 255 * mean, rounded down

WHITE, RED = (255, 255, 255), (255, 0, 0)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def normalised(image: Image.Image) -> np.ndarray:
    scaled = (np.asarray(image).astype(np.float64) / 255).astype(np.float32)
    return ((scaled - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)


def padded_square(image: Image.Image) -> Image.Image:
    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), MEAN_COLOUR)
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return square


# --- pad and crop: the original's pixels ---


@pytest.mark.parametrize("case", [0, 1, 2])
def test_pad_gives_the_original_implementations_pixels(conformance: Path, case: int):
    config = json.loads((conformance / "checkpoint/vision_tower/preprocessor_config.json").read_text())
    rule = replace(RULE, mean=tuple(config["image_mean"]), std=tuple(config["image_std"]), resolution=256)
    values = preprocess(open_image(conformance / f"case{case}.png"), rule)
    with np.load(conformance / f"case{case}.npz") as expected:
        np.testing.assert_allclose(values, expected["pixel_values"], rtol=0, atol=1e-6)


def test_pad_surrounds_a_picture_with_the_mean_colour():
    values = preprocess(Image.new("RGB", (256, 128), WHITE), RULE, 256, "pad")
    expected = normalised(Image.new("RGB", (256, 256), MEAN_COLOUR))
    expected[:, 64:192] = normalised(Image.new("RGB", (256, 128), WHITE))
    np.testing.assert_array_equal(values, expected)


def test_rule_gives_resolution_and_aspect_unless_overridden():
    image = noise(300, 150)
    rule = replace(RULE, resolution=128, aspect="crop")
    np.testing.assert_array_equal(preprocess(image, rule), preprocess(image, RULE, 128, "crop"))
    assert preprocess(image, rule, resolution=64).shape == (3, 64, 64)
    assert preprocess(image, rule, aspect="any").shape == (3, 64, 192)


def test_preprocess_refuses_other_modes():
    with pytest.raises(ValueError, match="RGB"):
        preprocess(Image.new("L", (8, 8)), RULE)


# --- extreme shapes: beyond what the original could hold ---


@pytest.mark.parametrize(
    ("aspect", "size"),
    [(aspect, size) for aspect in ASPECTS for size in [(1, 60_000), (60_000, 1), (1, 5_000_000)]]
    + [("any", (1, 70_000_000)), ("any", (70_000_000, 1))],  # where Pillow's resize itself gives up
)
def test_a_thin_line_keeps_its_colour(aspect: str, size: tuple[int, int]):
    values = preprocess(Image.new("RGB", size, WHITE), RULE, 128, aspect)
    line, fill = ((np.array(level) / 255 - MEAN) / STD for level in (WHITE, MEAN_COLOUR))
    if aspect == "pad":  # too thin to be seen at 128 pixels: at most a few levels' brightening along the middle
        np.testing.assert_allclose(values, np.broadcast_to(fill[:, None, None], values.shape), atol=0.1)
    else:
        np.testing.assert_allclose(values, np.broadcast_to(line[:, None, None], values.shape), atol=1e-5)


def test_pad_of_a_thin_picture_is_close_to_the_whole_square():
    image = noise(9, 300).resize((300, 9000), Image.Resampling.NEAREST)
    np.testing.assert_allclose(
        preprocess(image, RULE, 64, "pad"), normalised(padded_square(image).resize((64, 64), 3)), atol=0.1
    )


def test_crop_of_a_thin_picture_shows_its_middle():
    image = Image.new("RGB", (10, 4000), WHITE)
    image.paste(RED, (0, 1900, 10, 2100))
    values = preprocess(image, RULE, 64, "crop")
    np.testing.assert_allclose(values, normalised(Image.new("RGB", (64, 64), RED)), atol=1e-6)


# --- any: the aspect ratio kept ---


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1000, 1000, (768, 768)),  # 12 x 12 of 144 tokens
        (10, 10, (768, 768)),  # enlarged
        (1, 1, (768, 768)),
        (4000, 3000, (640, 896)),  # sqrt(144 * 3/4) = 10.39, sqrt(144 * 4/3) = 13.86: 10 x 14 = 140 fit
        (3000, 4000, (896, 640)),
        (3000, 2000, (640, 896)),  # 9.80 x 14.70: 10 x 15 = 150; 10 x 14 is off by log 1.07, 9 x 15 by log 1.11
        (1920, 1080, (576, 1024)),  # 9.00 x 16.00
        (200, 1, (64, 9216)),  # 0.85 x 169.7: 1 x 144
        (1, 200, (9216, 64)),
        (100_000_000, 1, (64, 9216)),
    ],
)
def test_any_by_hand(width: int, height: int, expected: tuple[int, int]):
    assert target_size(width, height, RULE, 768, "any") == expected


@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        (576, (768, 768)),  # the resolution's 144 tokens bind
        (143, (768, 704)),  # 11.96 x 11.96: 12 x 12 = 144; of 12 x 11 and 11 x 12, equally far off, the one that cuts w
        (100, (640, 640)),
        (1, (64, 64)),
    ],
)
def test_any_keeps_to_the_rules_token_cap(cap: int, expected: tuple[int, int]):
    assert target_size(500, 500, replace(RULE, max_visual_tokens=cap), 768, "any") == expected


SIDES = st.integers(1, 20_000)


@settings(max_examples=300)
@given(SIDES, SIDES, st.sampled_from([32, 64]), st.integers(1, 100), st.integers(1, 10_000))
def test_any_keeps_the_ratio_within_its_tokens(width: int, height: int, multiple: int, tokens_a_side: int, cap: int):
    rule = replace(RULE, multiple=multiple, resolution=multiple, max_visual_tokens=cap)
    limit = min(cap, tokens_a_side**2)
    size = target_size(width, height, rule, tokens_a_side * multiple, "any")
    assert all(side % multiple == 0 for side in size)
    rows, columns = sorted(side // multiple for side in size)
    assert 1 <= rows <= columns
    assert rows * columns <= limit < (rows + 1) * (columns + 1)  # nothing to spare for both sides
    if width != height:
        assert size[::-1] == target_size(height, width, rule, tokens_a_side * multiple, "any")
        assert size[0] == size[1] or (size[0] < size[1]) == (height < width)
    # Rounding moves a side by half a token; cutting costs the longer side that half of the shorter, and one more
    ratio = max(width, height) / min(width, height)
    ideal_rows, ideal_columns = math.sqrt(limit / ratio), math.sqrt(limit * ratio)
    if ideal_rows < 1:  # the ratio cannot be had: the limit must be spent in one row
        assert (rows, columns) == (1, limit)
    else:
        assert abs(math.log(columns / rows / ratio)) <= 1.5 / ideal_rows + 1.5 / ideal_columns


@given(st.integers(16, 400), st.integers(16, 400), st.sampled_from(ASPECTS), st.integers(1, 4))
def test_an_even_image_stays_even(width: int, height: int, aspect: str, tokens_a_side: int):
    """Its values are those of its colour; where `pad` has put the mean beside it, those along its longer middle are."""
    values = preprocess(Image.new("RGB", (width, height), RED), RULE, 64 * tokens_a_side, aspect)
    assert values.shape == (3, *target_size(width, height, RULE, 64 * tokens_a_side, aspect))
    expected = (np.array([1, 0, 0]) - MEAN) / STD
    if aspect != "pad":
        np.testing.assert_allclose(values, np.broadcast_to(expected[:, None, None], values.shape), atol=1e-5)
    elif max(width, height) <= 4 * min(width, height):
        np.testing.assert_allclose(values[:, values.shape[1] // 2, values.shape[2] // 2], expected, atol=1e-5)


@pytest.mark.parametrize(("size", "side", "expected"), [((501, 377), 384, (448, 320)), ((2000, 1500), 128, (128, 128))])
def test_any_resizes_straight_to_its_size(size: tuple[int, int], side: int, expected: tuple[int, int]):
    image = noise(*size)
    resized = image.resize(expected, Image.Resampling.BICUBIC)
    np.testing.assert_allclose(preprocess(image, RULE, side, "any"), normalised(resized), atol=1e-6)


# --- refused options, and the rule in the manifest ---


@pytest.mark.parametrize(
    ("resolution", "multiple", "nearest"),
    [
        (1000, 64, ["960", "1024"]),
        (1000, 32, ["992", "1024"]),
        (1, 64, ["64"]),
        (0, 64, ["64"]),
        (-128, 64, ["64"]),
        (8193, 64, ["8192"]),
        (16_384, 64, ["8192"]),
        (8191, 96, ["8160"]),
    ],
)
def test_a_resolution_out_of_step_is_refused_with_the_nearest(resolution: int, multiple: int, nearest: list[str]):
    rule = replace(RULE, multiple=multiple)
    with pytest.raises(UserError) as caught:
        target_size(640, 480, rule, resolution)
    message = str(caught.value)
    assert str(resolution) in message
    assert str(multiple) in message
    assert message.split("nearest valid: ")[1].split(" or ") == nearest


@pytest.mark.parametrize("aspect", ["", "PAD", "square"])
def test_an_unknown_aspect_is_refused(aspect: str):
    with pytest.raises(UserError, match=f"{aspect!r}.*pad, any, crop"):
        preprocess(noise(8, 8), RULE, aspect=aspect)


def test_rule_survives_json():
    assert ImageRule.from_dict(json.loads(json.dumps(RULE.to_dict()))) == RULE


def test_rule_names_missing_and_unknown_keys():
    for key in RULE.to_dict():
        data = RULE.to_dict()
        del data[key]
        with pytest.raises(UserError, match=f"'{key}' is missing"):
            ImageRule.from_dict(data)
    with pytest.raises(UserError, match="unknown key 'crop'"):
        ImageRule.from_dict(RULE.to_dict() | {"crop": True})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", 0.5),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, 0.5, "0.5"]),
        ("mean", [0.5, 0.5, True]),
        ("mean", [0.5, 0.5, 1.5]),
        ("mean", [0.5, 0.5, math.nan]),
        ("std", None),
        ("std", [0.5, 0.5, 0]),
        ("std", [0.5, 0.5, 10**400]),
        ("aspect", 1),
        ("aspect", "round"),
        ("resolution", "768"),
        ("resolution", 768.0),
        ("resolution", True),
        ("resolution", 700),
        ("multiple", None),
        ("multiple", 0),
        ("multiple", 10**6),
        ("max_visual_tokens", 2.5),
        ("max_visual_tokens", True),
        ("max_visual_tokens", 0),
    ],
)
def test_rule_names_the_key_of_a_wrong_value(key: str, value: object):
    with pytest.raises(UserError, match=key):
        ImageRule.from_dict(RULE.to_dict() | {key: value})
