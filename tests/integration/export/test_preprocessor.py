"""preprocessor_config.json: computed as transformers' CLIPImageProcessor computes it, or refused by the key's name."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from export.bundle import image_rule
from export.cli import choose_resolution
from runtime.errors import UserError
from runtime.image.preprocess import preprocess
from tests.integration.runtime.test_image import CLIPImageProcessor
from tests.support.checkpoints import Parts, edit_json, refusal, write_json
from tests.support.commands import assert_one_line_error, run_main
from train.model import Checkpoint

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
BASE = {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return Parts().write(tmp_path_factory.mktemp("checkpoint") / "checkpoint")


def opened(folder: Path, preprocessor: dict, aspect: str) -> Checkpoint:
    edit_json(folder / "config.json", image_aspect_ratio=aspect)
    write_json(folder / "vision_tower" / "preprocessor_config.json", preprocessor)
    return Checkpoint.open(folder)


def ours(checkpoint: Checkpoint, image: Image.Image) -> np.ndarray:
    return preprocess(image, image_rule(checkpoint, choose_resolution(None, checkpoint)))


def reference(preprocessor: dict, image: Image.Image, aspect: str) -> np.ndarray:
    """LLaVA's `process_images`."""
    processor = CLIPImageProcessor(**preprocessor)
    if aspect == "pad":
        longer = max(image.size)
        square = Image.new("RGB", (longer, longer), tuple(int(value * 255) for value in processor.image_mean))
        square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
        image = square
    return processor.preprocess(image, return_tensors="np")["pixel_values"][0]


IMAGES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8))
    for i, size in enumerate([(128, 128), (90, 201), (300, 129)])
]
REFUSED = {
    "resample": [0, 1, 2, 4, 5, None, "bicubic"],
    "rescale_factor": [1 / 127.5, 1.0, 1 / 256, 0.003921569, 0, None, True, "1/255"],
    "do_resize": [False, None],
    "do_rescale": [False, None, "true"],
    "do_normalize": [False, None],
    "do_pad": [True],
    "image_mean": [0.5, None, [0.5], [0.5, 0.5, "x"], {"r": 0.5}, [0.5, True, 0.5]],
    "image_std": [0.5, None, [0.5] * 4],
}
SIZES_REFUSED = [
    {"size": {"shortest_edge": 192}},
    {"size": 64},
    {"crop_size": 64},
    {"crop_size": {"height": 128, "width": 64}},
    {"size": {"shortest_edge": 128, "longest_edge": 256}},
    {"size": {"height": 64, "width": 128}},
    {"size": [128, 128]},
    {"size": None},
    {"size": True, "crop_size": True},
    {"size": "128"},
    {"size": -128, "crop_size": -128},
    {"crop_size": {"shortest_edge": 128}},
    {"crop_size": {"height": 128.0, "width": 128.0}},
    {"crop_size": None},
]
TAKEN = [
    {},
    {"size": 128, "crop_size": 128},
    {"size": 128},
    {"resample": 3, "rescale_factor": 0.00392156862745098, "do_rescale": True, "do_normalize": True},
    {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 1, 0.25]},
    {"do_pad": False, "do_convert_rgb": True},
]
TAKEN_SQUARE = [
    {"size": {"height": 128, "width": 128}},
    {"do_center_crop": False},
    {"do_center_crop": False, "crop_size": {"height": 64, "width": 64}},
    {"do_center_crop": False, "size": {"height": 128, "width": 128}, "crop_size": 7},
]


@pytest.mark.parametrize("change", [*TAKEN, *TAKEN_SQUARE], ids=str)
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_what_is_taken_is_the_reference_s_to_the_bit(change, aspect, folder):
    preprocessor = BASE | change
    if aspect == "square" and change in TAKEN_SQUARE:
        message = refusal(lambda: opened(folder, preprocessor, aspect).resolution)
        assert ("do_center_crop" if "do_center_crop" in change else "size") in message
        return
    checkpoint = opened(folder, preprocessor, aspect)
    for image in IMAGES:
        np.testing.assert_array_equal(ours(checkpoint, image), reference(preprocessor, image, aspect))


@pytest.mark.parametrize("aspect", ["pad", "any", "square"])
@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_what_would_be_computed_otherwise_is_refused_by_its_key(key, value, aspect, folder):
    message = refusal(lambda: opened(folder, BASE | {key: value}, aspect).pixel_statistics)
    file = folder / "vision_tower" / "preprocessor_config.json"
    assert message.startswith(f"{file}: {key} is {value!r}, expected ")
    assert "\n" not in message


@pytest.mark.parametrize("aspect", ["pad", "square"])
@pytest.mark.parametrize("change", SIZES_REFUSED, ids=str)
def test_sizes_that_are_not_one_square_are_refused(change, aspect, folder):
    message = refusal(lambda: opened(folder, BASE | change, aspect).resolution)
    assert "preprocessor_config.json: size is " in message
    # the original overwrites both where the resolution is set
    edit_json(folder / "config.json", mm_vision_resolution=320)
    assert Checkpoint.open(folder).resolution == 320
    edit_json(folder / "config.json", mm_vision_resolution=...)


KEYS = {
    "resample": st.sampled_from([2, 3]),
    "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 0.0039215686]),
    "do_normalize": st.booleans(),
    "do_rescale": st.booleans(),
    "do_resize": st.booleans(),
    "do_center_crop": st.booleans(),
    "size": st.sampled_from([128, 64, {"shortest_edge": 128}, {"height": 128, "width": 128}, {"shortest_edge": 144}]),
    "crop_size": st.sampled_from([128, 64, {"height": 128, "width": 128}, {"height": 128, "width": 64}]),
    "image_mean": st.lists(st.floats(0, 1), min_size=3, max_size=3),
    "image_std": st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({}, optional=KEYS), st.sampled_from(["pad", "square"]), st.sampled_from(IMAGES))
def test_any_keys_give_the_reference_s_pixels_or_an_error(folder, preprocessor, aspect, image):
    try:
        found = ours(opened(folder, preprocessor, aspect), image)
    except UserError as error:
        assert "\n" not in str(error)
        return
    np.testing.assert_array_equal(found, reference(preprocessor, image, aspect))


def test_the_commands_say_so_in_a_line(folder, tmp_path):
    write_json(folder / "vision_tower" / "preprocessor_config.json", BASE | {"do_normalize": False})
    recipe = {"out": str(tmp_path / "run"), "checkpoint": str(folder), "train": ["projector"], "steps": 1}
    recipe |= {"learning_rate": 1e-3, "global_batch": 1, "micro_batch": 1, "data": [{"records": "none.json"}]}
    write_json(tmp_path / "recipe.yaml", recipe)
    for command in (
        ("export.bundle", "--checkpoint", folder, "--out", tmp_path / "out"),
        ("export.encoder", "--checkpoint", folder, "--out", tmp_path / "out"),
        ("train", tmp_path / "recipe.yaml"),
    ):
        done = run_main(*command)
        assert_one_line_error(done, "preprocessor_config.json: do_normalize is False, expected True")
    assert not (tmp_path / "out").exists()
