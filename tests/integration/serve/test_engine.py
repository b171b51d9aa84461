"""Many requests at once: the same answers as alone, whoever comes, goes, fails or waits."""

import queue
import threading
import time

import numpy as np
import pytest
from PIL import Image

import runtime
from runtime import kernels
from runtime.errors import InvalidLogitsError, UserError
from runtime.generate.sampler import Sampling
from runtime.image.input import Picture
from runtime.serve import scheduler as engines
from runtime.serve.scheduler import Busy, Engine, Failed, Request
from runtime.text.template import first_turn
from runtime.types import Options
from tests.support.bundles import exported

WAIT = 120  # seconds, that a test waits for what must come


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


@pytest.fixture
def engine(model):
    made = Engine(model, slots=3, queue_size=8)
    yield made
    made.stop(0)


class Asked:
    """A request and what came of it."""

    def __init__(self, model, prompt, images=(), limit=12, **options):
        asking = {name: options.pop(name) for name in ("deadline", "logprobs") if name in options}
        settings = Options(max_new_tokens=limit, **options)
        pictures = [Picture(model, image, settings) for image in images]
        text = first_turn(model.bundle.prompt, prompt, len(pictures))
        ids = model.tokenizer.encode_prompt(text, [picture.tokens for picture in pictures])
        self.said = queue.Queue()
        self.request = Request(ids, pictures, limit, settings, self.said.put, **asking)

    def tokens(self):
        found = [self.said.get(timeout=WAIT)]
        while not isinstance(found[-1], Failed) and found[-1].finish_reason is None:
            found.append(self.said.get(timeout=WAIT))
        return found

    def ids(self):
        return [token.token_id for token in self.tokens()]


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


QUESTIONS = [
    ("What is this?", [0]),
    ("Count.", []),
    ("And this, compared with that?", [1, 2]),
    ("What is it?", [0]),
    ("A longer question, which takes more tokens than the others do, and goes on for a while.", [3]),
]
ENDLESS = 0  # whose answer does not end by itself


def asked(model, number, **options):
    prompt, images = QUESTIONS[number]
    return Asked(model, prompt, [picture(seed) for seed in images], **options)


@pytest.fixture(scope="module")
def alone(model):
    """The answers of `Model.generate`, ids."""
    found = []
    for prompt, images in QUESTIONS:
        *_, last = model.generate([picture(seed) for seed in images], prompt, Options(max_new_tokens=12))
        found.append((last.result.token_ids, last.result.text, last.result.finish_reason))
    return found


def test_answers_in_a_crowd_are_those_alone(model, engine, alone):
    """Five at once in three slots, and then once more, with what the slots hold."""
    for _ in range(2):
        crowd = [asked(model, number) for number in range(len(QUESTIONS))]
        engine.submit(*(one.request for one in crowd))
        for one, (ids, text, reason) in zip(crowd, alone, strict=True):
            tokens = one.tokens()
            assert [token.token_id for token in tokens] == ids
            assert "".join(token.text for token in tokens) == text
            assert tokens[-1].finish_reason == reason
    assert engine.waiting == engine.running == 0


def test_what_a_slot_holds_is_taken_over(model, engine, alone):
    first = asked(model, 0)
    engine.submit(first.request)
    assert first.ids() == alone[0][0]
    assert first.request.cached_tokens == 0
    again, other = asked(model, 0), asked(model, 3)  # the same image; the question differs in one word
    engine.submit(again.request)
    assert again.ids() == alone[0][0]
    assert again.request.cached_tokens == len(again.request.ids) - 2, "the last is not fed alone"
    engine.submit(other.request)
    assert other.ids() == alone[3][0]
    visual = sum(token < 0 for token in other.request.ids)
    assert visual < other.request.cached_tokens < len(other.request.ids) - 1
    assert not other.request.pictures, "they are kept no longer than they are needed"
    different = asked(model, 4)
    engine.submit(different.request)
    different.ids()
    before_image = different.request.ids.index(-1)
    assert different.request.cached_tokens == before_image, "another image is another image, at whatever position"


def test_pages_that_are_asked_about_in_turn_keep_their_slots(model, engine):
    """Though all prompts begin alike. A page is six images here, as the model's are small."""
    said = {}
    for question in ("What is this?", "What is it?", "And its date?"):
        for page in range(3):
            one = Asked(model, question, [picture(100 * page + i) for i in range(6)], limit=4)
            engine.submit(one.request)
            said[question, page] = one.ids()
            end_of_images = max(i for i, token in enumerate(one.request.ids) if token < 0) + 1
            assert (one.request.cached_tokens >= end_of_images) == (question != "What is this?")
    fresh = Engine(model, slots=1)
    one = Asked(model, "And its date?", [picture(200 + i) for i in range(6)], limit=4)
    fresh.submit(one.request)
    assert one.ids() == said["And its date?", 2]
    fresh.stop(0)


