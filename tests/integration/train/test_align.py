"""Projector initialisation by regression onto the language model's embeddings."""

import json

import pytest
import torch

from tests.integration.train.test_local import page_with
from tests.support.commands import run_main
from train.align import NO_TOKEN, SPREAD, UNTOLD, AlignTask, cells, tell_apart
from train.distributed import World
from train.model import load_model
from train.pages import PageBatch
from train.places import NOWHERE, SIDES, PlaceCode
from train.recipe import read_recipe
from train.synth import Document
from train.synth.fonts import faces
from train.synth.fonts import glyphs as glyphs_of
from train.synth.page import Box, Page

ALONE = World(0, 1, torch.device("cpu"))

RECIPE = """
task: align
checkpoint: {checkpoint}
out: {out}
train: [projector, fifth_stage]
learning_rate: 1e-3
global_batch: 4
micro_batch: 2
steps: 8
precision: fp32
workers: 0
local: {{phases: [{{side: 128, min_px: 24, max_px: 32, dense: 1.0, steps: 8}}]}}
"""


@pytest.fixture
def recipe(conformance, tmp_path):
    file = tmp_path / "align.yaml"
    file.write_text(RECIPE.format(checkpoint=conformance / "checkpoint", out=tmp_path / "run"))
    return str(file)


def texts(document, *options):
    return [cell.text for cell in cells(document, *options)]


def test_a_cell_has_the_characters_of_its_centres_in_order():
    document = page_with(("a", 3, 5), ("b", 60, 5), ("c", 64, 5), ("d", 5, 63), ("e", 127.9, 63.9))
    assert texts(document, 64) == ["abd", "ce"]
    assert texts(document, 32) == ["a", "b", "c", "", "d", "", "", "e"]


def test_a_word_goes_into_the_cell_of_its_centre():
    page, glyphs = Page.blank(256, 64), glyphs_of(faces("seen")[0], 24)
    wide = page.text(40, 0, "wide", glyphs)
    page.text(wide.x1 + 4, 0, "4", glyphs)
    page.text(140, 0, "no 7", glyphs)
    document = Document(page, "test")
    assert wide.x0 < 64 < wide.x1
    assert texts(document, 64, True) == ["", "wide 4", "no 7", ""]


def test_a_cell_has_the_box_around_its_text():
    document = page_with(("a", 10, 5), ("b", 60, 15), ("c", 70, 20))
    assert [cell.box for cell in cells(document, 64)] == [Box(8, 2, 62, 18), Box(68, 17, 72, 23)]
    assert cells(document, 32)[4].box is None


def test_the_loss_is_the_squared_distance_to_the_summed_embeddings(recipe, conformance):
    task = AlignTask(read_recipe(recipe), ALONE)
    batch = next(task.steps(0, 1))[0]
    loss = task.loss(batch)
    model = load_model(conformance / "checkpoint").double()
    table = model.decoder.get_input_embeddings().weight
    image = task._checkpoint.preprocessor
    mean, std = (torch.tensor(image[key]).double().view(3, 1, 1) for key in ("image_mean", "image_std"))
    found = model.image_encoder((batch.inputs / 255.0 - mean) / std).flatten(0, 1)
    wanted = torch.stack([table[ids[ids != NO_TOKEN]].sum(0) for ids in batch.labels])
    errors = (found - wanted).square().mean(1) / table.square().mean()
    assert loss.sum.item() == pytest.approx(errors.sum().item(), rel=1e-4)
    assert loss.count == len(wanted) == 2 * 4
    explained, spread = loss.metrics["explained"]
    variance = (wanted - wanted.mean(0)).square().mean(1).sum() / table.square().mean()
    assert spread == pytest.approx(variance.item(), rel=1e-4)
    assert explained / spread == pytest.approx(1 - errors.sum().item() / variance.item(), abs=1e-3)


def test_batches_count_what_they_hold():
    labels, sides = torch.tensor([[1, 2], [3, -1], [4, -1], [5, 6]]), torch.zeros(4, SIDES, dtype=torch.long)
    batch = PageBatch(torch.zeros(2, 3, 64, 128), labels, NO_TOKEN, sides)
    assert (batch.samples, batch.images, batch.tokens, batch.skipped) == (2, 2, 6, [])


