"""The benchmark of the first token: every chain finds the token that the runtime does, from the same file."""

import pytest
import torch
from PIL import Image

from benchmarks import first_token
from benchmarks.encoder import operations
from benchmarks.limits import DecoderFiles, prefill_ms
from benchmarks.peers.chains import released_encoder
from benchmarks.peers.turns import Running
from export.cli import open_checkpoint
from runtime.bundle.manifest import open_bundle
from tests.support.commands import run_module
from train.model import load_image_encoder

LIMITS = ("read_gb_per_s", "matmul_gflop_per_s", "bytes_gop_per_s")


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


def test_limits_leave_out_what_was_computed_before(conformance, conformance_bundle, ours):
    """Against the encoder's and the prefill's own, and the positions that a held image leaves to be prefilled."""
    checkpoint, limits = open_checkpoint(str(conformance / "checkpoint")), dict.fromkeys(LIMITS, 1.0)
    part = DecoderFiles(1, "fp32")
    least = first_token.ChainLimit(checkpoint.llama_config, part, limits)
    encode_ms = least.encode_ms(load_image_encoder(checkpoint), 256)
    assert encode_ms == pytest.approx(operations(load_image_encoder(checkpoint), 256, 256) / 1e6)
    new, seen, held = (ours.ask("first_token", image=image)["prefilled"] for image in ("new", "seen", "held"))
    assert new == seen > held + 16
    whole, language = (least.row(new, spent, 100.0)["limit"] for spent in (encode_ms, 0))
    assert whole == pytest.approx(language + encode_ms, abs=0.1)
    assert language == pytest.approx(prefill_ms(checkpoint.llama_config, new, part, limits), abs=0.1)
    assert least.row(held, 0, 100.0)["limit"] < language / 2


def test_the_released_encoder_is_counted_without_its_weights():
    with torch.device("meta"):
        encoder = released_encoder(64)
    assert 2.9e11 < operations(encoder, 768, 768) < 1.5e12


def test_a_library_names_the_chain_it_is_in():
    done = run_module("benchmarks.first_token", "--peers", "vllm")
    assert done.returncode == 2
    for name in ("openvino+llama.cpp", "'llama.cpp'", "'openvino'", "'transformers'"):
        assert name in done.stderr


def test_tiles_of_a_vit_are_2880_tokens(spec, conformance_bundle):
    """Through the conformance decoder, whose context is shorter: the embeds alone."""
    from benchmarks.peers.chains import VitTiles

    embeds = VitTiles(spec).encode()
    assert embeds.shape == (2880, spec["hidden"])
