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
from runtime import infer as command
from runtime.bundle.manifest import open_bundle
from runtime.text.boxes import COLOUR
from tests.support.commands import ROOT, assert_one_line_error, run_main
from tests.support.fake_bundle import put_engine


def infer(bundle, *arguments, **options):
    return run_main("runtime.infer", "--bundle", bundle, *arguments, **options)


def answer(bundle, *arguments) -> dict:
    done = infer(bundle, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def python(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)


def test_runs_as_a_file_from_any_folder(conformance_bundle, picture, tmp_path):
    options = ["--bundle", conformance_bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 3, "--json"]
    done = python(ROOT / "runtime" / "infer.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3
    assert_one_line_error(python(ROOT / "runtime" / "infer.py", *options, "--res", 1000), "960", "1024")


def test_runtime_loads_neither_torch_nor_transformers(conformance_bundle, picture):
    script = (
        "import sys, runtime\n"
        f"model = runtime.load({str(conformance_bundle)!r})\n"
        f"list(model.generate([{str(picture)!r}], 'What?', runtime.Options(2)))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}"
        " & {'torch', 'transformers', 'timm', 'onnx', 'train', 'export'}))"
    )
    done = python("-c", script, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_missing_onnxruntime_is_one_line(conformance_bundle):
    script = (
        "import runpy, sys\n"
        "sys.modules['onnxruntime'] = None\n"  # as Python marks a module that must not be found
        f"sys.argv = ['infer.py', '--bundle', {str(conformance_bundle)!r}, '--prompt', 'What?']\n"
        "runpy.run_module('runtime.infer', run_name='__main__')"
    )
    assert_one_line_error(python("-c", script, cwd=ROOT), "onnxruntime", "[cpu]", "[gpu]")


def test_answer_is_streamed_and_a_table_follows(conformance_bundle, picture):
    done = infer(conformance_bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    for row in ("visual tokens", "preprocess", "encode", "prefill", "time to first token", "decode", "peak memory"):
        assert row in done.stdout


def test_json_has_every_key(conformance_bundle, picture):
    found = answer(conformance_bundle, "--image", picture, "--prompt", "What?", "--max-new-tokens", 4)
    assert found.keys() == {
        "text", "token_ids", "finish_reason", "visual_tokens", "prompt_tokens", "timings", "peak_memory_mib",
        "encoder", "decoder",
    }  # fmt: skip
    timings = found["timings"]
    assert timings.keys() == {
        "load_ms", "preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_tokens_per_s",
    }  # fmt: skip
    assert timings["ttft_ms"] >= timings["preprocess_ms"] + timings["encode_ms"] + timings["prefill_ms"]
    assert found["peak_memory_mib"] > 10


def test_seed_gives_the_same_draw(conformance_bundle, picture):
    options = ["--image", picture, "--prompt", "What?", "--max-new-tokens", 20, "--temperature", 1.5, "--top-k", 50]
    first, again, other = (answer(conformance_bundle, *options, "--seed", seed)["token_ids"] for seed in (1, 1, 2))
    assert first == again != other


def test_any_aspect_costs_fewer_tokens_for_an_oblong_image(conformance_bundle, tmp_path):
    Image.new("RGB", (1200, 300), (9, 99, 9)).save(tmp_path / "wide.png")
    options = ["--image", tmp_path / "wide.png", "--prompt", "What?", "--max-new-tokens", 1]
    found = answer(conformance_bundle, *options, "--aspect", "any", "--dump", tmp_path)
    _, height, width = np.load(tmp_path / "pixel_values.npy").shape
    assert height % 64 == width % 64 == 0
    assert width > 2 * height
    assert found["visual_tokens"] == height // 64 * width // 64 <= 16
    assert found["timings"]["decode_tokens_per_s"] is None, "one token has no rate"


def test_every_image_option_counts_at_the_resolution_asked_for(conformance_bundle, picture):
    options = ["--image", picture, "--image", picture, "--prompt", "?", "--res", 512, "--max-new-tokens", 1]
    assert answer(conformance_bundle, *options)["visual_tokens"] == 2 * 64


def test_an_answer_follows_a_schema(conformance_bundle, tmp_path, picture):
    """Of a model that knows nothing of JSON."""
    schema = tmp_path / "schema.json"
    properties = {"date": {"type": "string", "maxLength": 4}, "paid": {"type": "boolean"}}
    schema.write_text(json.dumps({"type": "object", "properties": properties, "required": ["date", "paid"]}))
    options = ["--image", picture, "--prompt", "What?", "--max-new-tokens", 300, "--json-schema", schema]
    found = json.loads(answer(conformance_bundle, *options)["text"])
    assert found.keys() >= {"date", "paid"}
    assert isinstance(found["paid"], bool)
    schema.write_text("[]")
    assert_one_line_error(infer(conformance_bundle, *options), "a schema is a JSON object")


@pytest.mark.parametrize("file", ["decoder/model.onnx", "decoder/model.onnx.data", "tokenizer/tokenizer.json"])
def test_a_model_of_altered_files_is_refused_as_such(conformance_bundle, tmp_path, file):
    """Its parts are opened while hashes are taken, and fail in their own words."""
    bundle = shutil.copytree(conformance_bundle, tmp_path / "bundle")
    content = (bundle / file).read_bytes()
    (bundle / file).write_bytes(b"\0" * 64 + content[64:])
    assert_one_line_error(infer(bundle, "--prompt", "What?"), file, "altered", "sha256")


def test_a_bad_engine_is_refused_before_tensorrt_is_asked(conformance_bundle, tmp_path):
    """There is no GPU here, and the file is no engine: whoever asked TensorRT would hear of that."""
    bundle = open_bundle(shutil.copytree(conformance_bundle, tmp_path / "bundle"))
    file = put_engine(bundle)
    arguments = ("--prompt", "What?", "--encoder", "tensorrt")
    assert_one_line_error(infer(bundle.folder, *arguments), "need an NVIDIA GPU", "rtx-sm89-fp16.engine")
    file.write_bytes(b"an")
    assert_one_line_error(infer(bundle.folder, *arguments), "truncated", file)


@pytest.mark.parametrize("bad", ["what is <image>?", "caf\udce9?"])
def test_a_bad_question_does_not_end_the_chat(conformance_bundle, picture, bad):
    questions = f"What?\n{bad}\nAnd then?\n"
    done = infer(conformance_bundle, "--image", picture, "--max-new-tokens", 3, stdin=questions)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("new positions") == 2
    assert done.stderr.count("error:") == 1


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--image", "nowhere.png"], ["nowhere.png"]),
        (["--image", ROOT / "README.md"], ["README.md"]),
        (["--image", ROOT / "tests"], ["tests"]),
        (["--res", 0], ["0"]),
        (["--aspect", "stretch"], ["stretch", "pad", "any"]),
        (["--temperature", -1], ["temperature", "-1"]),
        (["--top-p", 0], ["top_p"]),
        (["--top-k", -3], ["top_k"]),
        (["--repetition-penalty", 0], ["repetition_penalty"]),
        (["--max-new-tokens", 0], ["max_new_tokens"]),
        (["--threads", 0], ["threads"]),
        (["--stop", ""], ["stop"]),
        (["--prompt", "What? " * 3000], ["context", "4096"]),
        (["--prompt", "<image> against <image>?"], ["2", "1"]),
        (["--draw", "x.txt"], ["neither .png"]),
        (["--draw", "no/such/box.png"], ["no folder no/such"]),
        (["--dump", ROOT / "README.md"], ["README.md"]),
    ],
)
def test_bad_options_are_one_line(conformance_bundle, picture, arguments, mentions):
    image = [] if "--image" in arguments else ["--image", picture]
    assert_one_line_error(infer(conformance_bundle, *image, "--prompt", "What?", *arguments, "--json"), *mentions)


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [(["--image", "x.png", "--json"], "--prompt"), (["--prompt", "Hi", "--draw", "x.png"], "--image")],
)
def test_options_that_need_another_are_one_line(conformance_bundle, arguments, mentions):
    assert_one_line_error(infer(conformance_bundle, *arguments), mentions)


def test_bad_files_are_one_line(conformance_bundle, picture, tmp_path):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (40_000, 40_000)).save(bomb)
    assert bomb.stat().st_size < 1_000_000
    assert_one_line_error(infer(conformance_bundle, "--image", bomb, "--prompt", "What?"), "bomb.png", "pixels")
    picture.write_bytes(picture.read_bytes()[:-40])
    assert_one_line_error(infer(conformance_bundle, "--image", picture, "--prompt", "What?"), "picture.png")
    assert_one_line_error(infer(tmp_path / "none", "--prompt", "What?"), "none", "export.bundle")