def test_a_run_fits_and_changes_projector_and_fifth_stage_alone(recipe, conformance, tmp_path):
    done = run_main("train", recipe)
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    before, after = (load_model(path).state_dict() for path in (conformance / "checkpoint", tmp_path / "run" / "final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = ("image_encoder.projector.", "image_encoder.encoder.stages.4.")
    assert changed == {name for name in before if name.startswith(trained)}


def test_other_parts_are_refused(recipe):
    done = run_main("train", recipe, "train=[projector, language_model]")
    assert done.returncode == 2
    assert "not language_model" in done.stderr
    assert "Traceback" not in done.stderr


def test_cells_are_told_apart_by_their_distance(recipe, conformance):
    """As if each were drawn from a normal distribution around its text's embedding."""
    random = torch.Generator().manual_seed(0)
    texts, which = torch.randn(5, 7, generator=random), torch.tensor([0, 3, 3, 4, 1, 2])
    found = texts[which] + 0.3 * torch.randn(6, 7, generator=random)
    loss, right = tell_apart(found, texts, which)
    normal = torch.distributions.Normal(texts[None].double(), SPREAD**0.5)
    likely = normal.log_prob(found[:, None].double()).sum(-1)
    wanted = (likely.logsumexp(1) - likely[torch.arange(6), which]).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert right.tolist() == (likely.argmax(1) == which).tolist()


def test_the_loss_of_telling_apart_is_added(recipe):
    plain, contrasted = (AlignTask(read_recipe(recipe, extra), ALONE) for extra in ([], ["local.contrast=2.0"]))
    batch = next(plain.steps(0, 1))[0]
    without, with_it = plain.loss(batch), contrasted.loss(batch)
    image = plain._checkpoint.preprocessor
    mean, std = (255 * torch.tensor(image[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    found = plain.model((batch.inputs - mean) / std).flatten(0, 1)
    ids = [tuple(cell[cell != NO_TOKEN].tolist()) for cell in batch.labels]
    texts = list(dict.fromkeys(ids))
    sums = torch.stack([plain._embedding[list(text)].sum(0) for text in texts])
    which = torch.tensor([texts.index(text) for text in ids])
    told, right = tell_apart(found, sums, which)
    assert with_it.sum.item() == pytest.approx(without.sum.item() + 2 * told.item(), rel=1e-4)
    blank = tuple(plain._tokenizer.encode("\n", opening=False))
    written = torch.tensor([texts[at] != blank for at in which])
    assert with_it.metrics["told_apart"] == (right[written].sum(), written.sum())
    assert "told_apart" not in without.metrics


def test_what_tokens_say_of_places_is_added(recipe):
    extra = ["local.contrast=2.0", "local.places=0.5", "local.whole_words=true"]
    task = AlignTask(read_recipe(recipe, extra), ALONE)
    batch = next(task.steps(0, 1))[0]
    loss = task.loss(batch)
    found = task.model((batch.inputs - task._mean) / task._std).flatten(0, 1)
    sides, ids = batch.sides, batch.labels
    written = sides[:, 0] != NOWHERE
    assert 0 < written.sum() < len(written)
    code = PlaceCode(found.shape[1], ALONE.device)
    text, place = torch.zeros_like(found), torch.zeros_like(found)
    for at, cell in enumerate(ids):
        text[at] = task._embedding[cell[cell != NO_TOKEN]].sum(0)
    place[written] = code.encode(sides[written])
    errors = (found - text - place).square().mean(1).sum() / task._embedding.square().mean()
    told, _ = tell_apart(found - place, *text.unique(dim=0, return_inverse=True))
    missed, hit = code.loss(found[written], sides[written])
    assert loss.sum.item() == pytest.approx((errors + 2 * told + 0.5 * missed).item(), rel=1e-5)
    assert loss.metrics["placed"] == (hit.sum(), written.sum())


def test_places_are_not_taught_where_a_phase_says_so(recipe):
    """And pages of a step are fewer there."""
    phases = "local.phases=[{side: 128, min_px: 24, max_px: 32, dense: 1.0, steps: 1, batch: 2, placed: false}, \
               {side: 128, min_px: 24, max_px: 32, dense: 1.0, steps: 1}]"
    overrides = ["local.places=0.5", "local.contrast=2.0", "local.rounds=4", phases]
    without, placed = AlignTask(read_recipe(recipe, overrides), ALONE).steps(0, 2)
    assert [[len(batch.inputs) for batch in step] for step in (without, placed)] == [[1, 1], [2, 2]]
    task, unplaced = (AlignTask(read_recipe(recipe, o), ALONE) for o in (overrides, ["local.contrast=2.0"]))
    sides = without[0].sides
    assert set(sides.unique().tolist()) == {NOWHERE, UNTOLD}
    loss, wanted = task.loss(without[0]), unplaced.loss(without[0])
    assert loss.sum.item() == pytest.approx(wanted.sum.item(), rel=1e-6)
    assert loss.metrics["told_apart"] == wanted.metrics["told_apart"]
    assert loss.metrics["told_apart"][1] == (sides[:, 0] == UNTOLD).sum() > 0
    assert loss.metrics["placed"] == (0, 0)
    assert task.loss(placed[0]).metrics["placed"][1] > 0


PHASE = "local.phases=[{side: 128, min_px: 24, max_px: 32, dense: 1.0, steps: 2}]"


def test_the_whole_encoder_can_be_trained(recipe, conformance, tmp_path):
    done = run_main("train", recipe, "train=[projector, encoder]", "steps=2", PHASE)
    assert done.returncode == 0, done.stderr
    before, after = (load_model(path).state_dict() for path in (conformance / "checkpoint", tmp_path / "run" / "final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("image_encoder.")}


KEPT = ("micro_batch=1", "local.kept=2", "local.passes=2")  # 8 pages in each of two rounds


def test_kept_outputs_give_the_loss_of_their_pages(recipe):
    plain, keeping = (AlignTask(read_recipe(recipe, extra), ALONE) for extra in (KEPT[:1], KEPT))
    losses = ([[task.loss(batch) for batch in step] for step in task.steps(0, 2)] for task in (plain, keeping))
    wanted, found = (sorted(loss.sum.item() for step in task for loss in step) for task in losses)
    assert found == pytest.approx(wanted, rel=1e-5)


def test_kept_pages_are_gone_over_in_another_order_before_the_next_come(recipe):
    task = AlignTask(read_recipe(recipe, KEPT), ALONE)
    batches = [batch for step in task.steps(0, 8) for batch in step]
    pages = [batch.inputs.numpy().tobytes() for batch in batches]
    passes = [pages[at : at + 8] for at in range(0, len(pages), 8)]
    assert len(pages) == 8 * 4 and len(set(pages)) == 16
    assert set(passes[0]) == set(passes[1]) and set(passes[2]) == set(passes[3])
    assert passes[0] != passes[1] and passes[2] != passes[3]
    labels = [(batch.labels.tolist(), batch.sides.tolist()) for batch in batches]
    of_page = dict(zip(pages, labels, strict=True))
    assert [of_page[page] for page in pages] == labels


def test_a_run_goes_on_within_a_round_with_what_it_would_have_got(recipe):
    whole, rest = (list(AlignTask(read_recipe(recipe, KEPT), ALONE).steps(first, 8)) for first in (0, 3))
    assert len(rest) == 5
    for wanted, found in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(wanted, found, strict=True))
        assert all(torch.equal(a.labels, b.labels) for a, b in zip(wanted, found, strict=True))


def test_processes_keep_different_pages(recipe):
    worlds = [World(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    mine, others, alone = (
        [
            page.numpy().tobytes()
            for step in AlignTask(read_recipe(recipe, KEPT), world).steps(0, 2)
            for batch in step
            for page in batch.inputs
        ]
        for world in (*worlds, ALONE)
    )
    assert len(mine) == len(others) == 4
    assert sorted(mine + others) == sorted(alone)


def test_a_run_that_keeps_outputs_trains_the_same_parts(recipe, conformance, tmp_path):
    done = run_main("train", recipe, *KEPT)
    assert done.returncode == 0, done.stderr
    before, after = (load_model(path).state_dict() for path in (conformance / "checkpoint", tmp_path / "run" / "final"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = ("image_encoder.projector.", "image_encoder.encoder.stages.4.")
    assert changed == {name for name in before if name.startswith(trained)}


@pytest.mark.parametrize(
    ("overrides", "mentions"),
    [
        (("local.passes=2",), "local.kept"),
        (("local.kept=3",), "multiples of 3"),
        (("local.kept=-1",), "at least 0"),
        (("local.kept=2", "local.rounds=2", "steps=16"), "local.rounds: 2"),
        (("local.kept=2", PHASE.replace("steps: 2", "steps: 8, batch: 2")), "batch, but outputs are kept"),
        (("local.kept=2", "train=[projector, encoder]"), "not encoder"),
    ],
)
def test_what_cannot_be_kept_is_an_error(recipe, overrides, mentions):
    done = run_main("train", recipe, *overrides)
    assert done.returncode == 2
    assert mentions in done.stderr
    assert "Traceback" not in done.stderr


def test_kept_pages_follow_the_phases(recipe):
    phases = "local.phases=[{side: 128, min_px: 24, max_px: 32, dense: 1.0, steps: 4}, \
               {side: 192, min_px: 24, max_px: 32, dense: 1.0, steps: 4}]"
    task = AlignTask(read_recipe(recipe, [*KEPT, phases]), ALONE)
    sides = [32 * batch.inputs.shape[-1] for step in task.steps(0, 8) for batch in step]
    assert sides == 16 * [128] + 16 * [192]
