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
import runtime.image_file
from tests.conftest import ROOT, run_module


@pytest.fixture
def picture(tmp_path):
    file = tmp_path / "picture.png"
    Image.new("RGB", (300, 200), (20, 120, 220)).save(file)
    return file


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


def infer(bundle, *arguments, **options):
    return run_module("runtime.infer", "--bundle", bundle, *arguments, **options)


def answer(bundle, *arguments) -> dict:
    done = infer(bundle, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_one_line_error(done, *mentions):
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for mention in mentions:
        assert str(mention) in done.stderr


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


def test_several_images_and_their_places(model, conformance, picture):
    first, second = conformance / "case0.png", conformance / "case1.png"
    ahead, placed, swapped = (runtime.Trace() for _ in range(3))
    options = runtime.Options(max_new_tokens=4)
    *_, last = model.generate([first, second], "Compare.", options, ahead)
    list(model.generate([first, second], "<image>\n<image>\nCompare.", options, placed))
    list(model.generate([second, first], "Compare.", options, swapped))
    assert last.result.visual_tokens == 32
    assert np.array_equal(ahead.first_logits, placed.first_logits)
    assert not np.allclose(ahead.first_logits, swapped.first_logits)
    assert np.array_equal(ahead.image_embeds[:16], swapped.image_embeds[16:])


def test_text_alone_needs_no_image(model):
    *_, last = model.generate([], "Hello", runtime.Options(max_new_tokens=3))
    assert last.result.visual_tokens == 0


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


def test_stop_string_ends_the_answer_and_is_left_out(model, conformance, reference):
    case = reference["cases"][0]
    options = runtime.Options(max_new_tokens=24, stop=("come",))
    *pieces, last = model.generate([conformance / case["image"]], case["prompt"], options)
    assert last.result.text == case["generated_text"].split("come")[0]
    assert last.result.finish_reason == "stop"
    assert "".join(piece.text for piece in [*pieces, last]) == last.result.text


def test_repetition_penalty_changes_a_repeating_answer(model, conformance, reference):
    case = reference["cases"][0]  # its first answer says one token twice in a row
    plain, punished = (
        list(model.generate([conformance / case["image"]], case["prompt"], runtime.Options(24, sampling)))[-1].result
        for sampling in (runtime.Sampling(), runtime.Sampling(repetition_penalty=5.0))
    )
    assert len(set(plain.token_ids)) < len(plain.token_ids)
    assert len(set(punished.token_ids)) == len(punished.token_ids)


def test_chat_keeps_the_image_and_answers_as_one_long_prompt_would(model, conformance):
    """Turn two through the cache against the same token ids prefilled at once."""
    options = runtime.Options(max_new_tokens=6)
    conversation = model.chat(options)
    *_, first = conversation.ask("What is it?", [conformance / "case0.png"])
    trace = runtime.Trace()
    *_, second = conversation.ask("And now?", trace=trace)
    assert trace.pixel_values == []
    assert second.result.visual_tokens == 0
    assert second.result.prompt_tokens < 60 < first.result.prompt_tokens

    from runtime.prompt import first_turn, next_turn

    whole = runtime.Trace()
    *_, _ = model.generate([conformance / "case0.png"], "What is it?", options, whole)
    ids = model.tokenizer.encode_prompt(first_turn(model.bundle.prompt, "What is it?", 1), [16])
    ids += first.result.token_ids
    ids += model.tokenizer.encode_prompt(next_turn(model.bundle.prompt, "And now?"), [], continued=True)
    logits = model.decoder.start(512).forward(ids, whole.image_embeds)
    assert np.abs(logits - trace.first_logits).max() < 1e-4 * np.abs(logits).max()


def test_what_a_stop_string_cut_off_is_no_part_of_the_chat(model, conformance, reference):
    """A stop string that begins in one token and ends in the next one: the second turn sees what was shown alone."""
    case = reference["cases"][0]
    *_, whole = model.generate([conformance / case["image"]], case["prompt"], runtime.Options(max_new_tokens=24))
    ids = whole.result.token_ids
    shown = [model.tokenizer.decode(ids[:count]) for count in range(len(ids))]
    last, middle = next(
        (count, before)
        for count in range(4, len(ids) - 1)
        if (before := shown[count][len(shown[count - 1]) :]) and (after := shown[count + 1][len(shown[count]) :])
    )
    after = shown[last + 1][len(shown[last]) :]
    stop = middle[-1] + after[0]
    assert shown[last + 1].find(stop) == len(shown[last]) - 1
    conversation, trace = model.chat(runtime.Options(max_new_tokens=24, stop=(stop,))), runtime.Trace()
    *_, first = conversation.ask(case["prompt"], [conformance / case["image"]])
    assert first.result.text == shown[last][:-1]
    *_, _ = conversation.ask("And now?", trace=trace)

    from runtime.prompt import first_turn, next_turn

    traced = runtime.Trace()
    *_, _ = model.generate([conformance / case["image"]], case["prompt"], runtime.Options(max_new_tokens=1), traced)
    prompt = model.tokenizer.encode_prompt(first_turn(model.bundle.prompt, case["prompt"], 1), [16])
    prompt += ids[: last - 1]
    prompt += model.tokenizer.encode_prompt(next_turn(model.bundle.prompt, "And now?"), [], continued=True)
    logits = model.decoder.start(512).forward(prompt, traced.image_embeds)
    assert np.abs(logits - trace.first_logits).max() < 1e-4 * np.abs(logits).max()


def test_an_answer_ends_where_another_question_is_asked(model, picture):
    for asking in (model.chat(runtime.Options(max_new_tokens=4)), model.about([picture], runtime.Options(4))):
        first = asking.ask("What is this?")
        next(first)
        *_, second = asking.ask("And this?")
        assert len(second.result.token_ids) == 4
        with pytest.raises(runtime.UserError, match="ended by another question"):
            next(first)
    # of questions that share a cache also by one that fails
    first = asking.ask("What is this?")
    next(first)
    with pytest.raises(runtime.UserError, match="longer than the context"):
        next(asking.ask("word " * 5000))
    with pytest.raises(runtime.UserError, match="ended by another question"):
        next(first)


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


def test_answer_stops_where_the_context_ends(model):
    prompt = "What? " * 980
    *_, last = model.generate([], prompt, runtime.Options(max_new_tokens=4096))
    assert last.result.prompt_tokens + len(last.result.token_ids) == 4096
    assert last.result.finish_reason == "length"


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


def test_an_image_beyond_the_context_is_refused_before_it_is_computed(model, picture, monkeypatch):
    monkeypatch.setattr(model, "encoder", lambda pixel_values: pytest.fail("encoded"))
    with pytest.raises(runtime.UserError, match=r"16384 of them visual.*context"):
        next(model.generate([picture], "What?", runtime.Options(resolution=8192)))


def test_conversations_have_room_for_the_context_and_one_turn_for_itself(model):
    conversation = runtime.Conversation(model, runtime.Options(4))
    answers = [list(conversation.ask("And now?"))[-1].result.token_ids for _ in range(3)]
    chat = model.chat(runtime.Options(4))
    assert answers == [list(chat.ask("And now?"))[-1].result.token_ids for _ in range(3)]
    sequence = model.decoder.start(4)
    sequence.forward([1, 2, 3])
    with pytest.raises(ValueError, match="5 positions do not fit a KV cache of 4"):
        sequence.forward([4, 5])


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(model, picture):
    def two_turns(between) -> list[int]:
        conversation = model.chat(runtime.Options(5))
        list(conversation.ask("What is it?", [picture]))
        between(conversation)
        return list(conversation.ask("And now?"))[-1].result.token_ids

    def too_long(conversation):
        with pytest.raises(runtime.UserError, match="context"):
            next(conversation.ask("What? " * 3000))

    def interrupted(conversation):
        """Once the KV cache has grown, as on a GPU, where the wait comes after that."""
        sequence = conversation._sequence
        forward = sequence.forward_greedy

        def interrupt(*arguments):
            forward(*arguments)
            raise KeyboardInterrupt

        sequence.forward_greedy = interrupt
        with pytest.raises(KeyboardInterrupt):
            next(conversation.ask("And what else?", [picture]))
        sequence.forward_greedy = forward

    assert two_turns(too_long) == two_turns(interrupted) == two_turns(lambda conversation: None)


def test_a_first_turn_that_fails_can_be_asked_again(model, picture):
    conversation = model.chat(runtime.Options(5))
    with pytest.raises(runtime.UserError):
        next(conversation.ask("What? " * 3000, [picture]))
    *_, last = conversation.ask("What?", [picture])
    *_, alone = model.generate([picture], "What?", runtime.Options(5))
    assert last.result.token_ids == alone.result.token_ids


def test_an_answer_left_early_is_part_of_the_conversation(model, picture):
    """The pieces that were taken, and no more, precede the next question."""
    left, whole = model.chat(runtime.Options(6)), model.chat(runtime.Options(3))
    pieces = left.ask("What is it?", [picture])
    taken = [next(pieces).token_id for _ in range(3)]
    pieces.close()
    *_, last = whole.ask("What is it?", [picture])
    assert last.result.token_ids == taken
    assert [piece.token_id for piece in left.ask("And?")][:3] == [piece.token_id for piece in whole.ask("And?")]


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
    from runtime.grounding import COLOUR
    from runtime.infer import _draw

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


def test_questions_about_the_same_images_are_answered_as_if_alone(model, picture):
    options = runtime.Options(max_new_tokens=6)
    prompts = ["What is this?", "What is this? Say it in one word.", "<image> before?", "What is this?"]
    questions = model.about([picture], options)
    for number, prompt in enumerate(prompts):
        trace, alone_trace = runtime.Trace(), runtime.Trace()
        *_, last = questions.ask(prompt, trace)
        *_, alone = model.generate([picture], prompt, options, alone_trace)
        assert (last.result.token_ids, last.result.text) == (alone.result.token_ids, alone.result.text)
        scale = np.abs(alone_trace.first_logits).max()
        np.testing.assert_allclose(trace.first_logits, alone_trace.first_logits, rtol=0, atol=1e-5 * scale)
        np.testing.assert_array_equal(trace.image_embeds, alone_trace.image_embeds)
        if number:  # the image is neither encoded again nor, where it comes first, prefilled again
            assert last.result.timings.encode_ms == 0
            assert last.result.prompt_tokens < alone.result.prompt_tokens - (16 if prompt[0] != "<" else 0)


def test_a_question_that_fails_does_not_harm_the_next(model, picture, monkeypatch):
    options = runtime.Options(max_new_tokens=4)
    questions = model.about(picture, options)
    *_, first = questions.ask("What is this?")
    with pytest.raises(runtime.UserError, match="longer than the context"):
        list(questions.ask("word " * 5000))
    with monkeypatch.context() as patch:
        patch.setattr(questions._sequence, "_step", (None, questions._sequence._step[1]))
        with pytest.raises(AttributeError):
            list(questions.ask("And is this what it was?"))
    *_, again = questions.ask("What is this?")
    assert again.result.token_ids == first.result.token_ids


def test_an_answer_follows_a_schema(conformance_bundle, tmp_path, picture):
    """On the command line, of a model that knows nothing of JSON."""
    schema = tmp_path / "schema.json"
    properties = {"date": {"type": "string", "maxLength": 4}, "paid": {"type": "boolean"}}
    schema.write_text(json.dumps({"type": "object", "properties": properties, "required": ["date", "paid"]}))
    image = tmp_path / "page.png"
    runtime.image_file.open_image(picture).save(image)
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
