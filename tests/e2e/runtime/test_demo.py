"""The demo model: what is reused, and what is computed together, gives the ids that a question alone does."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_slots import Slots
from runtime.backends.select import Backends
from runtime.generate.sampler import Sampler
from runtime.generate.session import Generation
from runtime.image.decode import open_image
from runtime.image.embedding_cache import EmbeddingCache
from runtime.image.preprocess import preprocess
from runtime.text.template import first_turn
from tests.support.commands import ROOT, run_module
from train.synth import PRESETS, render

QUESTIONS = ("Read the page.", "What is the first number?", "How many numbers are on the page?")
OPTIONS = runtime.Options(max_new_tokens=10, resolution=320)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With the weights that the repository carries, float32."""
    folder = tmp_path_factory.mktemp("demo")
    (carried,) = (ROOT / "train/runs/convllava-smol").glob("*.safetensors")
    for command in (
        ("train.model.demo", "--unpack", carried, folder / "checkpoint"),
        ("export.bundle", "--checkpoint", folder / "checkpoint", "--res", "320", "--out", folder / "bundle"),
    ):
        subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return runtime.load(folder / "bundle")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "page.png"
    Image.fromarray(render(3, "test", 0, PRESETS["figures-320"]).page.pixels).save(file)
    return file


@pytest.fixture(scope="module")
def alone(model, page):
    """The answers' ids, each with nothing kept from before."""
    found = []
    for question in QUESTIONS:
        model.cache = EmbeddingCache(0)
        *_, last = model.generate([page], question, OPTIONS)
        found.append(last.result.token_ids)
    assert len({tuple(ids) for ids in found}) == len(QUESTIONS), "it tells the questions apart"
    return found


@pytest.mark.usefixtures("built")
def test_8_bits_by_the_kernels_give_the_ids_of_float32_products(model, page, tmp_path):
    """`kernels24`, of the same weights, about the page and about nothing that is in it."""
    checkpoint, out = model.bundle.folder.parent / "checkpoint", tmp_path / "int8"
    options = ("--checkpoint", checkpoint, "--res", 320, "--decoder-precision", "int8", "--out", out)
    run_module("export.bundle", *options).check_returncode()
    ours = runtime.load(out, backends=Backends(decoder="kernels24"))
    plain = runtime.load(out, backends=Backends(decoder="onnx"))
    plain.decoder = OnnxDecoder(ours.bundle.path(ours.bundle.decoder.prefill_file), ours.bundle.decoder)
    for question in (*QUESTIONS, "Where is the first number? Answer with a box.", "Tell a long story about a ship."):
        said = []
        for each in (ours, plain):
            *_, last = each.generate([page], question, replace(OPTIONS, max_new_tokens=48))
            said.append(last.result.token_ids)
        assert said[0] == said[1]


def test_an_image_seen_or_held_gives_the_same_ids(model, page, alone, monkeypatch):
    encoded, encoder = [], model.encoder
    monkeypatch.setattr(model, "encoder", lambda images: encoded.append(len(images)) or encoder(images))
    model.cache = EmbeddingCache()
    held = model.about([page], OPTIONS)
    for _ in range(2):  # the second time the image is in the cache
        for question, ids in zip(QUESTIONS, alone, strict=True):
            *_, seen = model.generate([page], question, OPTIONS)
            *_, kept = held.ask(question)
            assert seen.result.token_ids == kept.result.token_ids == ids
    *_, first = model.chat(OPTIONS).ask(QUESTIONS[0], [page])
    assert first.result.token_ids == alone[0]
    assert encoded == [1]


@pytest.mark.parametrize("count", [1, 3])
def test_questions_decoded_together_get_the_same_ids(model, page, alone, count):
    embeds = model.encoder([preprocess(open_image(page), model.bundle.image, 320)])
    slots, answers = Slots(model.decoder, count, 256), []
    for number, question in enumerate(QUESTIONS[:count]):
        prompt = first_turn(model.bundle.prompt, question, 1)
        answers.append(Generation(Sampler(OPTIONS.sampling), OPTIONS.max_new_tokens, model.tokenizer.eos_token_ids))
        token_ids = model.tokenizer.encode_prompt(prompt, [len(embeds)])
        answers[-1].push(slots[number].forward_greedy(token_ids, embeds))
    while not all(answer.finish_reason for answer in answers):
        following = slots.step([answer.token_ids[-1] for answer in answers])
        for answer, token in zip(answers, following, strict=True):
            if answer.finish_reason is None:
                answer.push(token)
    assert [answer.token_ids for answer in answers] == alone[:count]


def test_it_reads_what_is_asked_of_it(model, page, alone):
    """Not by heart: each answer is that of the page's own question, or nearly so."""
    from calib.metrics import anls

    document = render(3, "test", 0, PRESETS["figures-320"])
    said = []
    for question in document.questions:
        if question.kind != "ground":
            *_, last = model.generate([page], question.prompt, OPTIONS)
            said.append(anls(last.result.text, question.answer))
    assert len(said) > 2
    assert np.mean(said) > 0.6
