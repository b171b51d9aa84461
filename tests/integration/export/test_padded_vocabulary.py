"""LLaVA's image tokens, an embedding padded to a multiple of 64, several EOS tokens: from checkpoint to answer."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import edit_json, stored
from tests.support.commands import run_main
from train.model.checkpoint.layout import EMBEDDING, HEAD

ROWS = 576  # 512 of SentencePiece, three image tokens, padding


@pytest.fixture(scope="module")
def padded(conformance: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conformance checkpoint with new rows that are the mean of the old ones, as LLaVA begins with."""
    folder = tmp_path_factory.mktemp("padded") / "checkpoint"
    shutil.copytree(conformance / "checkpoint", folder)
    state = stored(folder)
    for key in (EMBEDDING, HEAD):
        old = state[key]
        state[key] = torch.cat([old, old.mean(0, keepdim=True).expand(ROWS - len(old), -1)])
    torch.save(state, folder / "pytorch_model.bin")
    edit_json(folder / "config.json", vocab_size=ROWS, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    edit_json(folder / "config.json", eos_token_id=[2, 7])
    edit_json(folder / "generation_config.json", eos_token_id=[2, 7])
    return folder


def test_the_answer_is_the_checkpoint_s(padded: Path, conformance: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    done = run_main("export.bundle", "--checkpoint", padded, "--out", bundle)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["decoder"]["vocab_size"] == ROWS
    assert manifest["tokenizer"]["eos_token_ids"] == [2, 7]
    assert manifest["tokenizer"]["special_ids"][-3:] == [512, 513, 514]
    image = conformance / "case0.png"
    compared = run_main("export.parity", "--checkpoint", padded, "--bundle", bundle, "--image", image)
    assert compared.returncode == 0, compared.stdout
    assert "identical" in compared.stdout
