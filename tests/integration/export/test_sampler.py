"""The sampling graph against the sampling on the host."""

import numpy as np
import onnx
import onnxruntime
import pytest

from export.decoder.sampler import sampler_graph
from runtime.generate.sampler import next_token
from runtime.types import Sampling

VOCABULARY = 500


class Fixed:
    """A generator whose next number is known."""

    def __init__(self, value: float):
        self.value = value

    def choice(self, count: int, p: np.ndarray) -> int:
        sums = p.cumsum()
        return int((sums / sums[-1]).searchsorted(self.value, side="right"))


def drawn(session, logits: np.ndarray, sampling: Sampling, value: float) -> int:
    feeds = {
        "logits": logits[None, None],
        "temperature": np.array([sampling.temperature]),
        "top_k": np.array([sampling.top_k or len(logits)], np.int64),
        "top_p": np.array([sampling.top_p]),
        "random": np.array([value]),
    }
    (token,) = session.run(None, feeds)
    assert token.shape == (1, 1, 1) and token.dtype == np.int64
    return int(token[0, 0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.3),
        Sampling(temperature=1.5, top_k=7),
        Sampling(temperature=1.5, top_k=10 * VOCABULARY),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=2.0, top_k=40, top_p=0.9),
        Sampling(temperature=1e-6),
    ],
    ids=str,
)
def test_the_same_number_draws_the_same_token(dtype, sampling):
    model = sampler_graph(VOCABULARY, dtype)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    found = set()
    for turn in range(60):
        logits = (3 * random.standard_normal(VOCABULARY)).astype(dtype)
        if turn % 3 == 0:
            logits = np.round(logits)  # many are equal, also at the edge of what remains
        value = random.random()
        token = next_token(logits.astype(np.float32), [], sampling, Fixed(value))
        limited = sampling if sampling.top_k <= VOCABULARY else Sampling(temperature=sampling.temperature)
        assert drawn(session, logits, limited, value) == token, turn
        found.add(token)
    assert len(found) > 20


def test_the_least_and_the_greatest_number():
    session = onnxruntime.InferenceSession(
        sampler_graph(4, "float32").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    logits = np.array([-np.inf, 1.0, 2.0, -np.inf], np.float32)
    sampling = Sampling(temperature=1.0)
    assert drawn(session, logits, sampling, 0.0) == 1
    assert drawn(session, logits, sampling, np.nextafter(1.0, 0.0)) == 2


def test_the_drawn_tokens_have_the_probabilities():
    """Over a grid of numbers, each token comes as often as it is likely."""
    session = onnxruntime.InferenceSession(
        sampler_graph(5, "float32").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    logits = np.log(np.array([0.1, 0.4, 0.05, 0.25, 0.2], np.float32))
    grid = (np.arange(2000) + 0.5) / 2000
    counts = np.bincount([drawn(session, logits, Sampling(temperature=1.0, top_k=4), u) for u in grid], minlength=5)
    wanted = np.array([0.1, 0.4, 0, 0.25, 0.2]) / 0.95
    assert np.abs(counts / 2000 - wanted).max() < 1e-3


def test_logits_that_are_no_numbers_give_no_token():
    session = onnxruntime.InferenceSession(
        sampler_graph(300, "float32").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    logits = np.zeros(300, np.float32)
    logits[7] = np.nan
    assert drawn(session, logits, Sampling(temperature=1.0), 0.5) == 300