@pytest.fixture(scope="module", params=["int4", "int8"])
def small_bundle(request):
    """With a decoder whose weights have few bits."""
    return exported("--res", 256, "--decoder-precision", request.param)


@pytest.fixture(params=["onnx", "kernels"])
def small(request, small_bundle):
    if request.param == "kernels" and (reason := kernels.unavailable()):
        pytest.skip(f"the kernels cannot run: {reason}")
    return runtime.load(small_bundle, backends=runtime.Backends(decoder=request.param))


def test_weights_of_few_bits_do_not_change_an_answer_in_a_crowd(small):
    """Bit for bit, whatever else runs and whatever is taken over."""
    questions = [
        "What is this?",
        "Count.",
        "A longer question, which takes more tokens than the others do.",
        "What is it?",
    ]

    def all_of(engine, order):
        crowd = {question: Asked(small, question, logprobs=2, limit=24) for question in order}
        engine.submit(*(one.request for one in crowd.values()))
        return {q: [(t.token_id, t.logprob.logprob) for t in one.tokens()] for q, one in crowd.items()}

    alone = {}
    for question in questions:
        lone = Engine(small, slots=1)
        alone |= all_of(lone, [question])
        lone.stop(0)
    engine = Engine(small, slots=3)
    assert all_of(engine, questions) == alone
    assert all_of(engine, questions[::-1]) == alone
    engine.stop(0)


def test_images_that_wait_are_encoded_together_on_a_gpu(model, alone, monkeypatch):
    """By an engine that takes the encoder's device for one: equal sizes follow one another."""
    monkeypatch.setattr(engines, "Cpu", type(None))
    engine = Engine(model, slots=3)
    shapes, encode, blocked = [], model.encoder, threading.Event()

    def encoding(images):
        shapes.append([image.shape for image in images])
        assert blocked.wait(WAIT)
        return encode(images)

    encoding.device = encode.device
    monkeypatch.setattr(model, "cache", runtime.image.embedding_cache.EmbedsCache())
    monkeypatch.setattr(model, "encoder", encoding)
    crowd = [asked(model, number) for number in (0, 2, 3)]
    engine.submit(crowd[0].request)
    wait_for(lambda: shapes)
    engine.submit(*(one.request for one in crowd[1:]))
    blocked.set()
    assert [one.ids() for one in crowd] == [alone[number][0] for number in (0, 2, 3)]
    assert [len(some) for some in shapes] == [1, 2], "two new images; the third was encoded before"
    engine.stop(WAIT)


def test_what_needs_no_encoding_does_not_wait_for_it(model, engine, alone, monkeypatch):
    """New pages wait in a row; a question without an image, and one about a page that was seen, are answered first."""
    seen = asked(model, 0)
    engine.submit(seen.request)
    assert seen.ids() == alone[0][0]
    text, again = asked(model, 1), asked(model, 0)
    again.request.pictures[0].condense()
    encode, begun, blocked = model.encoder, threading.Event(), threading.Event()

    def encoding(images):
        begun.set()
        assert blocked.wait(WAIT)
        return encode(images)

    encoding.device = encode.device
    monkeypatch.setattr(model, "encoder", encoding)
    pages = [Asked(model, "What is this?", [picture(seed)]) for seed in (21, 22)]
    engine.submit(*(page.request for page in pages))
    assert begun.wait(WAIT)
    engine.submit(text.request, again.request)
    try:
        assert (text.ids(), again.ids()) == (alone[1][0], alone[0][0])
        assert not any(page.said.qsize() for page in pages)
    finally:
        blocked.set()
    for page, seed in zip(pages, (21, 22), strict=True):
        *_, last = model.generate([picture(seed)], "What is this?", Options(max_new_tokens=12))
        assert page.ids() == last.result.token_ids


def test_an_image_that_cannot_be_encoded_fails_its_request_alone(model, alone, monkeypatch):
    monkeypatch.setattr(engines, "Cpu", type(None))
    engine = Engine(model, slots=3)
    encode, wrong = model.encoder, asked(model, 4)
    refused = wrong.request.pictures[0].pixel_values

    def encoding(images):
        if any(np.array_equal(image, refused) for image in images):
            raise UserError("built for other sizes")
        return encode(images)

    monkeypatch.setattr(model, "cache", runtime.image.embedding_cache.EmbedsCache())
    monkeypatch.setattr(model, "encoder", encoding)
    right = [asked(model, 0), asked(model, 2)]
    engine.submit(right[0].request, wrong.request, right[1].request)
    assert [failed.reason for failed in wrong.tokens()] == ["request"]
    assert [one.ids() for one in right] == [alone[0][0], alone[2][0]]
    engine.stop(WAIT)


