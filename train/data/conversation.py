"""LLaVA's conversations: a record's turns, how they are written, and which tokens are learnt.

The templates are LLaVA's `vicuna_v1` and `plain` (`preprocess_v1` and `preprocess_plain` in its training code) and
ChatML as SmolLM2's and Qwen's chat templates write it.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from train.data.tokenizer import Tokenizer
from train.model import IGNORE_INDEX, IMAGE_TOKEN_INDEX

PLACEHOLDER = "<image>"
_SURROGATE = re.compile("[\ud800-\udfff]")


class MalformedError(ValueError):
    """A record that cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Template:
    """How a conversation is written.

    system: the system text where none is asked for. system_format: what a conversation opens with.
    question_format: a question, up to where the answer is learnt from.
    answer_format: an answer with what ends it, all of it learnt. answer_end: what follows, not learnt.
    captions: a record is one question, of which only the image counts, and its answer.
    """

    system: str
    system_format: str
    question_format: str
    answer_format: str
    answer_end: str = ""
    captions: bool = False


TEMPLATES = {
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        system_format="{} ",
        question_format="USER: {} ASSISTANT:",
        answer_format=" {}</s>",
    ),
    "plain": Template(system="", system_format="{}", question_format="{}", answer_format="{}\n", captions=True),
    "chatml": Template(
        system="You are a helpful assistant.",
        system_format="<|im_start|>system\n{}<|im_end|>\n",
        question_format="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer_format="{}<|im_end|>",
        answer_end="\n",
    ),
}


class Turn(NamedTuple):
    question: str
    answer: str


class Encoded(NamedTuple):
    """ids: tokens, IMAGE_TOKEN_INDEX where an image goes. labels: the same, IGNORE_INDEX where not learnt."""

    ids: list[int]
    labels: list[int]


def images_of(record: dict[str, Any]) -> list[str]:
    """A record's image paths: none, one or several. Raises MalformedError."""
    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise MalformedError(f"'image' is {images!r}; expected a path or a list of paths")
    return images


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """A record's questions and answers, alternating. Raises MalformedError.

    As in the original, a first message that is the model's is left out, and a question's only placeholder goes in
    front of it, on a line of its own. Several in one question stay where they are.
    """
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise MalformedError("no 'conversations'; expected a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise MalformedError("a message has no text; expected keys 'from' and 'value'")
        if _SURROGATE.search(message["value"]):
            raise MalformedError("a lone surrogate, which no encoding can represent")
    if messages[0].get("from") == "gpt":
        messages = messages[1:]
    roles = [message.get("from") for message in messages]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise MalformedError(f"roles are {', '.join(map(str, roles)) or 'none'}; expected human and gpt in turn")
    values = [message["value"] for message in messages]
    turns = [Turn(_place_image(question), answer) for question, answer in zip(values[::2], values[1::2], strict=True)]
    for turn in turns:
        if not turn.answer.strip():
            raise MalformedError("an empty answer")
        if PLACEHOLDER in turn.answer:
            raise MalformedError(f"{PLACEHOLDER} in an answer; images belong to questions")
    placeholders, images = sum(turn.question.count(PLACEHOLDER) for turn in turns), len(images_of(record))
    if placeholders != images:
        raise MalformedError(f"{placeholders} {PLACEHOLDER} placeholder(s) for {images} image(s)")
    return turns


def encode_conversation(turns: list[Turn], template: Template, tokenizer: Tokenizer, system: str | None) -> Encoded:
    """Ids and labels of a whole conversation, BOS included. system: None for the template's own.

    Between two images the text is tokenised as one, as in the original's `tokenizer_image_token`.
    Raises MalformedError for what a template of captions cannot write.
    """
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORE_INDEX] * len(ids)
    for number, chunk in enumerate(_chunks(_write(turns, template, system))):
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        for part, learnt in _encode_chunk(chunk, tokenizer):
            ids += part
            labels += part if learnt else [IGNORE_INDEX] * len(part)
    return Encoded(ids, labels)


class _Text(NamedTuple):
    text: str
    learnt: bool


def _place_image(question: str) -> str:
    if question.count(PLACEHOLDER) != 1:
        return question
    return f"{PLACEHOLDER}\n{question.replace(PLACEHOLDER, '').strip()}".strip()


def _write(turns: list[Turn], template: Template, system: str | None) -> list[_Text]:
    texts = [_Text(template.system_format.format(template.system if system is None else system), False)]
    if template.captions:
        if len(turns) != 1 or PLACEHOLDER not in turns[0].question:
            raise MalformedError("the template is for captions; expected one question with an image, and one answer")
        turns = [Turn(PLACEHOLDER * turns[0].question.count(PLACEHOLDER), turns[0].answer)]
    for question, answer in turns:
        texts.append(_Text(template.question_format.format(question), False))
        texts.append(_Text(template.answer_format.format(answer), True))
        texts.append(_Text(template.answer_end, False))
    return texts


def _chunks(texts: list[_Text]) -> list[list[_Text]]:
    """What lies between images."""
    chunks: list[list[_Text]] = [[]]
    for text, learnt in texts:
        first, *others = text.split(PLACEHOLDER)
        chunks[-1].append(_Text(first, learnt))
        chunks += [[_Text(other, learnt)] for other in others]
    return chunks


def _encode_chunk(chunk: list[_Text], tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """The ids of each text of a chunk, which is tokenised as a whole.

    A token across two texts (ChatML's newline and one that an answer begins with) would show the model, while it is
    trained, a prompt other than the one it will get; there the second text is tokenised on its own.
    """
    encoded, text, ids = [], "", []
    for piece, learnt in chunk:
        text += piece
        whole = tokenizer.encode(text)
        follows = whole[: len(ids)] == ids
        part = whole[len(ids) :] if follows else tokenizer.encode(piece, opening=False)
        ids = ids + part
        encoded.append((part, learnt))
    return encoded
