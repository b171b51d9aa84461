"""`infer.py --batch` on an exported model."""

import json

import pytest
from PIL import Image

from tests.support.commands import assert_one_line_error, run_main


def infer(bundle, *arguments):
    return run_main("runtime.infer", "--bundle", bundle, *arguments)


def test_answers_are_those_of_single_runs(conformance_bundle, tmp_path):
    for number in range(3):
        Image.effect_mandelbrot((200 + 50 * number, 200), (-2, -1.5, 1, 1.5), 9 + number).convert("RGB").save(
            tmp_path / f"{number}.png"
        )
    questions = [
        {"id": "one", "image": "0.png", "prompt": "What is this?"},
        {"image": ["1.png", "2.png"], "prompt": "Compare <image> with <image>.", "max_new_tokens": 4},
        {"image": "none.png", "prompt": "What?"},
        {"image": [], "prompt": "Count."},
        {"image": str(tmp_path / "2.png"), "prompt": "And this?", "system": "Be brief."},
    ]
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    batch = ("--batch", file, "--out", out, "--max-new-tokens", 12, "--max-batch", 3)
    done = infer(conformance_bundle, *batch)
    assert done.returncode == 1, done.stderr
    assert "5 of 5 questions, 1 failed" in done.stderr and done.stdout == ""
    answers = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert answers.keys() == {"one", 2, 3, 4, 5}
    assert answers[3] == {"id": 3, "error": f"{tmp_path / 'none.png'}: No such file or directory"}
    for number, question in enumerate(questions, 1):
        if number == 3:
            continue
        images = [question["image"]] if isinstance(question["image"], str) else question["image"]
        options = ["--prompt", question["prompt"], "--max-new-tokens", question.get("max_new_tokens", 12), "--json"]
        options += ["--image", *(tmp_path / image for image in images)] if images else []
        options += ["--system", question["system"]] if "system" in question else []
        single = json.loads(infer(conformance_bundle, *options).stdout)
        keys = ("text", "finish_reason", "visual_tokens", "prompt_tokens")
        found = answers[question.get("id", number)]
        assert found == {
            "id": question.get("id", number),
            **{key: single[key] for key in keys},
            "new_tokens": len(single["token_ids"]),
        }
    before = out.read_text()
    assert infer("nowhere", *batch).returncode == 1, "nothing is left, so no bundle is opened"
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (["--batch", "{good}"], ["--out"]),
        (["--batch", "{good}", "--out", "{out}", "--prompt", "?"], ["--prompt", "--batch"]),
        (["--batch", "{good}", "--out", "{out}", "--json"], ["--json", "--batch"]),
        (["--batch", "{good}", "--out", "{out}", "--max-batch", 0], ["--max-batch is 0"]),
        (["--batch", "{good}", "--out", "{out}", "--res", 1000], ["960", "1024"]),
        (["--batch", "{good}", "--out", "{good}"], ["good.jsonl, line 1", "name another file"]),
        (["--batch", "{bad}", "--out", "{out}"], ["bad.jsonl, line 2", "'prompt' is missing"]),
        (["--batch", "{out}", "--out", "{out}"], ["no such file"]),
        (["--out", "{out}", "--prompt", "?"], ["--out needs --batch"]),
        (["--max-batch", 2, "--prompt", "?"], ["--max-batch needs --batch"]),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_computed(options, mentions, conformance_bundle, tmp_path):
    good = '{"image": [], "prompt": "What?"}\n'
    (tmp_path / "good.jsonl").write_text(good)
    (tmp_path / "bad.jsonl").write_text(good + '{"image": []}\n')
    names = {"good": tmp_path / "good.jsonl", "bad": tmp_path / "bad.jsonl", "out": tmp_path / "out.jsonl"}
    done = infer(conformance_bundle, *(str(option).format(**names) for option in options))
    assert_one_line_error(done, *mentions)
    assert not names["out"].exists() or names["out"].read_bytes() == b""
    assert names["good"].read_text() == good
