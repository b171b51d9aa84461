"""The released size, ConvLLaVA-7B of random weights: from checkpoint to answer, within its memory and time.

What each step took goes to benchmarks/results/released_chain.json, whatever the budgets say of it.
"""

import json
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.memory import GIB, Ran
from benchmarks.released.checkpoint import Shape, write_checkpoint
from runtime.bundle.manifest import open_bundle
from tests.support.released import run_command

EXPORT_GIB, EXPORT_MINUTES = 8, 12
ACTIVATIONS_GIB = 1.5  # of an answer, beside weights and KV cache
POSITIONS = 700  # of the prompt with its image, and the answer
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def rows():
    """A row for each step; written at the end."""
    found: list[dict] = []
    yield found
    record.write("released_chain", found)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> tuple[Path, Ran]:
    checkpoint = tmp_path_factory.mktemp("released") / "checkpoint"
    write_checkpoint(checkpoint, Shape())
    folder = checkpoint.with_name("int4")
    arguments = ["--checkpoint", checkpoint, "--decoder-precision", "int4", "--out", folder]
    return folder, step(rows, "export", "export.bundle", *arguments)


def step(rows: list[dict], name: str, module: str, *arguments: object) -> Ran:
    ran = run_command(module, *arguments)
    own, mapped = (round(size / GIB, 2) for size in (ran.peak.own, ran.peak.mapped))
    rows.append({"step": name, "seconds": round(ran.seconds, 1), "peak_gib": own, "mapped_gib": mapped})
    return ran


def test_the_export_stays_within_its_budget(bundle: tuple[Path, Ran]):
    _, ran = bundle
    assert ran.peak.own < EXPORT_GIB * GIB, str(ran)
    assert ran.seconds < EXPORT_MINUTES * 60, str(ran)


def test_an_answer_takes_its_weights_its_cache_and_little_more(bundle, conformance: Path, rows: list[dict]):
    folder, _ = bundle
    arguments = ["--bundle", folder, "--image", conformance / "case0.png", "--prompt", "What is the total?"]
    ran = step(rows, "answer", "runtime.infer", *arguments, "--max-new-tokens", NEW_TOKENS, "--json")
    answer = json.loads(ran.output[ran.output.index("{") :])
    assert 1 <= len(answer["token_ids"]) <= NEW_TOKENS
    decoder = open_bundle(folder).decoder
    cache = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * 4 * POSITIONS
    weights = sum(file.stat().st_size for file in folder.rglob("*.data"))
    assert ran.peak.own + ran.peak.mapped < weights + cache + ACTIVATIONS_GIB * GIB, str(ran)
    assert ran.peak.own < weights, "weights are mapped, not copied"


def test_the_answer_is_the_checkpoint_s(bundle, conformance: Path, rows: list[dict]):
    folder, _ = bundle
    checkpoint = folder.with_name("checkpoint")
    arguments = ["--checkpoint", checkpoint, "--bundle", folder, "--image", conformance / "case0.png"]
    step(rows, "parity", "export.parity", *arguments, "--max-new-tokens", 8)
