"""Image embeds that are kept: who gets them, who does not, and how many bytes they take."""

import io

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.backends.select import Backends
from runtime.image.embedding_cache import EmbeddingCache
from runtime.image.preprocess import digest


def drawing(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (90, 130, 3), np.uint8))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


@pytest.fixture
def model(conformance_bundle):
    """Counts the images that are encoded, in `model.encoded`."""
    model = runtime.load(conformance_bundle, backends=Backends(encoder="onnx"))
    encoder, model.encoded = model.encoder, 0

    def counted(images):
        model.encoded += len(images)
        return encoder(images)

    model.encoder = counted
    return model


def ids(model, images, prompt="What is this?", **options) -> list[int]:
    *_, last = model.generate(images, prompt, runtime.Options(max_new_tokens=5, **options))
    return last.result.token_ids


def test_a_picture_seen_before_is_not_encoded_again(model, tmp_path):
    picture, other = drawing(0), drawing(1)
    first = ids(model, [picture])
    assert model.encoded == 1
    (tmp_path / "a.png").write_bytes(png(picture))
    for same in (picture, png(picture), tmp_path / "a.png"):
        assert ids(model, [same]) == first
    *_, chat = model.chat(runtime.Options(max_new_tokens=5)).ask("What is this?", [picture])
    *_, about = model.about([picture], runtime.Options(max_new_tokens=5)).ask("What is this?")
    assert chat.result.token_ids == about.result.token_ids == first
    assert model.encoded == 1
    both = ids(model, [other, picture, other])
    assert model.encoded == 2
    model.cache = EmbeddingCache(0)
    assert both == ids(model, [other, picture, other])
    assert model.encoded == 5, "nothing is kept"


@pytest.mark.parametrize("options", [{"resolution": 128}, {"aspect": "any"}, {"aspect": "crop"}])
def test_another_preprocessing_is_another_entry(model, options):
    ids(model, [drawing(0)])
    found = ids(model, [drawing(0)], **options)
    assert model.encoded == 2
    model.cache = EmbeddingCache(0)
    assert ids(model, [drawing(0)], **options) == found


def test_a_trace_sees_everything_computed(model):
    picture = drawing(0)
    ids(model, [picture])
    trace = runtime.Trace()
    list(model.generate([picture, picture], "What?", runtime.Options(max_new_tokens=1), trace))
    assert len(trace.pixel_values) == 2
    assert model.encoded == 3
    rows = len(trace.image_embeds) // 2
    np.testing.assert_array_equal(trace.image_embeds[:rows], trace.image_embeds[rows:])
    questions, first, second = model.about([picture, picture]), runtime.Trace(), runtime.Trace()
    next(questions.ask("What?", first))
    next(questions.ask("Why?", second))
    assert (len(first.pixel_values), len(second.pixel_values)) == (2, 0)
    np.testing.assert_array_equal(first.image_embeds, second.image_embeds)


def test_the_least_recently_used_go_first():
    cache = EmbeddingCache(max_bytes=3 * 400)
    rows = {name: np.full((10, 10), i, np.float32) for i, name in enumerate("abcd")}
    for name in "abc":
        cache.put(name, rows[name])
    assert cache.get("a") is rows["a"]
    cache.put("d", rows["d"])
    assert cache.get("b") is None
    assert [cache.get(name) is rows[name] for name in "acd"] == [True] * 3
    assert cache.bytes == 1200
    cache.put("d", rows["a"])
    assert (cache.bytes, cache.get("d") is rows["a"]) == (1200, True), "one entry took the place of another"
    cache.put("large", np.zeros((11, 40), np.float32))
    assert cache.get("large") is None
    assert cache.bytes == 1200


def test_a_digest_is_of_shape_and_pixels():
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    same = np.asfortranarray(pixels)
    changed = pixels.copy()
    changed[3, 4, 2] += 1
    assert digest(pixels) == digest(same)
    assert len({digest(pixels), digest(pixels.reshape(5, 4, 3)), digest(changed)}) == 3
