"""Scores against their definitions and an independent library."""

import itertools

import pytest
import torch
from torchvision.ops import box_iou

from calib.metrics import anls, exact_match, iou


def edit_distance(a: str, b: str) -> int:
    """The definition, by recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(edit_distance(a[1:], b) + 1, edit_distance(a, b[1:]) + 1, edit_distance(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize(("a", "b"), [*itertools.product(["", "a", "12.50", "1250", "Total", "toal", "x1"], repeat=2)])
def test_anls_is_its_definition(a, b):
    distance = edit_distance(a.lower(), b.lower()) / max(len(a), len(b), 1)
    assert anls(a, b) == pytest.approx(1 - distance if distance < 0.5 else 0)


def test_anls_ignores_case_and_surrounding_space_and_exact_match_keeps_case():
    assert anls(" TOTAL\n", "total") == 1
    assert exact_match("Total\n", "Total")
    assert not exact_match("total", "Total")


def test_half_right_is_not_right():
    assert anls("ab", "ax") == 0  # a distance of 0.5 is not below it
    assert anls("abc", "abx") == pytest.approx(2 / 3)


def test_iou_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(64, 2, 2, generator=generator).sort(dim=1).values.reshape(64, 4)
    wanted = box_iou(corners.double(), corners.double())
    for i, j in itertools.product(range(64), repeat=2):
        assert iou(corners[i].tolist(), corners[j].tolist()) == pytest.approx(wanted[i, j].item(), abs=1e-9)


@pytest.mark.parametrize("box", [(0.5, 0.5, 0.5, 0.9), (0.9, 0.1, 0.1, 0.9), (0, 0, 0, 0)])
def test_a_box_without_area_meets_nothing(box):
    assert iou(box, (0.0, 0.0, 1.0, 1.0)) == 0
