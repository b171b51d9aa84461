"""Stage 0: what the heads are asked, where they look, and that a run teaches and continues."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.commands import run_main
from train.distributed import World
from train.local import (
    BLANK,
    CHARACTERS,
    Local,
    LocalHeads,
    LocalTask,
    choose_cells,
    local_loss,
    stage_features,
    targets,
)
from train.model import ConvNeXtEncoder, EncoderConfig, load_model
from train.pages import Phase
from train.recipe import read_recipe
from train.synth import Page, PageOptions, render
from train.synth.dense import dense_page
from train.synth.document import Document


def page_with(*glyphs: tuple[str, float, float]) -> Document:
    """Characters of 4 x 6 pixels centred at (x, y) on 128 x 64 pixels."""
    page = Page.blank(128, 64)
    for character, x, y in glyphs:
        page.characters.append(character)
        page.places.append((x - 2, y - 3, x + 2, y + 3))
    return Document(page, "test")


def test_a_target_stands_in_the_subcell_of_its_centre():
    grid = targets(page_with(("a", 2, 4), ("€", 127, 63), ("7", 40, 17)))
    assert grid.shape == (8, 32)
    assert CHARACTERS[grid[0, 0] - 1] == "a"
    assert CHARACTERS[grid[7, 31] - 1] == "€"
    assert CHARACTERS[grid[2, 10] - 1] == "7"
    assert (grid != BLANK).sum() == 3


def test_targets_of_a_drawn_page_are_its_characters():
    document = dense_page(3, "train", 0, (256, 256), 20, 40)
    grid = targets(document)
    wanted = {}
    for character, (x0, y0, x1, y1) in zip(document.page.characters, document.page.places, strict=True):
        wanted[min(31, int((y0 + y1) / 16)), min(63, int((x0 + x1) / 8))] = character
    assert {(int(r), int(c)): CHARACTERS[grid[r, c] - 1] for r, c in zip(*grid.nonzero(), strict=True)} == wanted


def test_every_subcell_is_told_from_the_feature_that_covers_it():
    """A change in one feature vector changes the logits of its s x s pixels and no others."""
    heads = LocalHeads((4, 8, 12, 16, 20), hidden=3)
    assert heads.strides == [8, 16, 32, 64]
    features = [
        torch.randn(1, width, 128 // s, 192 // s) for width, s in zip((8, 12, 16, 20), heads.strides, strict=True)
    ]
    everywhere = torch.arange(16 * 48)
    before = heads(features, everywhere)
    for level, stride in enumerate(heads.strides):
        changed = [feature.clone() for feature in features]
        changed[level][0, :, 1, 2] += torch.randn(changed[level].shape[1])
        moved = (heads(changed, everywhere)[level] != before[level]).any(-1).view(16, 48).nonzero()
        rows, columns = moved[:, 0] * 8 // stride, moved[:, 1] * 4 // stride
        assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(1, 2)}
        assert len(moved) == (stride // 8) * (stride // 4)


def test_subcells_of_a_feature_are_in_place():
    """The head of stride 16 writes subcell (row, column) from its own slice of the spread features."""
    heads = LocalHeads((4, 8, 12), hidden=1)
    heads.spread[1][0] = torch.nn.Identity()
    with torch.no_grad():
        heads.spread[1][1] = torch.nn.Identity()
        heads.classify[1] = torch.nn.Identity()
    feature = torch.arange(8.0).repeat(2)[None, :8, None, None]  # one cell of 2 x 4 subcells
    told = heads([torch.zeros(1, 8, 2, 2), feature], torch.arange(8))[1]
    assert told.flatten().tolist() == list(range(8))


def test_features_end_where_the_encoder_does():
    encoder = ConvNeXtEncoder(EncoderConfig((1, 1, 1, 1, 1), (8, 8, 8, 8, 16), layer_scale=1.0)).eval()
    pixel_values = torch.randn(2, 3, 64, 128)
    features = stage_features(encoder, pixel_values)
    assert [tuple(feature.shape[2:]) for feature in features] == [(8, 16), (4, 8), (2, 4), (1, 2)]
    torch.testing.assert_close(features[-1].flatten(2).transpose(1, 2), encoder(pixel_values))


def test_all_characters_and_a_share_of_blanks_are_chosen():
    grid = torch.zeros(4, 50, 50, dtype=torch.long)
    grid[0, :10] = 3
    torch.manual_seed(0)
    cells = choose_cells(grid, 0.1)
    chosen = grid.flatten()[cells]
    assert (chosen == 3).sum() == 500
    assert 0.08 < (chosen == BLANK).sum() / 9500 < 0.12


def test_blanks_told_right_are_not_characters_told_right():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 9.0, 0.0]])
    loss, right = local_loss(logits, torch.tensor([BLANK, 1, 2]))
    assert right == 1
    wanted = -torch.log_softmax(logits.double(), -1)[[0, 1, 2], [0, 1, 2]].sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_pages_follow_the_phases_and_the_share_of_dense_ones():
    local = Local((Phase(64, 16, 20, steps=2, dense=1.0), Phase(256, 20, 24, steps=1, dense=0.25)))
    pages = {number: local.draw(5, number, 4).page for number in (0, 7, 8, 9, 10, 11)}
    assert [page.width for page in pages.values()] == [64, 64, 256, 256, 256, 256]
    dense = {n: dense_page(n, "train", 5, (256, 256), 20, 24, 0.5).page for n in range(8, 12)}
    assert sum(np.array_equal(pages[n].pixels, page.pixels) for n, page in dense.items()) == 1
    with pytest.raises(IndexError):
        local.phase(3)


def test_phases_come_again_with_other_pages():
    phases = (Phase(64, 16, 20, steps=1, dense=1.0), Phase(128, 16, 20, steps=2, dense=1.0))
    local = Local(phases, rounds=2)
    assert [local.phase(step).side for step in range(6)] == [64, 128, 128, 64, 128, 128]
    with pytest.raises(IndexError):
        local.phase(6)
    first, again = (local.draw(0, number, 1).page for number in (0, 3))
    assert not np.array_equal(first.pixels, again.pixels)


def test_a_phase_may_draw_some_families_alone():
    local = Local((Phase(320, 20, 48, steps=1, dense=0.0, families={"figures": 1.0}),))
    assert {local.draw(0, number, 8).template.partition("/")[0] for number in range(8)} == {"figures"}


def test_documents_stand_side_by_side_where_they_are_drawn():
    local = Local((Phase(768, 20, 48, steps=2, dense=0.0, strength=0.3, families={"figures": 1.0}, columns=3),))
    page = local.draw(5, 1, 1).page
    options = PageOptions(((256, 768),), 20, 48, (("figures", 1.0),), strength=0.3)
    alone = [render(number, "train", 5, options).page for number in (3, 4, 5)]
    np.testing.assert_array_equal(page.pixels, np.concatenate([one.pixels for one in alone], 1))
    written = list(zip(page.characters, page.places, page.words, strict=True))
    for column, one in enumerate(alone):
        mine = [item for item in written if column * 256 <= (item[1][0] + item[1][2]) / 2 < (column + 1) * 256]
        assert one.characters == [character for character, *_ in mine]
        for place, (_, (x0, y0, x1, y1), _) in zip(one.places, mine, strict=True):
            assert place == (x0 - column * 256, y0, x1 - column * 256, y1)
    assert len(set(page.words)) == sum(len(set(one.words)) for one in alone)


def test_dense_pages_depend_on_their_arguments_alone():
    first = dense_page(1, "train", 0, (128, 128), 14, 20)
    again = dense_page(1, "train", 0, (128, 128), 14, 20)
    np.testing.assert_array_equal(first.page.pixels, again.page.pixels)
    assert first.page.characters == again.page.characters
    for other in (dense_page(2, "train", 0, (128, 128), 14, 20), dense_page(1, "test", 0, (128, 128), 14, 20)):
        assert not np.array_equal(first.page.pixels, other.page.pixels)


RECIPE = """
task: local
checkpoint: {checkpoint}
out: {out}
train: [encoder]
learning_rate: 1e-3
global_batch: 4
micro_batch: 2
steps: {steps}
precision: fp32
save_every: 2
workers: 0
local: {{phases: [{{side: 64, min_px: 16, max_px: 24, dense: 1.0, steps: {steps}}}], hidden: 8}}
"""


@pytest.fixture
def recipe(conformance, tmp_path):
    def write(name: str, steps: int = 4) -> str:
        file = tmp_path / f"{name}.yaml"
        file.write_text(RECIPE.format(checkpoint=conformance / "checkpoint", out=tmp_path / name, steps=steps))
        return str(file)

    return write


def test_a_run_changes_the_encoder_alone_and_goes_on_bit_equal(recipe, conformance, tmp_path):
    assert run_main("train", recipe("whole")).returncode == 0
    whole = tmp_path / "whole"
    shutil.copytree(whole, tmp_path / "cut")
    cut = recipe("cut")
    shutil.rmtree(tmp_path / "cut" / "final")
    shutil.rmtree(tmp_path / "cut" / "step-000004")
    done = run_main("train", cut)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    for part in ("model.safetensors", "vision_tower/model.safetensors"):
        one, other = load_file(whole / "final" / part), load_file(tmp_path / "cut" / "final" / part)
        assert all(torch.equal(one[key], other[key]) for key in one)
    before, after = load_model(conformance / "checkpoint").state_dict(), load_model(whole / "final").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("image_encoder.encoder.")}


@pytest.mark.parametrize(
    ("override", "mentions"),
    [
        ("steps=5", "local.phases"),
        ("train=[projector]", "[encoder]"),
        ("local.phase=[]", "error: local.phase: unknown key"),
        ("local.blanks=many", "error: local.blanks: expected a number"),
        ("local.kept=2", "error: local.kept: unknown key"),
        ("local.rounds=2", "add up to 8"),
        ("local.phases=[{side: 64, min_px: 16, max_px: 24, steps: 4, batch: 5}]", "batch 5, expected at most"),
        ("local.phases=[{side: 64, min_px: 16, max_px: 24, steps: 4, batch: 3}]", "a multiple of 2"),
        ("local.phases=[{side: 72, min_px: 16, max_px: 24, steps: 4}]", "multiple of 64"),
        ("local.phases=[{side: 64, min_px: 16, max_px: 24, steps: 4, columns: 3}]", "3 columns on pages of 64"),
        ("local.phases=[{side: 64, min_px: 1, max_px: 2, steps: 4}]", "no text size between 1 and 2"),
        ("local.phases=[{side: 64, min_px: 16, max_px: 24, steps: 4, families: {maps: 1.0}}]", "maps"),
    ],
)
def test_a_wrong_recipe_is_one_line(recipe, override, mentions):
    done = run_main("train", recipe("wrong"), override)
    assert done.returncode == 2, done.stderr
    assert mentions in done.stderr
    assert "Traceback" not in done.stderr


def test_the_encoder_has_its_own_learning_rate(recipe):
    alone = World(0, 1, torch.device("cpu"))
    task = LocalTask(read_recipe(recipe("rates"), ["learning_rates.encoder=0.5", "learning_rate=0.25"]), alone)
    rates = {id(parameter): group["lr"] for group in task.parameter_groups() for parameter in group["params"]}
    assert {rates[id(p)] for p in task.model.encoder.parameters()} == {0.5}
    assert {rates[id(p)] for p in task.model.heads.parameters()} == {0.25}
