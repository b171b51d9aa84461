"""The command line: what it prints, and that every mistake is one clear line and exit code 2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import runtime
import runtime.image.decode
from tests.support.commands import ROOT, assert_one_line_error, run_module


def infer(bundle, *arguments, **options):
    return run_module("runtime.infer", "--bundle", bundle, *arguments, **options)


def answer(bundle, *arguments) -> dict:
    done = infer(bundle, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_answer_is_streamed_and_a_table_follows(conformance_bundle, picture):
    done = infer(conformance_bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    for row in ("visual tokens", "preprocess", "encode", "prefill", "time to first token", "decode", "peak memory"):
        assert row in done.stdout


def test_runs_as_a_file_from_any_folder(conformance_bundle, picture, tmp_path):
    command = [sys.executable, ROOT / "runtime" / "infer.py", "--bundle", conformance_bundle, "--image", picture]
    done = subprocess.run(
        [*command, "--prompt", "What?", "--max-new-tokens", "3", "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3


def test_json_has_every_key(conformance_bundle, picture):
    found = answer(conformance_bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 4)
    assert found.keys() == {
        "text", "token_ids", "finish_reason", "visual_tokens", "prompt_tokens", "timings", "peak_memory_mib",
        "encoder", "decoder",
    }  # fmt: skip
    assert found["timings"].keys() == {
        "load_ms", "preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_s",
    }  # fmt: skip
    timings = found["timings"]
    assert timings["ttft_ms"] >= timings["preprocess_ms"] + timings["encode_ms"] + timings["prefill_ms"]
    assert found["peak_memory_mib"] > 10


def test_one_token_has_no_decode_rate(conformance_bundle, picture):
    found = answer(conformance_bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 1)
    assert found["timings"]["decode_tokens_per_s"] is None


def test_seed_gives_the_same_draw(conformance_bundle, picture):
    options = ["--image", picture, "--prompt", "What?", "--max-new-tokens", 20, "--temperature", 1.5, "--top-k", 50]
    first, again, other = (answer(conformance_bundle, *options, "--seed", seed)["token_ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_any_aspect_costs_fewer_tokens_for_an_oblong_image(conformance_bundle, tmp_path):
    Image.new("RGB", (1200, 300), (9, 99, 9)).save(tmp_path / "wide.png")
    options = ["--image", tmp_path / "wide.png", "--prompt", "What?", "--max-new-tokens", 2]
    found = answer(conformance_bundle, *options, "--aspect", "any", "--dump", tmp_path)
    _, height, width = np.load(tmp_path / "pixel_values.npy").shape
    assert height % 64 == width % 64 == 0
    assert width > 2 * height
    assert found["visual_tokens"] == height // 64 * width // 64 <= 16


def test_resolution_is_a_choice(conformance_bundle, picture):
    found = answer(conformance_bundle, "--image", picture, "--prompt", "What?", "--res", 512, "--max-new-tokens", 1)
    assert found["visual_tokens"] == 64


def test_chat_on_the_terminal_takes_questions_until_the_end(conformance_bundle, picture):
    done = infer(conformance_bundle, "--image", picture, "--max-new-tokens", 3, input="What?\nAnd then?\n")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("new positions") == 2


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--image", "nowhere.png"], ["nowhere.png"]),
        (["--image", ROOT / "README.md"], ["README.md"]),
        (["--image", ROOT / "tests"], ["tests"]),
        (["--res", 1000], ["1000", "64", "960", "1024"]),
        (["--res", 0], ["0"]),
        (["--aspect", "stretch"], ["stretch", "pad", "any"]),
        (["--temperature", -1], ["temperature", "-1"]),
        (["--top-p", 0], ["top_p"]),
        (["--top-k", -3], ["top_k"]),
        (["--repetition-penalty", 0], ["repetition_penalty"]),
        (["--max-new-tokens", 0], ["max_new_tokens"]),
        (["--threads", 0], ["threads"]),
        (["--stop", ""], ["stop"]),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(conformance_bundle, picture, arguments, mentions):
    image = [] if "--image" in arguments else ["--image", picture]
    assert_one_line_error(infer(conformance_bundle, *image, "--prompt", "What?", *arguments, "--json"), *mentions)


def test_truncated_image_is_one_line(conformance_bundle, picture):
    picture.write_bytes(picture.read_bytes()[:-40])
    assert_one_line_error(infer(conformance_bundle, "--image", picture, "--prompt", "What?"), "picture.png")


def test_decompression_bomb_is_one_line(conformance_bundle, tmp_path):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (40_000, 40_000)).save(bomb)
    assert bomb.stat().st_size < 1_000_000
    assert_one_line_error(infer(conformance_bundle, "--image", bomb, "--prompt", "What?"), "bomb.png", "pixels")


def test_prompt_longer_than_the_context_is_one_line(conformance_bundle, picture):
    done = infer(conformance_bundle, "--image", picture, "--prompt", "What? " * 3000)
    assert_one_line_error(done, "context", "4096")


def test_placeholders_must_match_the_images(conformance_bundle, picture):
    done = infer(conformance_bundle, "--image", picture, "--prompt", "<image> against <image>?")
    assert_one_line_error(done, "2", "1")


def test_json_without_a_prompt_is_one_line(conformance_bundle, picture):
    assert_one_line_error(infer(conformance_bundle, "--image", picture, "--json"), "--prompt")


def test_no_such_bundle_names_the_command_that_makes_one(tmp_path):
    assert_one_line_error(infer(tmp_path / "none", "--prompt", "What?"), "none", "export.bundle")


def test_altered_file_is_one_line(conformance_bundle, tmp_path):
    bundle = shutil.copytree(conformance_bundle, tmp_path / "bundle")
    with (bundle / "decoder" / "model.onnx").open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\0\1\2")
    assert_one_line_error(infer(bundle, "--prompt", "What?"), "model.onnx", "sha256")


def test_runtime_loads_neither_torch_nor_transformers(conformance_bundle, picture):
    script = (
        "import sys, runtime\n"
        f"model = runtime.load({str(conformance_bundle)!r})\n"
        f"list(model.generate([{str(picture)!r}], 'What?', runtime.Options(2)))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}"
        " & {'torch', 'transformers', 'timm', 'onnx', 'train', 'export'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_missing_onnxruntime_is_one_line(conformance_bundle):
    script = (
        "import runpy, sys\n"
        "sys.modules['onnxruntime'] = None\n"  # as Python marks a module that must not be found
        f"sys.argv = ['infer.py', '--bundle', {str(conformance_bundle)!r}, '--prompt', 'What?']\n"
        "runpy.run_module('runtime.infer', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert_one_line_error(done, "onnxruntime", "[cpu]", "[gpu]")


def test_every_image_option_counts(conformance_bundle, picture):
    found = answer(conformance_bundle, "--image", picture, "--image", picture, "--prompt", "?", "--max-new-tokens", 1)
    assert found["visual_tokens"] == 32


@pytest.mark.parametrize("bad", ["what is <image>?", "caf\udce9?"])
def test_a_bad_question_does_not_end_the_chat(conformance_bundle, picture, monkeypatch, bad):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")
    options = {"input": f"What?\n{bad}\nAnd then?\n", "errors": "surrogateescape"}
    done = infer(conformance_bundle, "--image", picture, "--max-new-tokens", 3, **options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("new positions") == 2
    assert done.stderr.count("error:") == 1


def test_no_box_in_the_answer_is_said_and_nothing_is_drawn(conformance_bundle, picture, tmp_path):
    done = infer(conformance_bundle, "--image", picture, "--prompt", "Hi", "--draw", tmp_path / "box.png")
    assert done.returncode == 0, done.stderr
    assert "no box in the answer" in done.stderr
    assert not (tmp_path / "box.png").exists()


def test_the_box_of_an_answer_is_drawn_on_the_upright_image(picture, tmp_path, capsys):
    from runtime.infer import _draw
    from runtime.text.boxes import COLOUR

    tags = Image.Exif()
    tags[0x0112] = 6  # the camera lay on its side
    with Image.open(picture) as image:
        image.save(tmp_path / "turned.png", exif=tags)
        width, height = image.height, image.width
    _draw(tmp_path / "box.png", str(tmp_path / "turned.png"), "It is here: [0.25,0.5,0.75,1.0]")
    assert "box drawn" in capsys.readouterr().err
    drawn = np.asarray(Image.open(tmp_path / "box.png"))
    assert drawn.shape == (height, width, 3)
    assert tuple(drawn[round(0.75 * height), round(0.25 * width)]) == COLOUR


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (("--prompt", "Hi", "--draw", "x.txt"), "neither .png"),
        (("--prompt", "Hi", "--draw", "x.png"), "--image"),
        (("--prompt", "Hi", "--image", "x.png", "--draw", "no/such/box.png"), "no folder no/such"),
    ],
)
def test_a_drawing_that_cannot_be_made_is_one_line(conformance_bundle, arguments, mentions):
    assert_one_line_error(infer(conformance_bundle, *arguments), mentions)


def test_a_dump_replaces_its_own_files_alone(tmp_path):
    from runtime.infer import _dump

    old = [tmp_path / name for name in ("pixel_values.npy", "pixel_values-1.npy", "image_embeds.npy")]
    other = tmp_path / "pixel_values_reference.npy"
    for file in (*old, other):
        file.touch()
    trace = runtime.Trace([np.zeros((3, 2, 2), np.float32)] * 2, None, np.zeros(4, np.float32))
    _dump(tmp_path, trace)
    found = {file.name for file in tmp_path.iterdir()}
    assert found == {"pixel_values-0.npy", "pixel_values-1.npy", "first_logits.npy", other.name}


def test_memory_is_told_where_the_kernel_does_not_say_it(monkeypatch):
    from runtime import infer as module

    told = module.peak_memory_mib()
    monkeypatch.setattr(Path, "read_text", lambda *_: "VmRSS: 5 kB")
    without = module.peak_memory_mib()
    assert without >= 0.5 * told > 10


def test_dump_folder_that_is_a_file_is_one_line(conformance_bundle, picture):
    assert_one_line_error(infer(conformance_bundle, "--prompt", "What?", "--dump", picture), "picture.png")


def test_a_terminal_without_unicode_gets_an_answer(conformance_bundle, reference, conformance, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    case = reference["cases"][0]
    options = ["--image", conformance / case["image"], "--prompt", case["prompt"], "--max-new-tokens", 24]
    assert answer(conformance_bundle, *options)["text"] == case["generated_text"]
    assert infer(conformance_bundle, *options).returncode == 0


def test_an_answer_follows_a_schema(conformance_bundle, tmp_path, picture):
    """On the command line, of a model that knows nothing of JSON."""
    schema = tmp_path / "schema.json"
    properties = {"date": {"type": "string", "maxLength": 4}, "paid": {"type": "boolean"}}
    schema.write_text(json.dumps({"type": "object", "properties": properties, "required": ["date", "paid"]}))
    image = tmp_path / "page.png"
    runtime.image.decode.open_image(picture).save(image)
    command = [sys.executable, "runtime/infer.py", "--bundle", str(conformance_bundle), "--image", str(image), "--json"]
    command += ["--prompt", "What?", "--max-new-tokens", "300", "--json-schema"]
    done = subprocess.run([*command, str(schema)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(json.loads(done.stdout)["text"])
    assert found.keys() >= {"date", "paid"}
    assert isinstance(found["paid"], bool)
    schema.write_text("[]")
    done = subprocess.run([*command, str(schema)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "a schema is a JSON object" in done.stderr
