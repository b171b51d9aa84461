"""Graphs that are not what their bundle's manifest says: refused when they are loaded, by name."""

import json
import shutil
from pathlib import Path

import onnx
import pytest

from runtime.bundle.verify import MANIFEST, file_sha256
from tests.support.bundles import exported
from tests.support.commands import assert_one_line_error, run_main

ENCODER, DECODER = "encoder/fp32.onnx", "decoder/model.onnx"


@pytest.fixture
def bundle(tmp_path) -> Path:
    return Path(shutil.copytree(exported("--res", 256), tmp_path / "bundle"))


def edit(bundle: Path, section: str, **changes: object) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest[section] |= changes
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def load(bundle: Path):
    return run_main("runtime.infer", "--bundle", bundle, "--prompt", "Hello", "--max-new-tokens", 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": 4}, "no input 'past_key_values.3.key'"),
        ({"layers": 2}, "unknown input 'past_key_values.2.key'"),
        ({"kv_heads": 8}, "input 'past_key_values.0.key' is tensor(float)"),
        ({"kv_heads": 2}, "input 'past_key_values.0.key' is tensor(float)"),
        ({"kv_dtype": "float16"}, "expected tensor(float16)"),
        ({"vocab_size": 513}, "output 'logits' is tensor(float) ['batch_size', 1, 512], expected"),
        ({"file": ENCODER}, "no input 'input_ids'"),
    ],
)
def test_a_decoder_unlike_its_manifest_is_refused(changes, told, bundle):
    edit(bundle, "decoder", **changes)
    assert_one_line_error(load(bundle), bundle / changes.get("file", DECODER), told)


def test_an_encoder_unlike_its_manifest_is_refused(bundle):
    edit(bundle, "encoder", file=DECODER)
    assert_one_line_error(load(bundle), bundle / DECODER, "no input 'pixel_values'")


@pytest.mark.parametrize(
    ("file", "name", "told"),
    [
        (ENCODER, "pixel_values", "no input 'pixel_values'"),
        (ENCODER, "image_embeds", "no output 'image_embeds'"),
        (DECODER, "input_ids", "no input 'input_ids'"),
        (DECODER, "image_embeds", "no input 'image_embeds'"),
        (DECODER, "attention_mask", "no input 'attention_mask'"),
        (DECODER, "past_key_values.1.value", "no input 'past_key_values.1.value'"),
        (DECODER, "logits", "no output 'logits'"),
        (DECODER, "present.0.key", "no output 'present.0.key'"),
    ],
)
def test_a_renamed_input_or_output_is_named(file, name, told, bundle):
    model = onnx.load(bundle / file, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name == name:
            value.name = "renamed"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, found in enumerate(names):
                if found == name:
                    names[place] = "renamed"
    (bundle / file).write_bytes(model.SerializeToString())
    content = {"sha256": file_sha256(bundle / file), "size": (bundle / file).stat().st_size}
    edit(bundle, "files", **{file: content})
    assert_one_line_error(load(bundle), bundle / file, told)
