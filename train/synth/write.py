"""Documents written to a folder, as LLaVA's JSON and images: for what reads files, and to look at.

The folder appears whole or not at all, and is the same to the byte however many processes have written it.
"""

import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from runtime.errors import UserError
from train.synth.document import Document
from train.synth.generate import PageOptions, render
from train.synth.questions import fractions

FORMATS = {"png": {"compress_level": 1}, "jpeg": {"quality": 90}}
CHUNK = 16  # pages that a process draws before it reports


@dataclass(frozen=True)
class Job:
    """What to write. format: a key of `FORMATS`. one_turn: a record for each question, not for each page.

    kinds: of questions that are written; empty for all. A page with less than `fewest` of them is left out.
    """

    split: str
    seed: int
    pages: int
    options: PageOptions
    format: str = "png"
    one_turn: bool = False
    kinds: tuple[str, ...] = ()
    fewest: int = 1


def write(job: Job, folder: Path, workers: int = 1) -> int:
    """Write `documents.json` and `images/` into a new folder; returns the number of records.

    Raises FileExistsError where the folder is there already, ValueError for a job that cannot be done.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: name another folder or remove it")
    if job.format not in FORMATS:
        raise ValueError(f"unknown image format {job.format!r}, expected one of {', '.join(FORMATS)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the final folder, so that the renaming stays on one file system
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (unfinished / "images").mkdir()
        records = [record for page in _pages(job, unfinished, workers) for record in page]
        if not records:
            kinds = f" of the kinds {', '.join(job.kinds)}" if job.kinds else ""
            raise UserError(f"none of {job.pages} pages has {job.fewest} or more questions{kinds}")
        text = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
        (unfinished / "documents.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp's folders are closed to others
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return len(records)


def records(document: Document, name: str, image: str, one_turn: bool) -> list[dict]:
    """The page as records of LLaVA's form: one with a turn for each question, or one for each.

    `kinds` and `boxes` go along with the turns: of what kind the question is, and where its answer stands, in
    fractions of the page's width and height.
    """
    groups = [[question] for question in document.questions] if one_turn else [document.questions]
    return [
        {
            "id": f"{name}-{number}" if one_turn else name,
            "image": image,
            "conversations": _turns(group),
            "kinds": [question.kind for question in group],
            "boxes": [_fractions(question.box, document) for question in group],
            "template": document.template,
        }
        for number, group in enumerate(groups)
    ]


def _turns(questions) -> list[dict[str, str]]:
    turns = []
    for question in questions:
        prompt = question.prompt if turns else f"<image>\n{question.prompt}"
        turns += [{"from": "human", "value": prompt}, {"from": "gpt", "value": question.answer}]
    return turns


def _fractions(box, document: Document) -> list[float] | None:
    if box is None:
        return None
    return [round(side, 4) for side in fractions(box, document.page.width, document.page.height)]


def _pages(job: Job, folder: Path, workers: int) -> Iterator[list[dict]]:
    """Every page's records, in order."""
    one = partial(_page, job, folder)
    with tqdm(total=job.pages, unit="page", desc=f"{job.split} {job.seed}") as bar:
        if workers <= 1:
            for index in range(job.pages):
                yield one(index)
                bar.update()
            return
        # Spawned, not forked: a caller may hold threads, whose locks a fork would copy as they are
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for page in pool.imap(one, range(job.pages), chunksize=CHUNK):
                yield page
                bar.update()


def _page(job: Job, folder: Path, index: int) -> list[dict]:
    """Draw page `index`, save its image, and return its records."""
    document = render(index, job.split, job.seed, job.options)
    if job.kinds:
        document = replace(document, questions=[q for q in document.questions if q.kind in job.kinds])
    if len(document.questions) < job.fewest:
        return []
    name = f"{job.split}-{job.seed}-{index:07d}"
    image = f"images/{name}.{job.format}"
    Image.fromarray(document.page.pixels).save(folder / image, **FORMATS[job.format])
    return records(document, name, image, job.one_turn)
