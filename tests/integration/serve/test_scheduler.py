"""The scheduler on exported models: batched answers equal `Model.generate`, bitwise where weights are small."""

import queue

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime.generate.sampler import Sampler
from runtime.generate.session import Generation
from runtime.image.preprocess import resized
from runtime.serve.images import PreparedImage
from runtime.serve.types import Request
from runtime.text.template import first_turn
from runtime.types import Options, Sampling
from tests.support.bundles import exported
from tests.support.served import scheduler_of

WAIT = 120  # seconds, that a test waits for what must come
OPTIONS = Options(max_new_tokens=12)
QUESTIONS = [
    ("What is this?", [0]),
    ("Count.", []),
    ("And this, compared with that?", [1, 2]),
    ("What is it?", [0]),
    ("A longer question, which takes more tokens than the others do, and goes on for a while.", [3]),
]


class Asked:
    def __init__(self, model, prompt, images, limit=12, logprobs=None):
        self.images = [prepared(image, model.bundle.image) for image in images]
        text = first_turn(model.bundle.prompt, prompt, len(images))
        token_ids = model.tokenizer.encode_prompt(text, [image.tokens for image in self.images])
        generation = Generation(Sampler(Sampling()), limit, model.tokenizer.eos_token_ids)
        self.events = queue.Queue()
        self.request = Request(token_ids, self.images, generation, self.events.put, logprobs=logprobs)

    def wait(self):
        found = [self.events.get(timeout=WAIT)]
        while found[-1].finish_reason is None:
            found.append(self.events.get(timeout=WAIT))
        return found

    def ids(self):
        return [event.token_id for event in self.wait()]


def prepared(image, rule):
    pixels = resized(image, rule)
    return PreparedImage(pixels.tobytes(), rule.tokens(*pixels.shape[:2]), rule, pixels)


def picture(seed, size=(96, 128)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def test_answers_in_a_batch_are_those_of_the_library(conformance_bundle):
    """Five at once in three slots, and once more with what the slots hold."""
    model = runtime.load(conformance_bundle)
    expected = [
        list(model.generate([picture(seed) for seed in images], prompt, OPTIONS))[-1].result.token_ids
        for prompt, images in QUESTIONS
    ]
    scheduler = scheduler_of(model, 3, 8)
    for round_ in range(2):
        asked = [Asked(model, prompt, [picture(seed) for seed in images]) for prompt, images in QUESTIONS]
        scheduler.submit(*(one.request for one in asked))
        assert [one.ids() for one in asked] == expected
        assert round_ == 0 or any(one.request.cached_tokens for one in asked)
    scheduler.stop(0)


@pytest.mark.parametrize("decoder", ["onnx", "kernels"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_weights_of_few_bits_are_batch_invariant(precision, decoder, request):
    """Bit for bit, whatever else runs and whatever prefix is cached."""
    if decoder == "kernels":
        request.getfixturevalue("built")
    bundle = exported("--res", 256, "--decoder-precision", precision)
    model = runtime.load(bundle, backends=runtime.Backends(decoder=decoder))
    questions = [prompt for prompt, _ in QUESTIONS]

    def all_of(scheduler, order):
        asked = {question: Asked(model, question, [], logprobs=2, limit=24) for question in order}
        scheduler.submit(*(one.request for one in asked.values()))
        return {q: [(t.token_id, t.logprob.logprob) for t in one.wait()] for q, one in asked.items()}

    alone = {}
    for question in questions:
        lone = scheduler_of(model, 1)
        alone |= all_of(lone, [question])
        lone.stop(0)
    scheduler = scheduler_of(model, 3)
    assert all_of(scheduler, questions) == alone
    assert all_of(scheduler, questions[::-1]) == alone
    scheduler.stop(0)
