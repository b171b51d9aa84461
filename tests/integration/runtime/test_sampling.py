"""Sampling against transformers' logits processors, and the draw against its probabilities."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.errors import InvalidLogitsError, UserError
from runtime.generate.sampler import _filtered, _penalise, next_token
from runtime.types import Sampling

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5, 1.0])
def test_probabilities_are_transformers(temperature, top_k, top_p, min_p):
    logits = RANDOM.standard_normal(300, dtype=np.float32) * 3
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    expected = torch.softmax(processors(None, torch.from_numpy(logits)[None].double()), -1)[0].numpy()
    found = _filtered(logits, Sampling(temperature, top_k, top_p, min_p=min_p))
    assert np.array_equal(found > 0, expected > 0)
    assert np.abs(found - expected).max() < 1e-12


def test_repetition_penalty_is_transformers():
    logits = RANDOM.standard_normal(50, dtype=np.float32)
    generated = [3, 7, 7, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([generated]), torch.from_numpy(logits)[None].clone())
    before = logits.copy()
    assert np.allclose(_penalise(logits, generated, 1.7), expected[0].numpy(), atol=1e-7)
    assert np.array_equal(logits, before), "the logits are not changed in place"


def test_temperature_zero_takes_the_likeliest_of_what_the_penalty_leaves():
    logits = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    random = np.random.default_rng(0)
    assert next_token(logits, [], Sampling(), random) == 1
    assert next_token(logits, [1], Sampling(repetition_penalty=1.1), random) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(temperature: float, bad: float):
    logits = np.array([1.0, bad, 2.0], np.float32)
    with pytest.raises(InvalidLogitsError, match="NaN or Inf"):
        next_token(logits, [], Sampling(temperature), np.random.default_rng(0))


def test_min_p_is_sampled_from_logits_on_the_host():
    """A graph that samples on a device does not have it."""
    assert Sampling(1.0, top_k=3, top_p=0.5).history_independent
    assert not Sampling(1.0, min_p=0.1).history_independent


def test_draws_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    random = np.random.default_rng(0)
    draws = [next_token(logits, [], Sampling(temperature=1.0), random) for _ in range(20_000)]
    assert np.abs(np.bincount(draws) / len(draws) - [0.5, 0.3, 0.2]).max() < 0.015


def test_a_tiny_temperature_does_not_overflow():
    logits = np.array([1e4, -1e4, 9.99e3], np.float32)
    assert next_token(logits, [], Sampling(temperature=1e-6), np.random.default_rng(0)) == 0


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
            {"repetition_penalty": 0.0}, {"seed": -1}, {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": float("nan")}]
)  # fmt: skip
def test_values_out_of_range_are_named(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
