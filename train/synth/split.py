"""Which pages belong to which split: by random stream, by typeface and by template."""

from dataclasses import dataclass

import numpy as np

from train.synth import fonts
from train.synth.fonts import Face
from train.synth.layouts import FAMILIES, Template


@dataclass(frozen=True)
class Split:
    """stream: the first word of every page's seed. unseen_fonts, unseen_layouts: what `train` never shows."""

    stream: int
    unseen_fonts: bool = False
    unseen_layouts: bool = False

    @property
    def faces(self) -> tuple[Face, ...]:
        return fonts.faces("unseen" if self.unseen_fonts else "seen")

    def templates(self, family: str) -> tuple[Template, ...]:
        return tuple(template for template in FAMILIES[family] if template.unseen == self.unseen_layouts)

    def rng(self, seed: int, index: int) -> np.random.Generator:
        """The stream of page `index`: the same wherever and in whatever order pages are drawn."""
        return np.random.default_rng([self.stream, seed, index])


SPLITS = {
    "train": Split(0),
    "validation": Split(1),
    "test": Split(2),
    "unseen_fonts": Split(3, unseen_fonts=True),
    "unseen_layouts": Split(4, unseen_layouts=True),
    "unseen": Split(5, unseen_fonts=True, unseen_layouts=True),
}


def named(split: str) -> Split:
    """Raises ValueError for an unknown name."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
    return SPLITS[split]
