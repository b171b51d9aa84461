"""The scheduler on a fake decoder: whoever comes, goes, fails or waits, answers are those of a lone, fresh decoder."""

import queue
import threading
import time

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from runtime.errors import UserError
from runtime.generate.sampler import Sampler
from runtime.generate.session import Generation
from runtime.image.embedding_cache import EmbeddingCache
from runtime.serve.logprobs import logprob_of
from runtime.serve.scheduler import CHUNK, Scheduler
from runtime.serve.types import Busy, Callbacks, Failed, Request
from runtime.types import Sampling
from tests.support.fakes import (
    EOS,
    LATE_POISON,
    NAN_TOKEN,
    POISON,
    FakeDecoder,
    FakeEncoder,
    FakeImage,
    greedy_answer,
    logits_of,
)

WAIT = 20  # seconds, that a test waits for what must come


class Asked:
    """A request and what came of it."""

    def __init__(self, parts, limit=6, sampling=None, eos=frozenset({EOS}), constraint=None, **options):
        token_ids, self.fed, images, row = [], [], [], 0
        for part in parts:
            if isinstance(part, FakeImage):
                token_ids += range(-row - 1, -row - 1 - part.tokens, -1)
                row += part.tokens
                images.append(part)
                self.fed += part.rows()
            else:
                token_ids.append(part)
                self.fed.append(part)
        self.limit, self.eos, self.events = limit, eos, queue.Queue()
        generation = Generation(Sampler(sampling or Sampling(), constraint), limit, eos)
        self.request = Request(token_ids, images, generation, self.events.put, **options)

    def wait(self):
        found = [self.events.get(timeout=WAIT)]
        while not isinstance(found[-1], Failed) and found[-1].finish_reason is None:
            found.append(self.events.get(timeout=WAIT))
        return found

    def ids(self):
        return [event.token_id for event in self.wait()]

    def expected(self):
        return greedy_answer(self.fed, self.limit, self.eos)


def test_a_warm_scheduler_answers_as_a_cold_one():
    decoder = FakeDecoder()
    scheduler = scheduler_of(decoder=decoder)
    scheduler.warm_up()
    assert decoder.batches[0][0].runs == [CHUNK] and decoder.batches[0].steps == [1]
    scheduler.start()
    asked = Asked([5, 6, 7])
    scheduler.submit(asked.request)
    assert asked.ids() == asked.expected()
    assert asked.request.cached_tokens == 0
    scheduler.stop(0)


def test_the_time_to_the_first_token_begins_with_the_clients_request():
    seen = []

    class Noted(Callbacks):
        def first_token(self, seconds):
            seen.append(seconds)

    scheduler = scheduler_of(callbacks=Noted())
    scheduler.start()
    asked = Asked([5, 6, 7], arrived=time.monotonic() - 100)
    assert scheduler.retry_after() is None
    scheduler.submit(asked.request)
    asked.wait()
    assert len(seen) == 1 and 100 <= seen[0] < 100 + WAIT
    scheduler.stop(0)
    assert 1 <= scheduler.retry_after() <= WAIT


def endless(parts):
    return Asked(parts, limit=150, eos=frozenset())


def scheduler_of(slots=2, encoder=None, decoder=None, **options):
    return Scheduler(encoder or FakeEncoder(), decoder or FakeDecoder(), EmbeddingCache(), slots, **options)


@pytest.fixture
def scheduler():
    made = scheduler_of(slots=3, queue_size=8)
    made.start()
    yield made
    made.stop(0)


def advance(scheduler, until):
    """Work on the test's own thread."""
    for _ in range(1000):
        if until():
            return
        scheduler._advance()
        while not scheduler._vision._jobs.empty():
            scheduler._vision._work(scheduler._vision._jobs.get())
    raise AssertionError("nothing more happens")


def finish(scheduler):
    advance(scheduler, lambda: not scheduler.running and not scheduler.waiting)


def test_batched_answers_are_those_of_a_lone_decoder(scheduler):
    questions = [[5, FakeImage(1), 6], [7, 8], [5, FakeImage(1), FakeImage(2)], [5] * 100, [7, 9]]
    for _ in range(2):
        asked = [Asked(parts) for parts in questions]
        scheduler.submit(*(one.request for one in asked))
        assert [one.ids() for one in asked] == [one.expected() for one in asked]
    assert scheduler.waiting == scheduler.running == 0


