"""Small training runs on the conformance checkpoint, as fixtures and functions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from train.__main__ import run_recipe
from train.recipe import read_recipe

ALL = ("projector", "encoder", "language_model")


@pytest.fixture(scope="module")
def records(conformance: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen records: one image, several, none; one broken."""
    file = tmp_path_factory.mktemp("data") / "records.json"
    content = []
    for number in range(13):
        images = ["case1.png", "case2.png"][: number % 3]
        question = "<image>\n" * len(images) + "What is the total? " + "please " * number
        talk = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {number} " * (1 + number % 4)}]
        content.append({"id": number, "conversations": talk} | ({"image": images} if images else {}))
    content.append({"id": "broken", "image": "none.png", "conversations": content[1]["conversations"]})
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def recipe(conformance: Path, records: Path, tmp_path: Path):
    """Makes recipes that differ from a small run in some keys, as a file; `keys` by name, `data` is set."""

    def make(out: str = "run", **keys) -> Path:
        content = {
            "out": str(tmp_path / out),
            "checkpoint": str(conformance / "checkpoint"),
            "train": list(ALL),
            "learning_rate": 1e-3,
            "global_batch": 4,
            "micro_batch": 2,
            "steps": 6,
            "warmup_ratio": 0.2,
            "save_every": 2,
            "workers": 0,
            "precision": "fp32",
            "data": [{"records": str(records), "images": str(conformance)}],
        }
        file = tmp_path / f"{out}.yaml"
        file.write_text(json.dumps(content | keys))  # JSON is YAML
        return file

    return make


def train(file: Path) -> Path:
    """In this process; returns the run's folder."""
    chosen = read_recipe(file)
    run_recipe(chosen)
    return Path(chosen.out)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, Tensor]:
    tower = load_file(checkpoint / "vision_tower/model.safetensors")
    return load_file(checkpoint / "model.safetensors") | {f"tower.{key}": value for key, value in tower.items()}


def trained(out: Path) -> dict[str, Tensor]:
    """The float32 weights of the newest checkpoint; those of the release are float16."""
    return load_file(max(out.glob("step-*")) / "training/trainable.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key in found if not torch.equal(found[key], expected[key])]
    assert not different


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= tolerance * value.norm() + 1e-7, key
