"""The generation core on a fake decoder: whatever is asked one after the other, answers are those of a fresh start."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.generate.sampler import Sampler
from runtime.generate.session import Generation, Prompt, Session, common_prefix_length
from runtime.types import Sampling
from tests.support.fakes import EOS, VOCABULARY, FakeDecoder, FakeImage, greedy_answer

GREEDY = Sampling()
TOKENS = st.lists(st.integers(20, 25), min_size=1, max_size=8)  # few, so that prompts have much in common


def prompt_of(parts: list[int | FakeImage]) -> tuple[Prompt, list]:
    """A prompt of tokens and images, and what a decoder must be fed for it."""
    token_ids, fed, images, row = [], [], [], 0
    for part in parts:
        if isinstance(part, FakeImage):
            token_ids += range(-row - 1, -row - 1 - part.tokens, -1)
            row += part.tokens
            images.append((part.key, np.array(part.rows(), np.float32)))
            fed += part.rows()
        else:
            token_ids.append(part)
            fed.append(part)
    return Prompt.of(token_ids, images), fed


def answer(session: Session, prompt: Prompt, count: int, sampling: Sampling = GREEDY) -> list[int]:
    generation = Generation(Sampler(sampling), count, frozenset({EOS}))
    generation.push(session.prefill(prompt, generation.sampler.after))
    while generation.finish_reason is None:
        generation.push(session.step(generation.token_ids[-1], generation.sampler.after))
    return generation.token_ids


PARTS = st.lists(
    st.integers(20, 23) | st.builds(FakeImage, st.integers(0, 2), st.integers(1, 3)), min_size=1, max_size=6
)


@given(st.lists(st.tuples(PARTS, st.integers(1, 6)), min_size=1, max_size=6))
def test_answers_in_one_session_are_those_of_a_fresh_decoder(turns):
    session = Session(FakeDecoder(), 200)
    for parts, count in turns:
        prompt, fed = prompt_of(parts)
        assert answer(session, prompt, count) == greedy_answer(fed, count)


@given(PARTS, PARTS, st.integers(1, 5))
def test_a_second_turn_prefills_only_what_is_new(first, second, count):
    decoder = FakeDecoder()
    session = Session(decoder, 200)
    prompt, fed = prompt_of(first)
    said = answer(session, prompt, count)
    following, fed_next = prompt_of(second)
    whole = prompt.followed_by(said, following)
    expected = [*fed, *said, *fed_next]
    runs = len(decoder.sequences[0].runs)
    assert answer(session, whole, count) == greedy_answer(expected, count)
    unfed = 1  # the last token of the first answer
    assert decoder.sequences[0].runs[runs] == unfed + len(fed_next)


@given(PARTS, PARTS, PARTS, st.integers(0, 4))
def test_a_prefill_that_fails_harms_no_later_one(first, failing, second, when):
    decoder = FakeDecoder()
    session = Session(decoder, 200)
    prompt, fed = prompt_of(first)
    answer(session, prompt, 3)

    def interrupted(sequence, token_ids, embeddings):
        sequence.forward(token_ids[:when] or token_ids, embeddings)  # the cache grew before the interrupt came
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(prompt_of(failing)[0], interrupted)
    for parts in (second, first):
        prompt, fed = prompt_of(parts)
        assert answer(session, prompt, 3) == greedy_answer(fed, 3)


@given(TOKENS, st.integers(0, 2**31), st.floats(0.1, 2), st.integers(0, VOCABULARY), st.floats(0.1, 1))
def test_seeded_sampling_repeats_and_does_not_depend_on_what_was_cached(tokens, seed, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    prompt, _ = prompt_of(tokens)
    session = Session(FakeDecoder(), 200)
    first = answer(session, prompt, 5, sampling)
    assert answer(session, prompt, 5, sampling) == first == answer(Session(FakeDecoder(), 200), prompt, 5, sampling)


def test_generation_ends_at_the_end_of_sequence_and_at_its_limit():
    generation = Generation(Sampler(GREEDY), 3, frozenset({EOS}))
    generation.push(7)
    assert generation.finish_reason is None
    generation.push(EOS)
    assert (generation.finish_reason, generation.token_ids) == ("stop", [7, EOS])
    endless = Generation(Sampler(GREEDY), 2, frozenset())
    for token in (EOS, EOS):
        endless.push(token)
    assert endless.finish_reason == "length"


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_length(one, other):
    length = common_prefix_length(one, other)
    assert one[:length] == other[:length]
    assert length in (len(one), len(other)) or one[length] != other[length]