def test_a_cached_prefix_is_reused_up_to_the_first_difference():
    scheduler = scheduler_of(slots=1)
    for parts, cached in (
        ([1, FakeImage(1), 5, 6, 7], 0),
        ([1, FakeImage(1), 5, 6, 7], 5),  # the last tokens are not fed one alone
        ([1, FakeImage(1), 5, 9, 9, 9], 5),
        ([1, FakeImage(2), 5, 9, 9, 9], 1),  # another image is another image, at whatever position
    ):
        one = Asked(parts)
        scheduler.submit(one.request)
        finish(scheduler)
        assert (one.ids(), one.request.cached_tokens) == (one.expected(), cached)


def test_an_answer_is_part_of_the_cached_prefix():
    scheduler = scheduler_of(slots=2)
    first = Asked([5, 6, 7], limit=9, eos=frozenset())
    scheduler.submit(first.request)
    finish(scheduler)
    said = first.ids()
    second = Asked([5, 6, 7, *said, 8, 9])
    scheduler.submit(second.request)
    finish(scheduler)
    assert (second.ids(), second.request.cached_tokens) == (second.expected(), 3 + len(said) - 1)


def test_a_shared_system_prompt_does_not_evict_another_image():
    scheduler = scheduler_of(slots=3)
    system = [3, 4, 5, 6]
    for question in (10, 11, 12):
        for page in range(3):
            one = Asked([*system, FakeImage(page, tokens=9), question, 7])
            scheduler.submit(one.request)
            finish(scheduler)
            assert one.ids() == one.expected()
            assert (one.request.cached_tokens >= len(system) + 9) == (question != 10)


def test_images_are_encoded_together_where_that_is_faster_and_each_once():
    for batches in (False, True):
        encoder = FakeEncoder(batches)
        scheduler = scheduler_of(slots=3, encoder=encoder)
        asked = [Asked([FakeImage(seed), 5]) for seed in (1, 2, 1)]
        scheduler.submit(*(one.request for one in asked))
        finish(scheduler)
        assert [one.ids() for one in asked] == [one.expected() for one in asked]
        assert encoder.runs == ([2] if batches else [1, 1])


def test_what_needs_no_encoding_does_not_wait_for_it():
    begun, blocked = threading.Event(), threading.Event()

    def block():
        begun.set()
        assert blocked.wait(WAIT)

    scheduler = scheduler_of(slots=2, encoder=FakeEncoder(fault=block))
    scheduler.start()
    page, text, seen = Asked([FakeImage(1), 5]), Asked([5, 6]), Asked([FakeImage(2), 6])
    seen.request.images[0].embeddings = np.array(seen.request.images[0].rows(), np.float32)
    scheduler.submit(page.request)
    assert begun.wait(WAIT)
    scheduler.submit(text.request, seen.request)
    assert (text.ids(), seen.ids()) == (text.expected(), seen.expected())
    assert page.events.empty()
    blocked.set()
    assert page.ids() == page.expected()
    scheduler.stop(0)


def test_an_image_that_cannot_be_encoded_fails_its_request_alone():
    class Refusing(FakeEncoder):
        def __call__(self, images):
            if any(pixels[0, 0, 0] == 2 for pixels in images):
                raise UserError("built for other sizes")
            return super().__call__(images)

    scheduler = scheduler_of(slots=3, encoder=Refusing(batches=True))
    right, wrong, other = (Asked([FakeImage(seed), 5]) for seed in (1, 2, 3))
    scheduler.submit(right.request, wrong.request, other.request)
    finish(scheduler)
    (failed,) = wrong.wait()
    assert (failed.reason, str(failed)) == ("request", "built for other sizes")
    assert (right.ids(), other.ids()) == (right.expected(), other.expected())


