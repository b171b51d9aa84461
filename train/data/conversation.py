"""LLaVA's conversations for training: how a record's turns are written, and which tokens are learnt.

Templates are the runtime's (`runtime.text.template`), so that a model is asked as it was trained.
"""

from typing import Any, NamedTuple

from runtime.text.template import (
    IMAGE_LINE,
    IMAGE_PLACEHOLDER,
    PLAIN,
    PromptTemplate,
    system_text,
    turn_text,
    with_answer,
)
from train.data import llava_json
from train.data.llava_json import MalformedError, Turn, images_of
from train.data.tokenizer import Tokenizer
from train.model import IGNORE_INDEX, IMAGE_TOKEN_INDEX


class Encoded(NamedTuple):
    """ids: tokens, IMAGE_TOKEN_INDEX where an image goes. labels: the same, IGNORE_INDEX where not learnt."""

    ids: list[int]
    labels: list[int]


def turns_of(record: dict[str, Any]) -> list[Turn]:
    """A record's questions and answers, alternating. Raises MalformedError.

    As in the reference implementation, a question's only placeholder goes in front of it, on a line of its own. Several
    in one question stay where they are.
    """
    turns = [Turn(_place_image(question), answer) for question, answer in llava_json.turns_of(record)]
    for turn in turns:
        if not turn.answer.strip():
            raise MalformedError("an empty answer")
        if IMAGE_PLACEHOLDER in turn.answer:
            raise MalformedError(f"{IMAGE_PLACEHOLDER} in an answer; images belong to questions")
    placeholders, images = sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in turns), len(images_of(record))
    if placeholders != images:
        raise MalformedError(f"{placeholders} {IMAGE_PLACEHOLDER} placeholder(s) for {images} image(s)")
    return turns


def encode_conversation(
    turns: list[Turn], template: PromptTemplate, tokenizer: Tokenizer, system: str | None
) -> Encoded:
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
    if question.count(IMAGE_PLACEHOLDER) != 1:
        return question
    return f"{IMAGE_LINE}{question.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def _write(turns: list[Turn], template: PromptTemplate, system: str | None) -> list[_Text]:
    end = template.stop[0]  # learnt with the answer
    if template == PLAIN:  # captions: of the question only the image counts, and the caption follows it at once
        if len(turns) != 1 or IMAGE_PLACEHOLDER not in turns[0].question:
            raise MalformedError("the template is for captions; expected one question with an image, and one answer")
        images = IMAGE_PLACEHOLDER * turns[0].question.count(IMAGE_PLACEHOLDER)
        return [_Text(images, False), _Text(turns[0].answer + end, True)]
    texts = [_Text(system_text(template, system), False)]
    for question, answer in turns:
        prompt = turn_text(template, question)
        texts.append(_Text(prompt, False))
        texts.append(_Text(with_answer(prompt, answer)[len(prompt) :] + end, True))
        texts.append(_Text(template.answer_end.removeprefix(end), False))
    return texts


def _chunks(texts: list[_Text]) -> list[list[_Text]]:
    """What lies between images."""
    chunks: list[list[_Text]] = [[]]
    for text, learnt in texts:
        first, *others = text.split(IMAGE_PLACEHOLDER)
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
