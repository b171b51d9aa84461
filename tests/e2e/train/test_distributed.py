"""Training in two processes by torchrun: what one process computes, replicated and sharded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT
from tests.support.training import assert_near, assert_same, losses, recipe, records, train, trained, weights
from train.model import load_model

__all__ = ["recipe", "records"]  # fixtures


def torchrun(file: Path) -> str:
    """Train in two processes; returns what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0}


@pytest.mark.parametrize(
    ("fsdp", "keys"),
    [
        (False, {}),
        # Text goes through a frozen decoder then, while the other process has images to learn from
        (True, {"train": ["projector", "fifth_stage"], "micro_batch": 1}),
        (True, {"train": ["projector", "language_model"], "lora": LORA}),
    ],
    ids=["replicated", "sharded-frozen", "sharded-adapters"],
)
def test_two_processes_compute_what_one_does(fsdp: bool, keys: dict, recipe):
    keys = {"steps": 5, "save_every": 3} | keys
    one = train(recipe("one", **keys))
    two = one.with_name("two")
    torchrun(recipe("two", fsdp=fsdp, **keys))
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert_near(trained(two), trained(one), 1e-3)
    assert_near(load_model(two / "final").state_dict(), load_model(one / "final").state_dict(), 1e-3)
    assert (two / "malformed.jsonl").read_text() == (one / "malformed.jsonl").read_text()


def test_a_sharded_run_is_that_of_one_process_and_goes_on_sharded_or_not(recipe):
    """From its checkpoint both processes go on to the same bits, and one process alone to the same weights."""
    keys = {"steps": 5, "save_every": 3, "keep": 9}
    one = train(recipe("one", **keys))
    file = recipe("two", fsdp=True, **keys)
    out = one.with_name("two")
    torchrun(file)
    final, curve = weights(out / "final"), losses(out)
    assert curve == pytest.approx(losses(one), rel=1e-5)
    assert_near(trained(out), trained(one), 1e-3)
    shutil.rmtree(out / "final")
    assert f"resuming from {out}/step-000003" in torchrun(file)
    assert_same(weights(out / "final"), final)
    assert losses(out) == curve
    shutil.rmtree(out / "final")
    train(recipe("two", **keys))
    assert losses(out) == pytest.approx(curve, rel=1e-5)
    assert_near(weights(out / "final"), final, 1e-3)
