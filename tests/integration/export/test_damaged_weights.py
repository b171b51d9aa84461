"""NaN and infinite weights are named before anything is exported."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import Parts, refusal, stored
from tests.support.commands import assert_one_line_error, run_main
from train.model import Checkpoint, check_finite

QUERY, CONVOLUTION = "model.layers.1.self_attn.q_proj.weight", "encoder.stages.0.layers.0.dwconv.weight"
PROJECTOR = "model.mm_projector.0.weight"


@pytest.fixture
def checkpoint(conformance: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(conformance / "checkpoint", tmp_path / "checkpoint"))


def spoil(folder: Path, key: str, values: list[float]) -> int:
    """Put `values` into a tensor; returns how many it has."""
    state = stored(folder)
    state[key].view(-1)[: len(values)] = torch.tensor(values, dtype=state[key].dtype)
    torch.save(state, folder / "pytorch_model.bin")
    return state[key].numel()


CASES = [("", QUERY), ("", PROJECTOR), ("", "lm_head.weight"), ("vision_tower", CONVOLUTION)]


@pytest.mark.parametrize(("where", "key"), CASES)
def test_a_bundle_of_damaged_weights_is_not_begun(where, key, checkpoint, tmp_path):
    size = spoil(checkpoint / where, key, [math.nan, math.inf, 1.0, -math.inf, math.nan, math.nan])
    done = run_main("export.bundle", "--checkpoint", checkpoint, "--out", tmp_path / "out" / "bundle")
    file = checkpoint / where / "pytorch_model.bin"
    assert_one_line_error(done, f"{file}: {key} has 3 NaN and 2 infinite of {size} values; the weights are damaged")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("module", "where", "key"),
    [("export.encoder", "", PROJECTOR), ("export.encoder", "vision_tower", CONVOLUTION), ("export.decoder", "", QUERY)],
)
def test_each_graph_s_command_looks_at_its_own_weights(module, where, key, checkpoint, tmp_path):
    spoil(checkpoint / where, key, [math.inf])
    done = run_main(module, "--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert_one_line_error(done, f"{key} has 0 NaN and 1 infinite of")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_all_types_are_looked_at_and_other_tensors_counted(dtype, value, tmp_path):
    folder = Parts().write(
        tmp_path / "checkpoint",
        lambda state, to: torch.save(
            {key: tensor.to(dtype) for key, tensor in state.items()}, to / "pytorch_model.bin"
        ),
    )
    opened = Checkpoint.open(folder)
    check_finite(opened.vision_tensors(), opened.projector_tensors(), opened.language_tensors())
    for key in (QUERY, PROJECTOR, "lm_head.weight"):
        spoil(folder, key, [torch.finfo(dtype).max, value])
    message = refusal(lambda: check_finite(opened.projector_tensors(), opened.language_tensors()))
    assert f"{PROJECTOR} has {int(math.isnan(value))} NaN and {int(math.isinf(value))} infinite of " in message
    assert "; so have 2 other tensors; " in message
