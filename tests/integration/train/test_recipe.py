"""Recipes: what is read, what is refused, and what the released size's say."""

import json
from pathlib import Path

import pytest
import yaml

from tests.support.commands import ROOT, assert_one_line_error, run_main, run_module
from train.align import Alignment
from train.errors import RecipeError
from train.local import Local
from train.pages import read_curriculum
from train.parts import check_parts, freeze_others, part_of
from train.recipe import Lora, Recipe, differences, read_recipe

MINIMAL = {
    "out": "runs/test",
    "checkpoint": "somewhere",
    "train": ["projector"],
    "learning_rate": 1e-3,
    "global_batch": 8,
    "micro_batch": 2,
    "steps": 10,
    "data": [{"records": "records.json"}],
}
RELEASED = ROOT / "train/recipes/convllava-7b"
DEMO = "convllava-smol"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_overrides_are_yaml_and_may_be_dotted(file: Path):
    recipe = read_recipe(
        file,
        [
            "learning_rate=3e-4",  # text to YAML 1.1
            "train=[projector, encoder.stages.2, language_model]",
            "learning_rates.encoder.stages.2=1e-5",
            "lora.rank=8",
            "lora.targets=[q_proj]",
            "template=chatml",
        ],
    )
    assert recipe.learning_rate == 3e-4
    assert recipe.learning_rates == {"encoder.stages.2": 1e-5}
    assert recipe.lora == Lora(rank=8, targets=("q_proj",))
    assert recipe.template == "chatml"
    assert recipe.data[0].weight == 1.0
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rat=1"], "learning_rat: unknown key; the nearest is learning_rate"),
        (["lora.rnk=1"], "lora.rnk: unknown key; the nearest is lora.rank"),
        (["data=[{records: a, image: b}]"], r"data\[0\].image: unknown key; the nearest is data\[0\].images"),
        (["steps=many"], "steps: expected a whole number, found 'many'"),
        (["steps=true"], "steps: expected a whole number, found True"),
        (["learning_rate=fast"], "learning_rate: expected a number, found 'fast'"),
        (["train=projector"], "train: expected a list, found 'projector'"),
        (["fsdp=1"], "fsdp: expected true or false, found 1"),
        (["checkpoint=3"], "checkpoint: expected text, found 3"),
        (["learning_rate=null"], "learning_rate: expected a number, found nothing"),
        (["epochs=1"], "epochs, steps: expected exactly one"),
        (["steps=null"], "epochs, steps: expected exactly one"),
        (["precision=fp8"], "precision: 'fp8', expected one of auto, fp32, bf16"),
        (["micro_batch=0"], "micro_batch: 0, expected at least 1"),
        (["train=[]"], "train: no parts"),
        (["train=[projectr]"], "train: unknown part projectr; the nearest is projector"),
        (["train=[encoder.stages.N]"], "train: unknown part encoder.stages.N"),
        (["projector=linear"], "projector: linear, but checkpoint has one; remove the key"),
        (["data=[]"], "data: missing"),
        (["data=[{records: a, weight: 0}]"], "data: a: weight: 0.0, expected more than 0"),
        (["data=[{records: a, weight: .inf}]"], "data: a: weight: inf, expected a finite number, more than 0"),
        (["learning_rate=.nan"], "learning_rate: nan, expected a finite number, at least 0"),
        (["learning_rates.projector=-1"], "learning_rates.projector: -1.0, expected at least 0"),
        (["weight_decay=.inf"], "weight_decay: inf, expected a finite number, at least 0"),
        (["steps=null", "epochs=.inf"], "epochs: inf, expected a finite number, more than 0"),
        (["max_grad_norm=.nan"], "max_grad_norm: nan, expected more than 0"),
        (["resolution=0"], "resolution: 0, expected at least 1"),
        (["data=[{records: a, resolution: 0}]"], "data: a: resolution: 0, expected at least 1"),
        (["local={phasez: 1}"], "local: is for the tasks local and align"),
        (["task=local", "gradient_checkpointing=true"], "data: is for task conversation"),
        (["task=align", "data=[]", "gradient_checkpointing=true"], "gradient_checkpointing: is for task conversation"),
        (["task=local", "steps=null", "epochs=1"], "epochs: 1.0, but the data of task local has no end"),
        (["lora={rank: 0}"], "lora.rank: 0, expected at least 1"),
        (["lora={alpha: 0}"], "lora.alpha: 0.0, expected more than 0"),
        (["lora={dropout: 1}"], "lora.dropout: 1.0, expected a share"),
        (["learning_rates.encoder=1e-5"], "learning_rates.encoder: encoder is frozen"),
        (["lora.rank=8"], "lora: its adapters belong to language_model, which is frozen"),
        (["language_model=x"], "checkpoint: has an encoder and a language_model"),
        (["checkpoint=null"], "checkpoint: missing"),
        (
            ["checkpoint=null", "language_model=x", "encoder={timm: a, variant: b}"],
            "encoder: expected exactly one of pretrained, timm and variant, found timm and variant",
        ),
        (["out.x=1"], "out.x=1: out has no keys"),
        (["out"], "out: expected key=value"),
    ],
)
def test_a_mistake_is_named(overrides: list[str], message: str, file: Path):
    with pytest.raises(RecipeError, match=message):
        read_recipe(file, overrides)


