"""The benchmark of resolutions of training: what its runs have in common."""

import pytest

from benchmarks.warm_up import plans
from train.synth.fonts import SIZES


@pytest.mark.parametrize("steps", [200, 1000])
def test_runs_cost_the_same_pixels_and_end_alike(steps):
    throughout, warmed_up = plans(steps).values()
    (whole,) = throughout
    pixels = {sum(phase["steps"] * phase["side"] ** 2 for phase in phases) for phases in (throughout, warmed_up)}
    assert pixels == {steps * whole["side"] ** 2}
    assert len(warmed_up) == 2 and warmed_up[-1] == whole | {"steps": steps // 2}


def test_half_the_side_has_text_of_half_the_size():
    smaller, whole = plans(1000)["128, then 256"]
    for key in ("side", "min_px", "max_px"):
        assert whole[key] == 2 * smaller[key]
    assert smaller["min_px"] >= SIZES[0]