def test_draws_depend_on_their_seed_alone(model, engine):
    options = {"sampling": Sampling(temperature=1.5, seed=7)}
    lone = asked(model, 0, **options)
    engine.submit(lone.request)
    expected = lone.ids()
    crowd = [asked(model, 0, **options), asked(model, 2, sampling=Sampling(temperature=2, seed=8)), asked(model, 1)]
    engine.submit(*(one.request for one in crowd))
    assert crowd[0].ids() == expected
    others = [asked(model, 0, sampling=Sampling(temperature=1.5, seed=seed)) for seed in range(3)]
    engine.submit(*(one.request for one in others))
    assert any(one.ids() != expected for one in others)


def test_embeds_that_are_no_numbers_fail_their_greedy_request_alone(model, engine, alone):
    whole, other = asked(model, 1), asked(model, 4)
    broken = Asked(model, "What is this?", [picture(9)])
    broken.request.pictures[0].embeds = np.full((broken.request.pictures[0].tokens, 128), np.nan, np.float32)
    engine.submit(whole.request, broken.request, other.request)
    (failed,) = broken.tokens()
    assert (failed.reason, str(failed)) == ("numbers", str(InvalidLogitsError()))
    assert (whole.ids(), other.ids()) == (alone[1][0], alone[4][0])
    again = Asked(model, "What is this?", [picture(9)])
    engine.submit(again.request)
    *_, last = model.generate([picture(9)], "What is this?", Options(max_new_tokens=12))
    assert again.ids() == last.result.token_ids, "nothing is left of what failed"


