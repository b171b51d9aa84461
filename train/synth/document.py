"""What a layout draws: a page, and questions whose answers are known because the page was drawn from them."""

from dataclasses import dataclass, field

from train.synth.page import Box, Page

KINDS = ("field", "label", "total", "date", "count", "compare", "caption", "transcribe", "ground")


@dataclass(frozen=True)
class Question:
    """kind: one of `KINDS`. box: where the answer stands, pixels; the answer itself where `kind` is `ground`."""

    kind: str
    prompt: str
    answer: str
    box: Box | None = None


@dataclass
class Document:
    """template: name of the layout and its variant, `receipt/centred`."""

    page: Page
    template: str
    questions: list[Question] = field(default_factory=list)
