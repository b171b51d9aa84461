"""A bundle's manifest: opened, its prompt written, an image made by its rule, its tokenizer loaded."""

import json
import os
import tempfile
from pathlib import Path

from PIL import Image

from export.bundle_writer import write_manifest
from export.tokenizer.convert import export_tokenizer
from runtime.bundle.manifest import open_bundle
from runtime.image.preprocess import preprocess
from runtime.text.template import first_turn, next_turn
from runtime.text.tokenizer import Tokenizer
from tests.fuzz.json_trees import changed as mutate  # noqa: F401
from tests.support.commands import ROOT
from tests.support.fake_bundle import SECTIONS, write_fake_bundle

CHECKPOINT = ROOT / "tests" / "data" / "conformance" / "checkpoint"
MAX_SIDE = 256  # of images that are made: larger ones only take longer
_TEMPORARY = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _TEMPORARY.name  # hashes of the bundle's files
_FOLDER = Path(_TEMPORARY.name) / "bundle"


def seeds() -> list[bytes]:
    write_fake_bundle(_FOLDER)
    tokenizer = export_tokenizer(CHECKPOINT, _FOLDER / "tokenizer")
    (_FOLDER / "manifest.json").unlink()
    write_manifest(_FOLDER, "fake", {}, SECTIONS | {"tokenizer": tokenizer})
    manifest = json.loads((_FOLDER / "manifest.json").read_bytes())
    other = manifest["image"] | {"aspect": "any", "mean": [0, 0.5, 1], "resolution": 128, "multiple": 32}
    encoder = manifest["encoder"] | {"stride": 32}
    return [json.dumps(tree).encode() for tree in (manifest, manifest | {"image": other, "encoder": encoder})]


def fuzz(content: bytes) -> None:
    (_FOLDER / "manifest.json").write_bytes(content)
    bundle = open_bundle(_FOLDER)
    rule = bundle.image
    rule.tokens(rule.resolution, rule.resolution)
    if rule.resolution <= MAX_SIDE and rule.max_visual_tokens * rule.multiple**2 <= MAX_SIDE**2:
        pixels = preprocess(Image.new("RGB", (50, 30)), rule)
        assert pixels.shape[0] == 3 and not any(side % rule.multiple for side in pixels.shape[1:])
    prompt = first_turn(bundle.prompt, "What is this?", 1) + next_turn(bundle.prompt, "And <image>?", 1)
    tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer, bundle.decoder.vocab_size)
    tokenizer.decode(token_id for token_id in tokenizer.encode_prompt(prompt, [2] * prompt.count("<image>")))
