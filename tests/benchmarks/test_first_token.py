"""The benchmark of the first token: every chain finds the token that the runtime does, from the same file."""

import pytest
from PIL import Image

from benchmarks import first_token
from benchmarks.peers.turns import Running
from runtime.bundle import open_bundle


@pytest.fixture(scope="module")
def spec(conformance, conformance_bundle, tmp_path_factory):
    image = tmp_path_factory.mktemp("page") / "page.png"
    Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 60).convert("RGB").save(image)
    found = first_token.spec_of(open_bundle(conformance_bundle), image, 1)
    return found | {"checkpoint": str(conformance / "checkpoint")}


@pytest.fixture(scope="module")
def ours(spec):
    worker = Running("chains", "ours", spec)
    yield worker
    worker.close()


def test_the_prompt_is_the_ids_around_the_image(spec):
    visual = (spec["resolution"] // 64) ** 2
    assert min(spec["before"] + spec["after"]) >= 0
    assert spec["capacity"] == len(spec["before"]) + 1 + len(spec["after"]) + visual


def test_transformers_finds_the_same_token(spec, ours):
    worker = Running("chains", "torch+transformers", spec)
    expected, found = ours.ask("first_token"), worker.ask("first_token")
    worker.close()
    assert (found["token"], found["tokens"]) == (expected["token"], expected["tokens"])
    for answer in (expected, found):
        assert 0 < answer["encode_s"] < answer["seconds"]
    assert first_token.row_of({}, [expected], [found])["same"] == "yes"


def test_an_image_seen_or_held_gives_the_same_token_sooner(ours):
    new, seen, held = (ours.ask("first_token", image=image) for image in ("new", "seen", "held"))
    assert new["token"] == seen["token"] == held["token"]
    assert new["tokens"] == seen["tokens"] == held["tokens"]
    assert held["encode_s"] == 0, "not even the file is opened"
    assert seen["encode_s"] < new["encode_s"]


def test_tiles_of_a_vit_are_2880_tokens(spec, conformance_bundle):
    """Through the conformance decoder, whose context is shorter: the embeds alone."""
    from benchmarks.peers.chains import VitTiles

    embeds = VitTiles(spec).encode()
    assert embeds.shape == (2880, spec["hidden"])
