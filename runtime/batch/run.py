"""`infer.py --batch`: from a file of questions to a file of answers."""

import sys
from contextlib import closing
from os import PathLike
from pathlib import Path

from runtime.backends.select import Backends, plan_batch
from runtime.batch.answers import AnswerFile
from runtime.batch.engine import answers
from runtime.batch.progress import Progress
from runtime.batch.questions import check_questions, read_questions
from runtime.bundle.manifest import read_bundle
from runtime.errors import UserError
from runtime.image.preprocess import target_size
from runtime.model import Model, load
from runtime.types import Options


def answer_batch(
    questions: Path, out: Path, bundle: str | PathLike[str], options: Options, backends: Backends, slots: int | None
) -> int:
    """Answer all questions that `out` has no line for. Where this is ended early, calling it once more goes on.

    Args:
        questions: JSONL, see `read_questions`.
        out: JSONL, appended to.
        bundle: the folder.
        options: of all questions; one may change some of them.
        backends: what runs the bundle.
        slots: sequences that are decoded together; None: 8, or as many as fit the memory.

    Returns:
        The exit code: 1 where a line of `out` is an error, of this run or an earlier one, else 0.

    Raises:
        UserError: a file is not what it should be, or the bundle cannot be had as wanted.
    """
    ids = check_questions(questions)
    with AnswerFile(out) as file:
        total, done = len(ids), len(ids & file.ids)
        del ids  # of a million questions
        loaded = _loaded(bundle, options, backends, slots) if done < total else None
        progress = Progress(total, done)
        try:
            if loaded is not None:
                _answer_rest(*loaded, questions, options, file, progress)
        finally:
            progress.close()
            print(_summary(out, file, progress), file=sys.stderr)
        return int(file.failed > 0)


def _loaded(path: str | PathLike[str], options: Options, backends: Backends, slots: int | None) -> tuple[Model, int]:
    """The model and how many sequences it decodes together. Raises UserError for what would fail every question."""
    if slots is not None and slots < 1:
        raise UserError(f"--max-batch is {slots}, expected 1 or more")
    bundle = read_bundle(path)
    target_size(1, 1, bundle.image, options.resolution, options.aspect)
    backends, plan = plan_batch(bundle, backends, slots, resolution=options.resolution or 0)
    model = load(path, backends=backends, cache_bytes=plan.cache_bytes)
    if options.json_schema is not None:
        model.grammars.of_schema(options.json_schema)
    print(f"{model.bundle.name}: {model.encoder_backend}; {model.decoder_backend}; {plan}", file=sys.stderr)
    for backend in (model.encoder_backend, model.decoder_backend):
        if backend.reason:
            print(f"note: {backend.reason}", file=sys.stderr)
    return model, plan.slots


def _answer_rest(
    model: Model, slots: int, questions: Path, options: Options, file: AnswerFile, progress: Progress
) -> None:
    rest = (question for question in read_questions(questions) if question.id not in file.ids)
    with closing(answers(model, rest, options, slots)) as finished:
        for question, values in finished:
            file.write(question.id, values)
            progress.update("error" in values)


def _summary(out: Path, file: AnswerFile, progress: Progress) -> str:
    again = "; remove their lines to ask them again" if file.failed else ""
    rest = "; the same command goes on with the others" if progress.done < progress.total else ""
    return f"{out}: {progress.done} of {progress.total} questions, {file.failed} failed{again}{rest}"
