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
from runtime.serve.types import Busy, Failed, Request
from runtime.types import Sampling
from tests.support.fakes import EOS, NAN_TOKEN, FakeDecoder, FakeEncoder, FakeImage, greedy_answer, logits_of

WAIT = 20  # seconds, that a test waits for what must come


class Asked:
    """A request and what came of it."""

    def __init__(self, parts, limit=6, sampling=None, eos=frozenset({EOS}), **options):
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
        self.limit, self.events = limit, queue.Queue()
        generation = Generation(Sampler(sampling or Sampling()), limit, eos)
        self.request = Request(token_ids, images, generation, self.events.put, **options)

    def wait(self):
        found = [self.events.get(timeout=WAIT)]
        while not isinstance(found[-1], Failed) and found[-1].finish_reason is None:
            found.append(self.events.get(timeout=WAIT))
        return found

    def ids(self):
        return [event.token_id for event in self.wait()]

    def expected(self):
        return greedy_answer(self.fed, self.limit)


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
    image, right = Asked([FakeImage(9), 5]), Asked([FakeImage(9), 5])
    image.request.images[0].embeddings = np.full((3, 2), np.nan, np.float32)
    for one in (image, right):
        scheduler.submit(one.request)
        finish(scheduler)
    assert image.wait()[0].reason == "numbers"
    assert right.ids() == right.expected()


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


class Requests(RuleBasedStateMachine):
    """Requests come, are cancelled, stopped and expire between any two steps, and in the end the decoder may crash."""

    asked = Bundle("asked")

    @initialize(
        slots=st.integers(1, 3),
        batches=st.booleans(),
        invariant_batches=st.booleans(),
        runs_to_crash=st.just(10**6) | st.integers(1, 60),
    )
    def begin(self, slots, batches, invariant_batches, runs_to_crash):
        self.runs_to_crash = runs_to_crash
        encoder, decoder = FakeEncoder(batches), FakeDecoder(fault=self.fault)
        self.scheduler = scheduler_of(
            slots, encoder, decoder, queue_size=4, callbacks=self, batch_invariant=invariant_batches
        )
        self.all, self.finished_reasons = [], []

    @property
    def broken(self):
        return self.runs_to_crash <= 0

    def fault(self):
        self.runs_to_crash -= 1
        if self.broken:
            raise MemoryError("broken")

    # Callbacks

    def finished(self, reason):
        self.finished_reasons.append(reason)

    def first_token(self, seconds): ...

    next_token = step = encoded = cache = first_token

    def prefilled(self, fed, cached):
        assert fed >= 1

    tokens = st.integers(20, 22)
    images = st.builds(FakeImage, st.integers(0, 2), st.integers(1, 4))

    @rule(
        target=asked,
        parts=st.lists(tokens | images, min_size=1, max_size=6),
        padding=st.sampled_from([0, 1, CHUNK, 2 * CHUNK]),
        limit=st.integers(1, 12),
        logprobs=st.none() | st.integers(0, 2),
    )
    def submit(self, parts, padding, limit, logprobs):
        one = Asked([20] * padding + parts, limit, logprobs=logprobs)
        one.taken = True
        try:
            self.scheduler.submit(one.request)
            self.all.append(one)
        except (Busy, Failed):
            one.taken = False
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
        for one in self.all:
            events = list(one.events.queue)
            ended = bool(events) and (isinstance(events[-1], Failed) or events[-1].finish_reason is not None)
            assert ended or one.request.ended is not None
            if ended and isinstance(events[-1], Failed):
                assert events[-1].reason in ("deadline", "crash")
                assert events[-1].reason != "crash" or self.broken
        assert self.scheduler.accepting or self.broken
        if self.runs_to_crash > 100:  # what the slots hold serves the next ones right
            one = Asked([20, 21, 22])
            self.scheduler.submit(one.request)
            self.decode(12)
            assert one.ids() == one.expected()


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=40)
