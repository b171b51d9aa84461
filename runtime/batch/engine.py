"""Answers many questions, several decoded together, by the server's scheduler; no HTTP and no files but images."""

import queue
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.batch.questions import Question
from runtime.image.decode import open_image
from runtime.image.preprocess import digest, resized
from runtime.model import Model
from runtime.serve.images import PreparedImage
from runtime.serve.scheduler import Scheduler
from runtime.serve.types import Failed, Request, TokenEvent, failure
from runtime.text.stop import Answer
from runtime.text.template import first_turn
from runtime.types import Options

Event = TokenEvent | Failed


@dataclass(eq=False)
class _Running:
    """A question that the scheduler has. new_tokens: of its answer so far."""

    question: Question
    request: Request
    answer: Answer
    new_tokens: int = 0


def answers(
    model: Model, questions: Iterator[Question], options: Options, slots: int
) -> Generator[tuple[Question, dict[str, Any]]]:
    """Answer questions, `slots` at once, while the images of as many more are opened and encoded.

    What is wrong with one question fails that one alone.

    Args:
        model: nobody else may run it meanwhile.
        questions: taken when there is room for them.
        options: of all questions; one may change some of them.
        slots: sequences that are decoded together.

    Yields:
        Each question as it is finished, with its text, finish reason and token counts, or with its `error`.

    Raises:
        UserError: the decoder runs one sequence at a time.
        Failed: the scheduler has crashed. Questions that were not finished have no answer.
    """
    # A request that a stop string has ended keeps its slot until the next step
    scheduler = Scheduler(model.encoder, model.decoder, model.cache, slots, queue_size=2 * slots)
    events: queue.SimpleQueue[tuple[_Running, Event]] = queue.SimpleQueue()
    scheduler.start()
    try:
        count, question = 0, next(questions, None)
        while question is not None or count:
            if question is not None and count < 2 * slots and events.empty():
                try:
                    running = _prepared(model, question, options, events)
                except Exception as error:
                    yield question, {"error": str(failure(error))}
                else:
                    scheduler.submit(running.request)
                    count += 1
                question = next(questions, None)
                continue
            running, event = events.get()
            if running.answer.finish_reason is None and (finished := _pushed(running, event)) is not None:
                count -= 1
                yield running.question, finished
    finally:
        scheduler.stop(0)


def _prepared(
    model: Model, question: Question, common: Options, events: "queue.SimpleQueue[tuple[_Running, Event]]"
) -> _Running:
    options = question.options(common)
    images = [_opened(model, image, options) for image in question.images]
    text = first_turn(model.bundle.prompt, question.prompt, len(images), options.system)
    token_ids = model.tokenizer.encode_prompt(text, [image.tokens for image in images])
    generation, answer = model.begin(model.new_tokens(token_ids, options), options)

    def sink(event: Event) -> None:
        events.put((running, event))

    running = _Running(question, Request(token_ids, images, generation, sink), answer)
    return running


def _opened(model: Model, file: Path, options: Options) -> PreparedImage:
    rule = model.bundle.image
    pixels = resized(open_image(file), rule, options.resolution, options.aspect)
    key = digest(pixels)
    return PreparedImage(key, rule.tokens(*pixels.shape[:2]), rule, pixels, model.cache.get(key))


def _pushed(running: _Running, event: Event) -> dict[str, Any] | None:
    """What is written of a question that this event finishes; None where it goes on."""
    if isinstance(event, Failed):
        if event.reason == "crash":
            raise event
        return {"error": str(event)}
    answer, request = running.answer, running.request
    answer.push(event.token_id, event.finish_reason)
    running.new_tokens += 1
    if answer.finish_reason is None:
        return None
    request.end("stop")
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "visual_tokens": sum(token < 0 for token in request.token_ids),
        "prompt_tokens": len(request.token_ids),
        "new_tokens": running.new_tokens,
    }