def test_invalid_logits_fail_their_request_alone_and_leave_nothing():
    scheduler = scheduler_of(slots=3)
    broken, sampled = Asked([5, NAN_TOKEN]), Asked([5, NAN_TOKEN], sampling=Sampling(temperature=1.0))
    whole = Asked([5, 6])
    scheduler.submit(broken.request, sampled.request, whole.request)
    finish(scheduler)
    assert [one.wait()[0].reason for one in (broken, sampled)] == ["numbers", "numbers"]
    assert whole.ids() == whole.expected()
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        image, right = Asked([FakeImage(9), 5, 5], sampling=sampling), Asked([FakeImage(9), 5, 5])
        image.request.images[0].embeddings = np.full((3, 2), np.nan, np.float32)
        for one in (image, right):
            scheduler.submit(one.request)
            finish(scheduler)
        assert image.wait()[0].reason == "numbers"
        assert right.ids() == right.expected()
        assert right.request.cached_tokens == 0
        scheduler = scheduler_of(slots=3)


@pytest.mark.parametrize("poison", [POISON, LATE_POISON])
def test_a_request_that_a_graph_cannot_run_fails_alone(scheduler, poison):
    """At its prefill, or in a step that others take part in."""
    for _ in range(2):
        others = [Asked([5, 6], limit=60, eos=frozenset()), Asked([5, FakeImage(1)], limit=60, eos=frozenset())]
        wrong = Asked([5, poison, 7], eos=frozenset())
        scheduler.submit(others[0].request, wrong.request, others[1].request)
        (*tokens, failed) = wrong.wait()
        assert (failed.reason, len(tokens)) == ("internal", int(poison == LATE_POISON))
        assert [one.ids() for one in others] == [one.expected() for one in others]
        after = Asked([5, 6, 7])  # in the slot of the one that failed
        scheduler.submit(after.request)
        assert after.ids() == after.expected()
    assert scheduler.accepting


def test_an_image_that_fails_beside_a_known_one_fails_its_request_alone():
    class Poisoned(FakeEncoder):
        def __call__(self, images):
            if any(pixels[0, 0, 0] == 2 for pixels in images):
                raise RuntimeError("no memory for the convolution")
            return super().__call__(images)

    class Known(FakeImage):  # as one from the cache, it has no pixels any more
        shape = pixel_values = property(lambda self: self.gone(), lambda self, value: None)

        def gone(self):
            raise AssertionError("only where the embeddings are known")

    scheduler = scheduler_of(slots=2, encoder=Poisoned())
    known = Known(1)
    known.embeddings = np.array(known.rows(), np.float32)
    wrong, right = Asked([known, FakeImage(2), 5]), Asked([known, FakeImage(3), 5])
    scheduler.submit(wrong.request, right.request)
    finish(scheduler)
    assert [failed.reason for failed in wrong.wait()] == ["internal"]
    assert right.ids() == right.expected()


@pytest.mark.parametrize("call", ["copy", "rewind"])
def test_a_slot_that_cannot_be_prepared_fails_the_request_alone(call, monkeypatch):
    scheduler = scheduler_of(slots=2)
    first = Asked([5, 6, 7, 8], limit=60 if call == "copy" else 2, eos=frozenset())
    scheduler.submit(first.request)
    advance(scheduler, lambda: len(first.events.queue) >= 2)
    failing = True

    def once(wanted):
        def run(*arguments):
            nonlocal failing
            if failing:
                failing = False
                raise MemoryError
            return wanted(*arguments)

        return run

    for owner in [scheduler._slots] if call == "copy" else list(scheduler._slots._slots):
        monkeypatch.setattr(owner, call, once(getattr(owner, call)))
    wrong, after = Asked([5, 6, 7, 8, 9, 9]), Asked([5, 6, 7, 8, 9, 10])
    scheduler.submit(wrong.request, after.request)
    finish(scheduler)
    assert [failed.reason for failed in wrong.wait()] == ["internal"]
    assert (first.ids(), after.ids()) == (first.expected(), after.expected())
    assert wrong.events.empty()


