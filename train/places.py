"""Where a visual token's text stands, said by the token itself in directions of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from train.errors import RecipeError
from train.synth.page import Box
from train.synth.questions import fractions

SIDES, STEPS, DIGITS = 4, 100, 2  # left, top, right, bottom; each in hundredths of the page, which have two digits
NOWHERE = -1
SPREAD = 0.1  # variance of what a token says in one of the directions, around what it should


def hundredths(box: Box | None, width: int, height: int) -> list[int]:
    """A box's sides in hundredths of a page of width x height pixels, from 0 to 99; NOWHERE for no box."""
    if box is None:
        return [NOWHERE] * SIDES
    return [min(STEPS - 1, round(STEPS * side)) for side in fractions(box, width, height)]


class PlaceCode:
    """A box as a vector beside that of a text: for each of the two digits of each side one of ten directions.

    The directions are orthonormal and drawn from a fixed seed, so that what texts are in them is noise. A language
    model needs no more than a linear map to write a digit down.
    """

    def __init__(self, width: int, device: torch.device):
        """width: of embeddings. Raises RecipeError where they have less than the 80 dimensions that it takes."""
        directions = SIDES * DIGITS * 10
        if width < directions:
            raise RecipeError(f"local.places: embeddings of {width} dimensions, but a place takes {directions}")
        random = torch.randn(width, directions, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        q, r = torch.linalg.qr(random)
        self._axes = (q * r.diagonal().sign()).T.float().to(device)  # [80, D]; signs are not the same everywhere

    def encode(self, sides: Tensor) -> Tensor:
        """sides: [N, 4] int64, hundredths. Returns [N, D]."""
        return F.one_hot(_digits(sides), 10).flatten(1).float() @ self._axes

    def loss(self, found: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the digits of `sides` [N, 4] as `found` [N, D] says them, summed, and which of the boxes
        that are read from it have an IoU of 0.5 or more with the true ones, bool [N]."""
        with torch.autocast(found.device.type, enabled=False):
            logits = (found @ self._axes.T).unflatten(1, (-1, 10)) / SPREAD
        loss = F.cross_entropy(logits.flatten(0, 1), _digits(sides).flatten(), reduction="sum")
        read = logits.argmax(2).unflatten(1, (SIDES, DIGITS))
        return loss, _overlap(10 * read[..., 0] + read[..., 1], sides) >= 0.5


def _digits(sides: Tensor) -> Tensor:
    """[N, 4] hundredths -> [N, 8]: tens and ones of each."""
    return torch.stack([sides // 10, sides % 10], 2).flatten(1)


def _overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union [N] of boxes [N, 4] pair by pair; 0 where a right side is left of its left one."""
    inner = torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])
    areas = [(given[:, 2:] - given[:, :2]).clamp(min=0).prod(1) for given in (boxes, others)]
    both = inner.clamp(min=0).prod(1) * (areas[0] > 0)
    return both / (areas[0] + areas[1] - both).clamp(min=1)
