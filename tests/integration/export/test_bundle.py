"""Making bundles: what the checkpoint's configuration becomes, and what the command refuses."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from export.bundle import export_bundle, image_rule, prompt_template
from export.parity import TOLERANCES, ParityError
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from tests.support.commands import ROOT, assert_one_line_error, run_main
from train.model import Checkpoint


@pytest.fixture(scope="module")
def checkpoint(conformance):
    return Checkpoint.open(conformance / "checkpoint")


def with_config(checkpoint: Checkpoint, **changes) -> Checkpoint:
    return replace(checkpoint, config=checkpoint.config | changes)


def test_image_rule_is_the_checkpoints(checkpoint):
    rule = image_rule(checkpoint, 768)
    assert (rule.aspect, rule.resolution, rule.multiple, rule.max_visual_tokens) == ("pad", 768, 64, 2048)
    assert rule.mean == tuple(checkpoint.preprocessor["image_mean"])
    assert image_rule(with_config(checkpoint, image_aspect_ratio="square"), 768).aspect == "crop"


def test_template_is_vicunas_unless_something_says_otherwise(checkpoint):
    assert prompt_template(checkpoint, None).name == "vicuna_v1"
    assert prompt_template(checkpoint, "plain").name == "plain"
    assert prompt_template(with_config(checkpoint, conversation_template="chatml"), None).name == "chatml"
    assert prompt_template(with_config(checkpoint, conversation_system="Be brief."), None).system == "Be brief."
    marked = prompt_template(with_config(checkpoint, mm_use_im_start_end=True), None)
    assert "<im_start><image><im_end>" in marked.image_format
    with pytest.raises(UserError, match="alpaca"):
        prompt_template(checkpoint, "alpaca")


def test_four_bits_that_lose_too_much_are_refused_with_what_loses_less(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setitem(TOLERANCES, ("decoder", "int4"), 1e-9)
    with pytest.raises(ParityError, match="--method gptq"):
        export_bundle(checkpoint, tmp_path / "bundle", 256, decoder_precision="int4")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("check", ["full", "none"])
def test_the_manifest_records_what_was_compared(checkpoint, tmp_path, check):
    export_bundle(checkpoint, tmp_path / "bundle", 256, decoder_precision="int8", check=check)
    checked = open_bundle(tmp_path / "bundle").checked
    if check == "none":
        assert checked == "none"
    else:
        assert isinstance(checked, dict)
        assert {"encoder/fp32.onnx", "decoder/model.onnx"} <= checked.keys()
        assert 0 < checked["encoder/fp32.onnx"] <= TOLERANCES["encoder", "fp32"]
        assert 0 < checked["decoder/model.onnx"] <= TOLERANCES["decoder", "int8"]


def test_a_token_that_the_model_has_no_embedding_for(conformance, tmp_path):
    """Export and load warn, and a question that holds it is refused, by name."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(conformance / "checkpoint", folder)
    rows = Checkpoint.open(folder).llama_config.vocab_size
    file = folder / "tokenizer_config.json"
    added = {"added_tokens_decoder": {str(rows): {"content": "[PAD]", "special": True}}}
    file.write_text(json.dumps(json.loads(file.read_text()) | added))
    said = f"token '[PAD]' has ID {rows}, the model's embedding has {rows} rows"
    done = run_main("export.bundle", "--checkpoint", folder, "--out", tmp_path / "bundle")
    assert (done.returncode, said in done.stderr) == (0, True), done.stderr
    arguments = ["--bundle", tmp_path / "bundle", "--prompt", "What is [PAD]?", "--max-new-tokens", 2]
    asked = run_main("runtime.infer", *arguments)
    assert asked.returncode == 2
    assert asked.stderr.splitlines()[-1] == f"error: prompt: {said}"


def test_replacing_a_bundle_is_whole_and_leaves_no_litter(conformance, conformance_bundle, tmp_path):
    out = tmp_path / "bundle"
    arguments = ["--checkpoint", conformance / "checkpoint", "--out", out]
    assert run_main("export.bundle", *arguments).returncode == 0
    assert run_main("export.bundle", *arguments, "--res", 512, "--portable-decoder").returncode == 0
    assert open_bundle(out).image.resolution == 512
    assert open_bundle(out).decoder.portable_file == "decoder/portable.onnx"
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["--res", "100"], "64"),
        (["--res", "0"], "64"),
        (["--res", "8192"], "16384"),
        (["--precision", "int8"], "int8"),
        (["--decoder-precision", "bf16"], "bf16"),
        (["--template", "alpaca"], "alpaca"),
        (["--checkpoint", "/no/such"], "/no/such"),
    ],
)
def test_command_refuses_in_one_line(conformance, tmp_path, arguments, mention):
    checkpoint = [] if "--checkpoint" in arguments else ["--checkpoint", conformance / "checkpoint"]
    done = run_main("export.bundle", *checkpoint, *arguments, "--out", tmp_path / "bundle")
    assert_one_line_error(done, mention)
    assert list(tmp_path.iterdir()) == []


def test_two_exports_write_the_same_bytes(conformance, conformance_bundle, tmp_path):
    out = tmp_path / "again"
    assert run_main("export.bundle", "--checkpoint", conformance / "checkpoint", "--out", out).returncode == 0
    first, second = (json.loads((folder / "manifest.json").read_text()) for folder in (conformance_bundle, out))
    assert first["files"] == second["files"]


def test_a_file_in_the_way_is_one_line(conformance, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for module in ("export.encoder", "export.decoder", "export.bundle"):
        done = run_main(module, "--checkpoint", conformance / "checkpoint", "--out", tmp_path / "file" / "below")
        assert_one_line_error(done)


def test_a_terminated_export_cleans_up(conformance, tmp_path):
    command = [sys.executable, "-m", "export.bundle", "--checkpoint", str(conformance / "checkpoint")]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "bundle")], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()  # the estimate
    process.stdout.readline()  # the encoder's table begins: the export is at work
    process.terminate()
    assert process.wait() == 143
    assert list(tmp_path.iterdir()) == []
