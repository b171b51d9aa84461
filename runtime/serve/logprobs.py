"""Log-probabilities of tokens, from logits."""

import numpy as np

from runtime.serve.types import Logprob


def logprob_of(logits: np.ndarray, token: int, top: int) -> Logprob:
    """The log-probability of a token and of the `top` most probable ones, from logits [V]."""
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best: list[int] = np.argpartition(-logprobs, top)[:top].tolist() if top else []
    ordered = sorted(((i, float(logprobs[i])) for i in best), key=lambda pair: (-pair[1], pair[0]))
    return Logprob(token, float(logprobs[token]), tuple(ordered))