def test_logprobs_are_those_of_the_logits(model, engine):
    one = asked(model, 1, logprobs=4, limit=3)
    engine.submit(one.request)
    tokens = one.tokens()
    logits = model.decoder.start(64).forward(one.request.ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    first = tokens[0].logprob
    assert first.token_id == tokens[0].token_id == logits.argmax()
    assert first.logprob == pytest.approx(expected.max(), abs=1e-4)
    assert [i for i, _ in first.top] == np.argsort(-expected)[:4].tolist()
    assert all(value == pytest.approx(expected[i], abs=1e-4) for i, value in first.top)
    assert engines.logprob_of(np.array([0.0, 1.0]), 0, 0).top == ()


def test_who_leaves_frees_the_slot(model, engine, alone):
    long = [asked(model, ENDLESS, limit=2000) for _ in range(3)]
    engine.submit(*(one.request for one in long))
    for one in long:
        one.said.get(timeout=WAIT)
    long[1].request.cancelled = True
    late = asked(model, 4)
    engine.submit(late.request)
    assert late.ids() == alone[4][0]
    fed = long[1].said.qsize()
    long[0].request.cancelled = long[2].request.cancelled = True
    wait_for(lambda: engine.running == 0)
    assert long[1].said.qsize() == fed, "nothing more was decoded for it"


def test_a_deadline_ends_a_request_wherever_it_is(model, engine):
    running = [asked(model, ENDLESS, limit=2000) for _ in range(3)]
    engine.submit(*(one.request for one in running))
    for one in running:
        one.said.get(timeout=WAIT)
    waiting = asked(model, 3, deadline=time.monotonic() - 1)
    engine.submit(waiting.request)
    assert [failed.reason for failed in waiting.tokens()] == ["deadline"]
    running[0].request.deadline = time.monotonic()
    assert running[0].tokens()[-1].reason == "deadline"
    for one in running:
        one.request.cancelled = True


def test_a_full_queue_is_busy_and_takes_none_of_them(model):
    engine = Engine(model, slots=1, queue_size=2)
    first = asked(model, ENDLESS, limit=2000)
    engine.submit(first.request)
    first.said.get(timeout=WAIT)
    with pytest.raises(Busy):
        engine.submit(*(asked(model, 1).request for _ in range(3)))
    assert engine.waiting == 0
    waiting = [asked(model, 1) for _ in range(2)]
    engine.submit(*(one.request for one in waiting))
    with pytest.raises(Busy, match="2 requests are waiting"):
        engine.submit(asked(model, 1).request)
    first.request.cancelled = True
    assert waiting[0].ids() == waiting[1].ids()
    engine.stop(0)


def test_stopping_finishes_what_is_under_way(model, alone):
    engine = Engine(model, slots=1)
    first, second = asked(model, 0), asked(model, 1)
    engine.submit(first.request, second.request)
    engine.stop(WAIT)
    assert (first.ids(), second.ids()) == (alone[0][0], alone[1][0])
    assert not engine.accepting
    with pytest.raises(Busy, match="about to stop"):
        engine.submit(asked(model, 1).request)


def test_stopping_fails_what_takes_too_long(model):
    engine = Engine(model, slots=1)
    running, waiting = asked(model, ENDLESS, limit=4000), asked(model, 4)
    engine.submit(running.request, waiting.request)
    running.said.get(timeout=WAIT)
    engine.stop(0)
    assert running.tokens()[-1].reason == waiting.tokens()[-1].reason == "stopping"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_crash_fails_everyone_at_once(model, monkeypatch, part):
    engine = Engine(model, slots=1)
    running, waiting = asked(model, ENDLESS, limit=4000), asked(model, 4)
    engine.submit(running.request)
    running.said.get(timeout=WAIT)

    def crash(*_):
        raise MemoryError("no more")

    if part == "decoder":
        monkeypatch.setattr(engine._slots, "step", crash)
    else:
        monkeypatch.setattr(model, "cache", runtime.image.embedding_cache.EmbedsCache())
        monkeypatch.setattr(model, "encoder", crash)
    engine.submit(waiting.request)
    assert running.tokens()[-1].reason == waiting.tokens()[-1].reason == "crash"
    assert not engine.accepting
    with pytest.raises(Failed, match="has crashed: no more"):
        engine.submit(asked(model, 1).request)
    engine.stop(WAIT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_fails_a_request_that_is_on_its_way_into_a_slot(model, monkeypatch):
    """The encoder crashes while the decoder's thread holds a request that waits no longer and is in no slot yet."""
    engine = Engine(model, slots=1)
    running, ready, encoding = asked(model, ENDLESS, limit=4000), asked(model, 1), asked(model, 4)
    engine.submit(running.request)
    running.said.get(timeout=WAIT)
    taken, make = threading.Event(), engines.Answer

    def crash(*_):
        assert taken.wait(WAIT)
        raise MemoryError("no more")

    def make_late(*arguments):
        taken.set()
        wait_for(lambda: engine.crashed is not None and not engine._ready)
        return make(*arguments)

    engine.submit(ready.request)
    wait_for(lambda: engine._ready)
    monkeypatch.setattr(model, "cache", runtime.image.embedding_cache.EmbedsCache())
    monkeypatch.setattr(model, "encoder", crash)
    monkeypatch.setattr(engines, "Answer", make_late)
    engine.submit(encoding.request)
    wait_for(lambda: engine._encoding)
    running.request.cancelled = True
    assert [failed.reason for failed in ready.tokens()] == ["crash"]
    assert [failed.reason for failed in encoding.tokens()] == ["crash"]
    engine.stop(WAIT)


def test_a_condensed_picture_gives_the_same_answer(model, engine, alone, monkeypatch):
    """A small image is kept as it is; a large one as what is made of it."""
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8))
    *_, last = model.generate([large], "What is this?", Options(max_new_tokens=12))
    monkeypatch.setattr(model, "cache", runtime.image.embedding_cache.EmbedsCache())
    for cached in (False, True):
        for image, expected in ((picture(0), alone[0][0]), (large, last.result.token_ids)):
            one = Asked(model, "What is this?", [image])
            (condensed,) = one.request.pictures
            condensed.condense()
            assert (condensed.embeds is not None) == cached
            assert (condensed.image is None) == (cached or image is large)
            engine.submit(one.request)
            assert one.ids() == expected


def test_prompts_are_cut_into_chunks_between_steps(model, alone, monkeypatch):
    """Whoever decodes goes on while a long prompt comes in."""
    monkeypatch.setattr(engines, "CHUNK", 4)
    engine = Engine(model, slots=2)
    first = asked(model, ENDLESS, limit=2000)
    engine.submit(first.request)
    first.said.get(timeout=WAIT)
    late = asked(model, 4)
    engine.submit(late.request)
    late.said.get(timeout=WAIT)
    chunks = -(-(len(late.request.ids) - late.request.cached_tokens) // 4)
    assert chunks > 8
    assert first.said.qsize() >= chunks - 1
    assert late.ids() == alone[4][0][1:]
    first.request.cancelled = True
    engine.stop(WAIT)


def wait_for(condition):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
