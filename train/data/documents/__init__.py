"""Documents drawn by code, with questions and answers that are exact because the page was drawn from them.

`render(index, split, seed, options)` draws one page; `python -m train.data.documents` writes many to a folder.
"""

from train.data.documents.document import KINDS, Document, Question
from train.data.documents.generate import PRESETS, PageOptions, SizeRange, render
from train.data.documents.page import Box, Page
from train.data.documents.split import SPLITS

__all__ = ["KINDS", "PRESETS", "SPLITS", "Box", "Document", "Page", "PageOptions", "Question", "SizeRange", "render"]
