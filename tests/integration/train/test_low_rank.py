"""Weight differences as low-rank factors."""

import pytest
import torch

from train.errors import CheckpointError
from train.model.low_rank import add_factors, factors


def models(rank: int) -> tuple[dict, dict]:
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(12, 20), "b.weight": torch.randn(9, 9), "norm.weight": torch.ones(9)}
    change = torch.randn(12, rank) @ torch.randn(rank, 20)
    return base, base | {"a.weight": base["a.weight"] + change}


def test_a_change_of_low_rank_comes_back():
    base, trained = models(3)
    found, error = factors(base, trained, 3)
    assert set(found) == {"a.lora_A", "a.lora_B"}
    assert error < 1e-6
    add_factors(base, found)
    torch.testing.assert_close(base["a.weight"], trained["a.weight"], rtol=0, atol=1e-5)


def test_the_error_is_what_truncation_costs():
    base, trained = models(5)
    found, error = factors(base, trained, 2)
    change = (trained["a.weight"] - base["a.weight"]).double()
    left = change - (found["a.lora_B"] @ found["a.lora_A"]).double()
    assert error == pytest.approx(float(left.norm() / change.norm()), rel=1e-5)
    assert error > 0.1


def test_what_factors_cannot_stand_for_is_an_error():
    base, _ = models(1)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        factors(base, base | {"norm.weight": torch.zeros(9)}, 2)
    with pytest.raises(CheckpointError, match="not the same model"):
        factors(base, {"a.weight": base["a.weight"]}, 2)
