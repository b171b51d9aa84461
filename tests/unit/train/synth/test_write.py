"""The written folder: LLaVA's JSON and images, the same however many processes wrote it, whole or not at all."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import UserError
from train.synth import KINDS, PRESETS, render
from train.synth import write as writing
from train.synth.write import Job, write

OPTIONS = replace(PRESETS["words-256"], sizes=((192, 192),), min_px=16, max_px=24)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_processes_write_the_same_bytes(tmp_path: Path, format: str):
    job = Job("validation", 3, 20, OPTIONS, format)
    write(job, tmp_path / "one")
    write(job, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 21


def test_records_are_llavas(tmp_path: Path):
    write(Job("train", 0, 8, OPTIONS), tmp_path / "out")
    records = json.loads((tmp_path / "out" / "documents.json").read_text(encoding="utf-8"))
    assert len({record["id"] for record in records}) == len(records) == 8
    for index, record in enumerate(records):
        page = render(index, "train", 0, OPTIONS)
        pixels = np.asarray(Image.open(tmp_path / "out" / record["image"]))
        np.testing.assert_array_equal(pixels, page.page.pixels)
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(page.questions)
        assert turns[0]["value"] == f"<image>\n{page.questions[0].prompt}"
        assert not any("<image>" in turn["value"] for turn in turns[1:])
        assert [turn["value"] for turn in turns[1::2]] == [question.answer for question in page.questions]
        assert set(record["kinds"]) <= set(KINDS) and len(record["kinds"]) == len(record["boxes"]) == len(turns) // 2


def test_one_turn_gives_each_question_its_record(tmp_path: Path):
    count = write(Job("train", 0, 4, OPTIONS, one_turn=True), tmp_path / "out")
    records = json.loads((tmp_path / "out" / "documents.json").read_text(encoding="utf-8"))
    assert len(records) == count == sum(len(render(index, "train", 0, OPTIONS).questions) for index in range(4))
    assert len({record["id"] for record in records}) == count
    for record in records:
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"]
        assert record["conversations"][0]["value"].startswith("<image>\n")


def test_only_questions_of_some_kinds(tmp_path: Path):
    count = write(Job("train", 0, 6, OPTIONS, kinds=("transcribe", "total")), tmp_path / "out")
    records = json.loads((tmp_path / "out" / "documents.json").read_text(encoding="utf-8"))
    wanted = [
        [q for q in render(i, "train", 0, OPTIONS).questions if q.kind in ("transcribe", "total")] for i in range(6)
    ]
    wanted = [questions for questions in wanted if questions]
    assert len(records) == count == len(wanted) == len(list((tmp_path / "out" / "images").iterdir()))
    answers = [[turn["value"] for turn in record["conversations"][1::2]] for record in records]
    assert answers == [[question.answer for question in questions] for questions in wanted]
    with pytest.raises(UserError, match="none of 2 pages has 1 or more questions of the kinds nonsense"):
        write(Job("train", 0, 2, OPTIONS, kinds=("nonsense",)), tmp_path / "nothing")


def test_pages_with_few_questions_are_left_out(tmp_path: Path):
    options = replace(OPTIONS, questions=6)
    asked = [[q for q in render(i, "train", 0, options).questions if q.kind == "ground"] for i in range(12)]
    enough = [questions for questions in asked if len(questions) >= 2]
    assert 0 < len(enough) < 12  # else nothing would be tried here
    assert write(Job("train", 0, 12, options, kinds=("ground",), fewest=2), tmp_path / "out") == len(enough)
    records = json.loads((tmp_path / "out" / "documents.json").read_text(encoding="utf-8"))
    answers = [[turn["value"] for turn in record["conversations"][1::2]] for record in records]
    assert answers == [[question.answer for question in questions] for questions in enough]


def test_nothing_is_left_of_an_interrupted_run(tmp_path: Path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "render", fail)
    with pytest.raises(KeyboardInterrupt):
        write(Job("train", 0, 4, OPTIONS), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_never_written_over(tmp_path: Path):
    with pytest.raises(FileExistsError, match="is there already"):
        write(Job("train", 0, 1, OPTIONS), tmp_path)
    with pytest.raises(ValueError, match="unknown image format 'gif'"):
        write(Job("train", 0, 1, OPTIONS, "gif"), tmp_path / "out")


def test_the_command_writes_and_says_how_fast(tmp_path: Path):
    command = [sys.executable, "-m", "train.synth", "--out", tmp_path / "out", "--pages", "2"]
    command += ["--preset", "words-256", "--workers", "1", "--split", "test"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 records of 2 pages" in done.stdout and "pages/s" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr


def test_the_command_asks_as_many_questions_as_it_is_told(tmp_path: Path):
    command = [sys.executable, "-m", "train.synth", "--out", tmp_path / "out", "--pages", "6"]
    command += ["--preset", "words-256", "--workers", "1", "--questions", "3", "--fewest", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "out" / "documents.json").read_text(encoding="utf-8"))
    assert records and all(len(record["kinds"]) == 3 for record in records)


def test_documents_need_no_torch():
    code = "import sys, train.synth.__main__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