def test_an_engine_for_other_sizes_is_not_broken():
    class BuiltForOneSize(FakeEncoder):
        def __call__(self, images):
            if not images[0].any():
                raise UserError("built for other sizes")  # what the worker tries after a failure
            if images[0][0, 0, 0] == 2:
                raise RuntimeError("no memory for the convolution")
            return super().__call__(images)

    scheduler = scheduler_of(slots=2, encoder=BuiltForOneSize())
    wrong, right = Asked([FakeImage(2), 5]), Asked([FakeImage(3), 5])
    scheduler.submit(wrong.request, right.request)
    finish(scheduler)
    assert wrong.wait()[0].reason == "internal"
    assert right.ids() == right.expected()


def test_an_image_waits_until_prompts_are_prefilled():
    """On a CPU both take all cores."""
    scheduler = scheduler_of(slots=2)
    text, image = Asked([5] * (3 * CHUNK)), Asked([FakeImage(1), 5])
    scheduler.submit(text.request)
    scheduler._advance()
    scheduler.submit(image.request)
    while scheduler._prefilling:
        assert scheduler._vision._jobs.empty()
        scheduler._advance()
    finish(scheduler)
    assert (text.ids(), image.ids()) == (text.expected(), image.expected())


def test_cached_embeddings_do_not_keep_alive_those_encoded_with_them():
    cache, images = EmbeddingCache(), [FakeImage(seed) for seed in (1, 2, 3)]
    scheduler = Scheduler(FakeEncoder(batches=True), FakeDecoder(), cache, 3)
    asked = [Asked([image, 5]) for image in images]
    scheduler.submit(*(one.request for one in asked))
    finish(scheduler)
    assert all(cache.get(image.key).base is None for image in images)


def test_logits_that_cannot_be_had_fail_those_that_need_them(monkeypatch):
    scheduler = scheduler_of(slots=3)
    sampled, greedy = Asked([5, 6], sampling=Sampling(temperature=1.0, seed=1), limit=20), Asked([5, 7], limit=20)
    scheduler.submit(sampled.request, greedy.request)
    advance(scheduler, lambda: len(scheduler._active) == 2)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler._slots, "logits", lambda count: [][count])
        scheduler._advance()
    finish(scheduler)
    assert sampled.wait()[-1].reason == "internal"
    assert greedy.ids() == greedy.expected()


def test_a_receiver_or_a_grammar_that_raises_ends_its_request_alone(scheduler):
    class Broken:
        def allow(self, logits):
            raise ZeroDivisionError

    def raising(event):
        raise RuntimeError("no loop")

    constrained, deaf, other = Asked([5], constraint=Broken()), endless([6]), Asked([5, 6], limit=40, eos=frozenset())
    deaf.request.sink = raising
    scheduler.submit(constrained.request, deaf.request, other.request)
    assert [failed.reason for failed in constrained.wait()] == ["internal"]
    assert other.ids() == other.expected()
    assert deaf.request.ended == "cancelled"


def test_who_has_left_is_not_encoded():
    encoder = FakeEncoder()
    scheduler = scheduler_of(encoder=encoder)
    gone, other = Asked([FakeImage(1), FakeImage(2), 5]), Asked([FakeImage(3), 5])
    encoder.fault = gone.request.end  # while its first image is encoded
    scheduler.submit(gone.request, other.request)
    finish(scheduler)
    assert len(encoder.runs) == 2
    assert other.ids() == other.expected()
    assert gone.events.empty()


def test_a_deadline_counts_while_the_encoder_is_busy():
    begun, blocked = threading.Event(), threading.Event()

    def block():
        begun.set()
        assert blocked.wait(WAIT)

    scheduler = scheduler_of(encoder=FakeEncoder(fault=block))
    scheduler.start()
    page = Asked([FakeImage(1), 5])
    scheduler.submit(page.request)
    assert begun.wait(WAIT)
    page.request.deadline = time.monotonic() - 1
    assert [failed.reason for failed in page.wait()] == ["deadline"]
    blocked.set()
    other = Asked([FakeImage(1), 5])
    scheduler.submit(other.request)
    assert other.ids() == other.expected()
    scheduler.stop(0)


