"""Boxes as directions beside embeddings."""

import pytest
import torch

from calib.metrics import iou
from train.errors import RecipeError
from train.places import NOWHERE, PlaceCode, hundredths
from train.synth.page import Box

CODE = PlaceCode(96, torch.device("cpu"))


def test_sides_are_hundredths_of_the_page():
    assert hundredths(Box(10, 20, 151, 81), 200, 80) == [5, 25, 76, 99]
    assert hundredths(Box(-3, 0, 1.1, 40), 200, 80) == [0, 0, 1, 50]
    assert hundredths(None, 200, 80) == [NOWHERE] * 4


def test_each_digit_of_each_side_has_a_direction():
    tens = CODE.encode(torch.tensor([[10 * digit, 0, 0, 0] for digit in range(10)]))
    ones = CODE.encode(torch.tensor([[digit, 0, 0, 0] for digit in range(10)]))
    for codes in (tens, ones):
        products = codes.double() @ codes.double().T
        expected = torch.full((10, 10), 7.0).double().fill_diagonal_(8.0)  # one of eight digits differs
        torch.testing.assert_close(products, expected, rtol=0, atol=1e-5)


def test_a_code_reads_as_its_box():
    random = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 100, (200, 2, 2), generator=random).sort(1).values
    boxes = corners.flatten(1)[((corners[:, 1] - corners[:, 0]) > 0).all(1)]
    noisy = CODE.encode(boxes) + 0.05 * torch.randn(len(boxes), 96, generator=random)
    _, hit = CODE.loss(noisy, boxes)
    assert hit.all()


def test_a_hit_is_an_overlap_of_a_half():
    random = torch.Generator().manual_seed(1)
    boxes, others = (torch.randint(0, 100, (500, 2, 2), generator=random).sort(1).values.flatten(1) for _ in range(2))
    others[:250] = (boxes[:250] + torch.randint(-9, 10, (250, 4), generator=random)).clamp(0, 99)
    _, hit = CODE.loss(CODE.encode(others), boxes)
    wanted = [iou(other, box) >= 0.5 for other, box in zip(others.tolist(), boxes.tolist(), strict=True)]
    assert hit.tolist() == wanted
    assert 50 < sum(wanted) < 400


def test_the_loss_is_the_cross_entropy_of_the_digits():
    random = torch.Generator().manual_seed(2)
    found, boxes = torch.randn(3, 96, generator=random), torch.tensor([[1, 20, 33, 47], [0, 5, 99, 60], [7, 8, 9, 10]])
    loss, _ = CODE.loss(found, boxes)
    wanted = 0.0
    for at, sides in enumerate(boxes.tolist()):
        for side, value in enumerate(sides):
            for place, digit in enumerate(divmod(value, 10)):
                empty = [0, 0, 0, 0]
                codes = []
                for choice in range(10):
                    empty[side] = choice * (10, 1)[place]
                    codes.append(CODE.encode(torch.tensor([empty]))[0].double())
                logits = torch.stack(codes) @ found[at].double() / 0.1
                wanted -= logits.log_softmax(0)[digit].item()
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


def test_narrow_embeddings_are_refused():
    with pytest.raises(RecipeError, match="takes 80"):
        PlaceCode(64, torch.device("cpu"))
