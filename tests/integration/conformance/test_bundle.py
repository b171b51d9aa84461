"""The exported bundle and the runtime compute what the original implementation does, case by case."""

import json
from pathlib import Path

import numpy as np
import pytest

import runtime
from tests.support.commands import run_main

CASES = range(3)


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    assert found.shape == reference.shape
    return float(np.linalg.norm(found.astype(np.float64) - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize("number", CASES)
def test_command_line_meets_every_bound(conformance, reference, conformance_bundle, tmp_path, number):
    case, expected = reference["cases"][number], np.load(conformance / f"case{number}.npz")
    arguments = ["--bundle", conformance_bundle, "--image", conformance / case["image"], "--prompt", case["prompt"]]
    arguments += ["--max-new-tokens", reference["max_new_tokens"], "--json", "--dump", tmp_path]
    done = run_main("runtime.infer", *arguments)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert np.abs(np.load(tmp_path / "pixel_values.npy") - expected["pixel_values"]).max() <= 1e-6
    assert relative_error(np.load(tmp_path / "image_embeds.npy"), expected["image_embeds"]) <= 1e-4
    assert relative_error(np.load(tmp_path / "first_logits.npy"), expected["last_logits"]) <= 1e-4
    assert answer["token_ids"] == expected["generated_ids"].tolist()
    assert answer["text"] == case["generated_text"]
    assert answer["visual_tokens"] == case["visual_tokens"]
    assert answer["prompt_tokens"] == len(expected["input_ids"]) - 1 + case["visual_tokens"]
    assert answer["finish_reason"] == "length"


@pytest.mark.parametrize("number", CASES)
def test_streamed_text_is_the_whole_text(conformance, reference, conformance_bundle, number):
    case = reference["cases"][number]
    expected = np.load(conformance / f"case{number}.npz")["generated_ids"].tolist()
    model = runtime.load(conformance_bundle)
    pieces = list(
        model.generate([conformance / case["image"]], case["prompt"], runtime.Options(reference["max_new_tokens"]))
    )
    assert "".join(piece.text for piece in pieces) == case["generated_text"] == pieces[-1].result.text
    assert [piece.token_id for piece in pieces] == expected == pieces[-1].result.token_ids
    assert all(piece.result is None for piece in pieces[:-1])


def test_prompt_ids_are_the_originals(conformance, reference, conformance_bundle):
    from runtime.text.template import first_turn

    model = runtime.load(conformance_bundle)
    for number, case in enumerate(reference["cases"]):
        text = first_turn(model.bundle.prompt, case["prompt"], 1)
        assert text == case["conversation"]
        ids = model.tokenizer.encode_prompt(text, [1])
        expected = np.load(conformance / f"case{number}.npz")["input_ids"].tolist()
        assert [-200 if token == -1 else token for token in ids] == expected


@pytest.mark.parametrize(("precision", "decoder", "bound"), [("fp16", "fp16", 5e-3), ("fp32", "int8", 1e-4)])
def test_other_precisions_stay_close(conformance, reference, tmp_path, precision, decoder, bound):
    out = tmp_path / "bundle"
    options = ["--precision", precision, "--decoder-precision", decoder]
    done = run_main("export.bundle", "--checkpoint", conformance / "checkpoint", "--out", out, *options)
    assert done.returncode == 0, done.stderr
    model, trace = runtime.load(out), runtime.Trace()
    expected = np.load(conformance / "case1.npz")
    *_, last = model.generate([conformance / "case1.png"], reference["cases"][1]["prompt"], trace=trace)
    assert relative_error(trace.image_embeds, expected["image_embeds"]) <= bound
    assert last.result.token_ids[0] == expected["generated_ids"][0]  # its margin over the next token is wide


def test_parity_command_agrees(conformance, conformance_bundle):
    arguments = ["--checkpoint", conformance / "checkpoint", "--bundle", conformance_bundle, "--image"]
    done = run_main("export.parity", *arguments, *(conformance / f"case{number}.png" for number in CASES))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("identical") == len(CASES)


def test_parity_command_sees_another_checkpoint(conformance, conformance_bundle, tmp_path: Path):
    """A bundle made from other weights must not pass."""
    import torch

    from train.model import Checkpoint, load_model, save_checkpoint

    checkpoint = Checkpoint.open(conformance / "checkpoint")
    model = load_model(checkpoint)
    with torch.no_grad():
        model.image_encoder.projector[0].weight.mul_(1.01)
    save_checkpoint(model, checkpoint, tmp_path / "other", torch.float32)
    arguments = ["--checkpoint", tmp_path / "other", "--bundle", conformance_bundle]
    done = run_main("export.parity", *arguments, "--image", conformance / "case0.png")
    assert done.returncode == 1
    assert "TOO LARGE" in done.stdout


def test_parity_command_refuses_a_bundle_of_another_shape(conformance_bundle, conformance, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    config = json.loads((conformance / "checkpoint" / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    (checkpoint / "vision_tower").symlink_to(conformance / "checkpoint" / "vision_tower")
    arguments = ["--checkpoint", checkpoint, "--bundle", conformance_bundle, "--image", conformance / "case0.png"]
    done = run_main("export.parity", *arguments)
    assert done.returncode == 2
    assert "layers is 3, not 7" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
