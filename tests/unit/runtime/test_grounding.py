"""Boxes read from answers and drawn."""

import numpy as np
import pytest
from PIL import Image

from runtime.text.boxes import COLOUR, draw_boxes, read_boxes


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ("[0.1,0.2,0.3,0.4]", [(0.1, 0.2, 0.3, 0.4)]),
        ("It is at [ .1, 0.2,0.3 , 1].", [(0.1, 0.2, 0.3, 1.0)]),
        ("[0,0,1,1] and [0.5,0.5,0.75,0.75]", [(0, 0, 1, 1), (0.5, 0.5, 0.75, 0.75)]),
        ("[0.1,0.2,0.3]", []),
        ("0.1,0.2,0.3,0.4", []),
        ("[0.1,-0.2,0.3,0.4]", []),
        ("", []),
    ],
)
def test_boxes_are_read_from_answers(answer, boxes):
    assert read_boxes(answer) == boxes


@pytest.mark.parametrize("box", [(0.25, 0.5, 0.75, 0.9), (0.75, 0.9, 0.25, 0.5)])
def test_the_outline_is_where_the_box_says(box):
    image = Image.new("RGB", (400, 200), "white")
    red = (np.asarray(draw_boxes(image, [box])) == COLOUR).all(-1)
    rows, columns = red.nonzero()
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (100, 300, 100, 180)
    assert not red[120:170, 120:280].any()
    assert (np.asarray(image) == 255).all()


def test_a_box_that_leaves_the_image_is_drawn_as_far_as_it_goes():
    red = (np.asarray(draw_boxes(Image.new("RGB", (100, 100)), [(0.5, 0.5, 3.0, 2.0)])) == COLOUR).all(-1)
    assert red[50, 60]
    assert red[70, 50]
    assert not red[:45].any()