def test_seeded_sampling_does_not_depend_on_the_batch(scheduler):
    sampling = Sampling(temperature=1.5, seed=7)
    lone = Asked([5, 6], sampling=sampling)
    scheduler.submit(lone.request)
    expected = lone.ids()
    asked = [Asked([5, 6], sampling=sampling), Asked([5, 7], sampling=Sampling(temperature=2, seed=8)), Asked([5, 6])]
    scheduler.submit(*(one.request for one in asked))
    assert asked[0].ids() == expected
    assert asked[2].ids() == asked[2].expected()


def test_logprobs_are_those_of_the_logits(scheduler):
    one = Asked([5, 6], logprobs=4, limit=3)
    scheduler.submit(one.request)
    first = one.wait()[0].logprob
    logits = logits_of([5, 6]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    assert (first.token_id, first.logprob) == (logits.argmax(), pytest.approx(expected.max(), abs=1e-5))
    assert [i for i, _ in first.top] == np.argsort(-expected)[:4].tolist()
    assert logprob_of(np.array([0.0, 1.0]), 0, 0).top == ()


def test_prompts_are_prefilled_in_chunks_between_steps():
    scheduler = scheduler_of(slots=2)
    running, late = endless([5]), Asked([6] * (3 * CHUNK + 1), limit=1)
    scheduler.submit(running.request)
    advance(scheduler, lambda: not running.events.empty())
    scheduler.submit(late.request)
    decoded = running.events.qsize()
    advance(scheduler, lambda: not late.events.empty())
    assert late.ids() == late.expected()
    assert running.events.qsize() - decoded >= 3
    assert [fed for fed in scheduler._slots[1].runs if fed > 1] == [CHUNK, CHUNK, CHUNK - 1, 2]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = scheduler_of(slots=4, decoder=FakeDecoder(1000))
    long = [Asked([token] * (8 * CHUNK), limit=2) for token in (6, 7)]
    scheduler.submit(*(one.request for one in long))
    scheduler._advance()
    scheduler._advance()
    short = Asked([5, 6], limit=1)
    scheduler.submit(short.request)
    for _ in range(3):
        scheduler._advance()
    assert short.ids() == short.expected()
    assert all(one.events.empty() for one in long)
    finish(scheduler)
    assert [one.ids() for one in long] == [one.expected() for one in long]


def test_long_prompts_leave_slots_for_short_ones():
    scheduler = scheduler_of(slots=2, decoder=FakeDecoder(1000), queue_size=8)
    long = [Asked([token] * (8 * CHUNK), limit=2) for token in (6, 7, 8)]
    scheduler.submit(*(one.request for one in long))
    for _ in range(3):
        scheduler._advance()
    assert (scheduler.running, scheduler.waiting) == (1, 2)
    for token in (20, 21, 22):
        short = Asked([5, token], limit=1)
        scheduler.submit(short.request)
        for _ in range(2):
            scheduler._advance()
        assert short.ids() == short.expected()
    assert all(one.events.empty() for one in long)
    finish(scheduler)
    assert [one.ids() for one in long] == [one.expected() for one in long]


def test_equal_prompts_are_prefilled_once():
    scheduler = scheduler_of(slots=3)
    equal = [Asked([6] * (3 * CHUNK), limit=2) for _ in range(2)]
    other = Asked([6] * CHUNK + [7] * CHUNK, limit=2)
    scheduler.submit(*(one.request for one in equal), other.request)
    finish(scheduler)
    assert [one.ids() for one in (*equal, other)] == [one.expected() for one in (*equal, other)]
    assert equal[1].request.cached_tokens == 3 * CHUNK - 2
    assert other.request.cached_tokens >= CHUNK


def test_who_needs_no_more_frees_the_slot(scheduler):
    long = [endless([5, i]) for i in range(3)]
    scheduler.submit(*(one.request for one in long))
    for one in long:
        one.events.get(timeout=WAIT)
    long[1].request.end("stop")
    late = Asked([9, 9])
    scheduler.submit(late.request)
    assert late.ids() == late.expected()
    for one in long:
        one.request.end()
    assert long[1].request.ended == "stop"


def test_a_deadline_ends_a_request_wherever_it_is():
    scheduler = scheduler_of(slots=1)
    running = endless([5])
    scheduler.submit(running.request)
    advance(scheduler, lambda: not running.events.empty())
    with_image, without = (Asked(parts, deadline=time.monotonic() - 1) for parts in ([FakeImage(1)], [6]))
    later = Asked([7])
    scheduler.submit(with_image.request, without.request, later.request)
    scheduler._advance()
    later.request.deadline = time.monotonic() - 1  # it waits for the slot now
    scheduler._advance()
    for one in (with_image, without, later):
        assert [failed.reason for failed in one.wait()] == ["deadline"]
    assert scheduler.running == 1
    running.request.deadline = time.monotonic() - 1
    scheduler._advance()
    assert running.wait()[-1].reason == "deadline"


def test_a_full_queue_is_busy_and_takes_none_of_them():
    scheduler = scheduler_of(slots=1, queue_size=2)
    scheduler.submit(endless([5]).request)
    advance(scheduler, lambda: scheduler.running)
    with pytest.raises(Busy):
        scheduler.submit(*(Asked([5]).request for _ in range(3)))
    assert scheduler.waiting == 0
    scheduler.submit(*(Asked([5]).request for _ in range(2)))
    with pytest.raises(Busy, match="2 requests are waiting"):
        scheduler.submit(Asked([5]).request)
    assert scheduler.places == 3


def test_stopping_finishes_what_runs_or_fails_it():
    for seconds, reason in ((WAIT, None), (0, "stopping")):
        slow = FakeDecoder(fault=lambda: time.sleep(0.01))
        scheduler = scheduler_of(slots=1, decoder=slow)
        scheduler.start()
        running, waiting = Asked([5], limit=20, eos=frozenset()), Asked([6])
        scheduler.submit(running.request, waiting.request)
        running.events.get(timeout=WAIT)
        scheduler.stop(seconds)
        assert getattr(running.wait()[-1], "reason", None) == reason
        assert getattr(waiting.wait()[-1], "reason", None) == reason
        assert not scheduler.accepting
        with pytest.raises(Busy, match="about to stop"):
            scheduler.submit(Asked([5]).request)


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_crash_fails_everyone_and_keeps_its_first_cause(part):
    broken = threading.Event()

    def fault():
        time.sleep(0.002)
        if broken.is_set():
            raise MemoryError(part)

    slow = FakeDecoder(fault=fault if part == "decoder" else lambda: time.sleep(0.01))
    scheduler = scheduler_of(1, FakeEncoder(fault=fault if part == "encoder" else lambda: None), slow)
    scheduler.start()
    running, waiting = endless([5]), Asked([FakeImage(1)])
    scheduler.submit(running.request)
    running.events.get(timeout=WAIT)
    broken.set()
    scheduler.submit(waiting.request) if part == "encoder" else None
    assert running.wait()[-1].reason == "crash"
    assert part == "decoder" or waiting.wait()[-1].reason == "crash"
    assert not scheduler.accepting
    with pytest.raises(Failed, match=f"has crashed: {part}"):
        scheduler.submit(Asked([5]).request)
    scheduler.stop(WAIT)


class Transient:
    """Raises at some of the calls that are made, of whatever part, and from one of them on at all."""

    def __init__(self, gaps, broken_from):
        self.at, self.broken_from = set(np.cumsum(gaps).tolist()), broken_from
        self.calls = self.raised = 0

    @property
    def broken(self):
        return self.calls >= self.broken_from

    def __call__(self):
        self.calls += 1
        if self.broken or self.calls in self.at:
            self.raised += 1
            raise MemoryError("a fault")


class Unrestricted:
    """A grammar that allows everything and may raise."""

    def __init__(self, fault):
        self.fault = fault

    def allow(self, logits):
        self.fault()
        return logits.copy()

    def push(self, token):
        self.fault()


class Requests(RuleBasedStateMachine):
    """Requests come, are cancelled, stopped and expire between any two steps, while any call may raise: of the encoder,
    the decoder, a grammar or a receiver. In the end the decoder may break for good."""

    asked = Bundle("asked")

    @initialize(
        slots=st.integers(1, 3),
        batches=st.booleans(),
        invariant_batches=st.booleans(),
        gaps=st.lists(st.integers(8, 40), max_size=12),  # more calls than a failed step and the trials after it take
        broken_from=st.just(10**6) | st.integers(1, 60),
    )
    def begin(self, slots, batches, invariant_batches, gaps, broken_from):
        self.fault = Transient(gaps, broken_from)
        encoder, decoder = FakeEncoder(batches, self.fault), FakeDecoder(fault=self.fault)
        self.scheduler = scheduler_of(
            slots, encoder, decoder, queue_size=4, callbacks=self, batch_invariant=invariant_batches
        )
        self.all, self.finished_reasons = [], []

    # Callbacks

    def finished(self, reason):
        self.finished_reasons.append(reason)

    def first_token(self, seconds): ...

    next_token = step = encoded = cache = first_token

    def prefilled(self, fed, cached):
        assert fed >= 1

    tokens = st.integers(20, 22) | st.sampled_from([20, 21, POISON, LATE_POISON])
    images = st.builds(FakeImage, st.integers(0, 2), st.integers(1, 4))

    @rule(
        target=asked,
        parts=st.lists(tokens | images, min_size=1, max_size=6),
        padding=st.sampled_from([0, 1, CHUNK, 2 * CHUNK]),
        limit=st.integers(1, 12),
        logprobs=st.none() | st.integers(0, 2),
        constrained=st.booleans(),
    )
    def submit(self, parts, padding, limit, logprobs, constrained):
        constraint = Unrestricted(self.fault) if constrained else None
        one = Asked([20] * padding + parts, limit, logprobs=logprobs, constraint=constraint)
        one.poisoned = POISON in parts or LATE_POISON in parts

        def sink(event):
            self.fault()
            one.events.put(event)

        one.request.sink = sink
        try:
            self.scheduler.submit(one.request)
            self.all.append(one)
        except (Busy, Failed):
            assert self.scheduler.waiting >= 4 or not self.scheduler.accepting
        return one

    @rule(one=asked, reason=st.sampled_from(["cancelled", "stop"]))
    def end(self, one, reason):
        one.request.end(reason)

    @rule(one=asked)
    def expire(self, one):
        one.request.deadline = time.monotonic() - 1

    @rule(times=st.integers(1, 4))
    def decode(self, times):
        for _ in range(times):
            self.run(self.scheduler._advance)

    @rule()
    def encode(self):
        vision = self.scheduler._vision
        if not vision._jobs.empty() and (requests := vision._jobs.get()) is not None:
            self.run(lambda: vision._work(requests))

    def run(self, work):
        """As the scheduler's threads do."""
        if not self.scheduler._ended.is_set():
            self.scheduler._guarded(work)

    @invariant()
    def answers_are_prefixes_of_the_right_ones(self):
        for one in getattr(self, "all", ()):
            events = list(one.events.queue)
            tokens = [event.token_id for event in events if not isinstance(event, Failed)]
            expected = one.expected()
            assert tokens == expected[: len(tokens)]
            assert all(not isinstance(event, Failed) and event.finish_reason is None for event in events[:-1])
            if events and not isinstance(events[-1], Failed) and events[-1].finish_reason:
                assert tokens == expected

    def teardown(self):
        if not hasattr(self, "all"):
            return
        for _ in range(2000):
            if not self.scheduler._unfinished():
                break
            self.decode(1)
            self.encode()
        assert not self.scheduler._unfinished()
        assert len(self.finished_reasons) == len(self.all)
        internal = 0
        for one in self.all:
            events = list(one.events.queue)
            ended = bool(events) and (isinstance(events[-1], Failed) or events[-1].finish_reason is not None)
            assert ended or one.request.ended is not None
            if ended and isinstance(events[-1], Failed):
                assert events[-1].reason in ("deadline", "crash", "internal")
                assert events[-1].reason != "crash" or self.fault.broken
                internal += events[-1].reason == "internal" and not one.poisoned
        assert self.scheduler.accepting or self.fault.broken
        if not self.fault.broken:
            assert internal <= self.fault.raised  # each fault fails one request at most
            self.fault.at, self.fault.broken_from = set(), 10**6  # what the slots hold serves the next ones right
            one = Asked([20, 21, 22])
            self.scheduler.submit(one.request)
            self.decode(12)
            assert one.ids() == one.expected()


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=40)