def test_a_missing_key_is_named(tmp_path: Path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in MINIMAL.items() if key != "out"}))
    with pytest.raises(RecipeError, match="out: missing"):
        read_recipe(file)
    with pytest.raises(RecipeError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")
    file.write_text("a: [")
    with pytest.raises(RecipeError, match="not YAML"):
        read_recipe(file)


@pytest.mark.parametrize("task", ["local", "align"])
def test_tasks_on_rendered_documents_start_from_a_checkpoint(task: str, file: Path):
    parts = ["checkpoint=null", "language_model=llama", "encoder={variant: atto}"]
    assert read_recipe(file, parts).checkpoint is None
    with pytest.raises(RecipeError, match=f"checkpoint: missing; task {task} starts from one"):
        read_recipe(file, [*parts, f"task={task}"])


def test_the_batch_must_divide(file: Path):
    recipe = read_recipe(file)
    assert (recipe.accumulation(1), recipe.accumulation(2), recipe.accumulation(4)) == (4, 2, 1)
    with pytest.raises(RecipeError, match=r"global_batch: 8 is not a multiple of 6, which 3 process"):
        recipe.accumulation(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["micro_batch=3"], "error: global_batch: 8 is not a multiple of 3"),
        (["warmup=0.1"], "error: warmup: unknown key; the nearest is warmup_ratio"),
        (["checkpoint=/nowhere/at/all"], "error: /nowhere/at/all: no such folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], message: str, file: Path):
    result = run_main("train", file, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert len(result.stderr.splitlines()) == 1


def test_parts_that_there_are_none_of_are_refused():
    check_parts(["projector", "fifth_stage", "encoder.stages.4", "encoder", "language_model"], 5, "mlp2x_gelu")
    for part, stages, projector, message in (
        ("fifth_stage", 4, "linear", "train: fifth_stage, but this encoder has 4 stages"),
        ("encoder.stages.4", 4, "linear", "encoder has 4 stages, the last is 3"),
        ("projector", 5, "identity", "the identity, which has no weights"),
    ):
        with pytest.raises(RecipeError, match=message):
            check_parts([part], stages, projector)


def test_the_closest_part_decides():
    fifth, third = "image_encoder.encoder.stages.4.blocks.0.gamma", "image_encoder.encoder.stages.2.downsample.0.weight"
    stem, head = "image_encoder.encoder.stem.0.weight", "decoder.lm_head.weight"
    parts = ["encoder", "encoder.stages.1", "encoder.stages.2", "fifth_stage"]
    assert part_of(fifth, parts) == "fifth_stage"
    assert part_of(fifth, parts[:3]) == part_of(third, parts) == "encoder.stages.2"
    assert part_of(stem, parts) == "encoder"
    assert part_of(stem, parts[1:]) is None
    assert part_of(head, parts) is None
    assert part_of(head, ["language_model"]) == "language_model"


def test_what_is_trained_of_the_released_shape_is_what_the_original_trains():
    """Against ConvNeXtCLIPVisionTower.make_layers_trainable_after_stage(2), on its own kind of module."""
    import torch
    from transformers import ConvNextConfig, ConvNextModel

    from train.model import ConvLLaVA, ConvNeXtEncoder, EncoderConfig, ImageEncoder, build_projector
    from train.model.names import timm_to_hf

    with torch.device("meta"):
        tower = ConvNextModel(
            ConvNextConfig(num_stages=5, depths=[3, 3, 27, 3, 6], hidden_sizes=[192, 384, 768, 1536, 3072])
        )
        config = EncoderConfig.from_variant("large", (6, 3072))
        images = ImageEncoder(ConvNeXtEncoder(config, device="meta"), build_projector("mlp2x_gelu", 3072, 4096))
        model = ConvLLaVA(images, torch.nn.Linear(1, 1))
    tower.requires_grad_(False)
    for stage in tower.encoder.stages[2:]:
        stage.requires_grad_(True)
    freeze_others(model, ["encoder.stages.2", "projector"])
    trained = {timm_to_hf(n) for n, p in model.image_encoder.encoder.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in tower.named_parameters() if p.requires_grad}
    assert all(parameter.requires_grad for parameter in model.image_encoder.projector.parameters())
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())


def test_a_run_may_go_on_with_other_harmless_keys_only(file: Path):
    old, new = read_recipe(file).to_dict(), read_recipe(file, ["log_every=7", "workers=0", "keep=5"]).to_dict()
    assert differences(old, new) == []
    changed = read_recipe(file, ["seed=1", "data=[{records: other.json}]"]).to_dict()
    assert differences(old, changed) == ["data", "seed"]


@pytest.mark.parametrize(
    ("stage", "train", "rate", "batch"),
    [
        (1, {"projector", "fifth_stage"}, 3e-4, 256),
        (2, {"encoder.stages.2", "fifth_stage", "projector", "language_model"}, 2e-5, 256),
        (3, {"projector", "language_model"}, 2e-5, 128),
    ],
)
def test_released_recipes(stage: int, train: set[str], rate: float, batch: int):
    recipe = read_recipe(RELEASED / f"stage{stage}.yaml")
    assert (set(recipe.train), recipe.learning_rate, recipe.global_batch) == (train, rate, batch)
    assert (recipe.epochs, recipe.warmup_ratio, recipe.weight_decay) == (1, 0.03, 0)
    assert recipe.learning_rates == {}
    assert recipe.accumulation(8) == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_recipes_of_the_demo_size_train_the_same_parts_in_the_same_way(stage: int):
    released, demo = (read_recipe(folder / f"stage{stage}.yaml") for folder in (RELEASED, RELEASED.parent / DEMO))
    for key in ("train", "learning_rate", "global_batch", "epochs", "warmup_ratio", "weight_decay"):
        assert getattr(demo, key) == getattr(released, key), key
    assert demo.learning_rates == {}
    # What is carried is a difference of rank 8 from SmolLM2, whichever stage it comes from
    assert demo.lora is None or (demo.lora.rank, demo.lora.base) == (8, f"build/{DEMO}")


@pytest.mark.parametrize("file", sorted((RELEASED.parent / DEMO).glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_of_the_demo_size_can_be_read(file: Path):
    recipe = read_recipe(file)
    assert recipe.out == f"build/runs/{DEMO}/{file.stem}"
    if curriculum := {"local": Local, "align": Alignment}.get(recipe.task):
        assert read_curriculum(curriculum, recipe, 64).phases


def test_released_recipes_follow_one_another():
    first, second, third = (read_recipe(RELEASED / f"stage{stage}.yaml") for stage in (1, 2, 3))
    assert first.encoder.fifth_stage == (6, 3072)
    assert (second.checkpoint, third.checkpoint) == (f"{first.out}/final", f"{second.out}/final")
    assert isinstance(first, Recipe)
    assert {(r.resolution, r.aspect, r.template, r.precision) for r in (first, second, third)} == {
        (768, "pad", "vicuna_v1", "bf16")
    }


def test_the_command_in_a_process_of_its_own(tmp_path):
    assert_one_line_error(run_module("train", tmp_path / "none.yaml"), "none.yaml")
