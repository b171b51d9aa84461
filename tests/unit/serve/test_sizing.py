"""Which resolution and aspect an image of a request gets."""

import pytest

from runtime.errors import UserError
from runtime.image.preprocess import ImageRule
from runtime.serve.protocol import ApiError
from runtime.serve.sizing import ImageSizes, Sizing

RULE = ImageRule((0.5,) * 3, (0.5,) * 3, "pad", 1536, 64, 576)


@pytest.mark.parametrize(
    ("server", "detail", "expected"),
    [
        (None, None, 1536),
        (None, "auto", 1536),
        (None, "low", 768),
        (None, "high", 1536),
        (None, "finest", 1536),
        (320, None, 320),
        (320, "low", 320),  # never finer than what a request without detail gets
        (320, "high", 1536),
        (2048, "auto", 2048),
        (2048, "high", 1536),
        (2048, "low", 768),
    ],
)
def test_detail_chooses_between_the_servers_and_the_bundles(server, detail, expected):
    assert ImageSizes(RULE, server).of(detail) == Sizing(expected, "pad")


def test_what_is_asked_for_by_name_comes_before_detail():
    sizes = ImageSizes(RULE, 1024, "any")
    assert sizes.of("low", 64) == Sizing(64, "any")
    assert sizes.of("low", None, "crop") == Sizing(768, "crop")
    assert sizes.of(None, 1536, "pad") == Sizing(1536, "pad")
    assert ImageSizes(RULE, 2048).of(None, 2048).resolution == 2048


@pytest.mark.parametrize("resolution", [0, -64, 63, 100, 1600, 1 << 40])
def test_other_resolutions_are_refused_with_those_there_are(resolution):
    with pytest.raises(ApiError, match=r"this server takes multiples of 64 from 64 to 1536$") as error:
        ImageSizes(RULE, 1024).of(None, resolution)
    assert (error.value.status, error.value.param) == (400, "mm_processor_kwargs.res")


def test_an_unknown_aspect_is_refused_with_those_there_are():
    with pytest.raises(ApiError, match="expected one of pad, any, crop") as error:
        ImageSizes(RULE).of(None, None, "stretch")
    assert error.value.param == "mm_processor_kwargs.aspect"


@pytest.mark.parametrize("wrong", [{"resolution": 100}, {"resolution": 8256}, {"aspect": "stretch"}])
def test_a_server_cannot_have_what_its_bundle_cannot(wrong):
    with pytest.raises(UserError):
        ImageSizes(RULE, **wrong)


def test_a_coarse_stride_still_has_a_low_detail():
    assert ImageSizes(ImageRule((0.5,) * 3, (0.5,) * 3, "pad", 2000, 1000, 4)).of("low").resolution == 1000
