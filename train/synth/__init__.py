"""Documents drawn by code, with questions and answers that are exact because the page was drawn from them.

`render(index, split, seed, options)` draws one page; `python -m train.synth` writes many to a folder.
"""

from train.synth.document import KINDS, Document, Question
from train.synth.generate import PRESETS, PageOptions, SizeRange, render
from train.synth.page import Box, Page
from train.synth.split import SPLITS

__all__ = ["KINDS", "PRESETS", "SPLITS", "Box", "Document", "Page", "PageOptions", "Question", "SizeRange", "render"]
