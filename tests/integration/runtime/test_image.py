"""Preprocessing against transformers' CLIPImageProcessor."""

import numpy as np
import pytest
from PIL import Image

try:  # transformers 5: the reference's arithmetic, beside another one on PyTorch
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor

from runtime.image.preprocess import preprocess
from tests.unit.runtime.test_image import MEAN, RULE, STD, noise, padded_square

SIZES = [(4, 4), (64, 64), (63, 64), (701, 333), (334, 701), (20, 300), (320, 21), (999, 70), (321, 640)]


def clip(image: Image.Image, side: int) -> np.ndarray:
    processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return processor.preprocess(image, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("side", [64, 320])
def test_pad_equals_clip_on_the_whole_square(side: int):
    for size in (*SIZES, (2, 300), (999, 5)):
        image = noise(*size)
        np.testing.assert_array_equal(preprocess(image, RULE, side, "pad"), clip(padded_square(image), side), f"{size}")


@pytest.mark.parametrize("side", [64, 320])
def test_crop_equals_clip(side: int):
    for size in SIZES:
        image = noise(*size)
        np.testing.assert_array_equal(preprocess(image, RULE, side, "crop"), clip(image, side), f"{size}")