def test_a_terminal_without_unicode_gets_an_answer(conformance_bundle, reference, conformance, monkeypatch):
    case = reference["cases"][0]
    assert not case["generated_text"].isascii()
    options = ["--image", conformance / case["image"], "--prompt", case["prompt"], "--max-new-tokens", 24]
    assert answer(conformance_bundle, *options)["text"] == case["generated_text"]
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = python("-m", "runtime.infer", "--bundle", conformance_bundle, *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert case["generated_text"].encode("ascii", "replace").decode() in done.stdout


def test_no_box_in_the_answer_is_said_and_nothing_is_drawn(conformance_bundle, picture, tmp_path):
    done = infer(conformance_bundle, "--image", picture, "--prompt", "Hi", "--draw", tmp_path / "box.png")
    assert done.returncode == 0, done.stderr
    assert "no box in the answer" in done.stderr
    assert not (tmp_path / "box.png").exists()


def test_the_box_of_an_answer_is_drawn_on_the_upright_image(picture, tmp_path, capsys):
    tags = Image.Exif()
    tags[0x0112] = 6  # the camera lay on its side
    with Image.open(picture) as image:
        image.save(tmp_path / "turned.png", exif=tags)
        width, height = image.height, image.width
    command._draw(tmp_path / "box.png", str(tmp_path / "turned.png"), "It is here: [0.25,0.5,0.75,1.0]")
    assert "box drawn" in capsys.readouterr().err
    drawn = np.asarray(Image.open(tmp_path / "box.png"))
    assert drawn.shape == (height, width, 3)
    assert tuple(drawn[round(0.75 * height), round(0.25 * width)]) == COLOUR


def test_a_dump_replaces_its_own_files_alone(tmp_path):
    old = [tmp_path / name for name in ("pixel_values.npy", "pixel_values-1.npy", "image_embeds.npy")]
    other = tmp_path / "pixel_values_reference.npy"
    for file in (*old, other):
        file.touch()
    trace = runtime.Trace([np.zeros((3, 2, 2), np.float32)] * 2, None, np.zeros(4, np.float32))
    command._dump(tmp_path, trace)
    found = {file.name for file in tmp_path.iterdir()}
    assert found == {"pixel_values-0.npy", "pixel_values-1.npy", "first_logits.npy", other.name}


def test_memory_is_told_where_the_kernel_does_not_say_it(monkeypatch):
    told = command.peak_memory_mib()
    monkeypatch.setattr(Path, "read_text", lambda *_: "VmRSS: 5 kB")
    assert command.peak_memory_mib() >= 0.5 * told > 10
