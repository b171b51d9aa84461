"""Training on conversations, on the tiny conformance checkpoint: its loss, its parts, its interruptions."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.integration.conformance.test_model import CASES, EOS, assert_close
from tests.support.commands import ROOT, run_main
from tests.support.training import ALL, assert_near, assert_same, losses, recipe, records, train, trained, weights
from train import conversations, loop
from train.conversations import AnswerLoss, ConversationTask, is_cheaper_joined
from train.data.collate import collate
from train.data.dataset import Conversation
from train.distributed import World
from train.errors import RecipeError
from train.lora import add_lora, go_on_from, merge_lora
from train.model import IGNORE_INDEX, Checkpoint, ConvLLaVA, load_language_state, load_model
from train.model.low_rank import factors
from train.recipe import Lora, read_recipe
from train.types import Loss, Skipped

__all__ = ["recipe", "records"]  # fixtures

ALONE = World(0, 1, torch.device("cpu"))


# The loss


@pytest.fixture(scope="module")
def model(conformance: Path) -> ConvLLaVA:
    return load_model(conformance / "checkpoint")


@pytest.fixture(scope="module")
def cases(conformance: Path) -> list[dict[str, Tensor]]:
    found = []
    for number in CASES:
        with np.load(conformance / f"case{number}.npz") as arrays:
            found.append({name: torch.from_numpy(arrays[name]) for name in arrays})
    return found


def conversation_of(case: dict[str, Tensor]) -> Conversation:
    return Conversation(case["train_input_ids"], case["train_labels"], [case["pixel_values"]], 0)


@torch.inference_mode()
def test_the_loss_of_each_case_is_the_originals(model: ConvLLaVA, cases: list[dict]):
    for case in cases:
        total, count = AnswerLoss(model)([conversation_of(case)])
        assert_close(total / count, case["train_loss"])


@torch.inference_mode()
def test_the_loss_of_a_batch_is_the_sum_of_its_conversations(model: ConvLLaVA, cases: list[dict]):
    """Of different lengths and image sizes, with several images, without any, and one longer than the rest."""
    wide = cases[0]["pixel_values"][:, :, :192].contiguous()
    text = cases[1]["train_input_ids"][cases[1]["train_input_ids"] >= 0]
    labels = text.clone()
    labels[:60] = IGNORE_INDEX
    two = torch.cat([cases[2]["train_input_ids"][:45], cases[2]["train_input_ids"]])
    two[10] = -200
    two_labels = two.clone()
    two_labels[:100] = IGNORE_INDEX
    batch = [conversation_of(case) for case in cases] + [
        Conversation(text, labels, [], 0),
        Conversation(two, two_labels, [wide, cases[2]["pixel_values"]], 0),
    ]
    total, count = AnswerLoss(model)(batch)
    singles = [model(item.input_ids, item.images, item.labels)[1] for item in batch]
    counts = [int((item.labels[1:] != IGNORE_INDEX).sum()) for item in batch]
    assert count == sum(counts)
    assert_close(total, sum(loss * n for loss, n in zip(singles, counts, strict=True)))


@pytest.mark.parametrize("together", [True, False])
def test_joined_conversations_have_the_loss_and_the_gradients_of_each_alone(
    together: bool, model: ConvLLaVA, cases: list[dict], monkeypatch
):
    """One behind the other as side by side, whichever costs less."""
    monkeypatch.setattr(conversations, "is_cheaper_joined", lambda lengths, config: together)
    batch = [conversation_of(case) for case in cases]
    weights = [model.image_encoder.projector[0].weight, model.decoder.model.layers[0].self_attn.k_proj.weight]
    total, count = AnswerLoss(model)(batch)
    found = torch.autograd.grad(total, weights)
    each = [AnswerLoss(model)([conversation]) for conversation in batch]
    assert count == sum(count for _, count in each)
    alone = sum(total for total, _ in each)
    torch.testing.assert_close(total, alone, rtol=1e-5, atol=0)
    for gradient, expected in zip(found, torch.autograd.grad(alone, weights), strict=True):
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_what_is_cheaper_is_by_padding_and_by_attention(model: ConvLLaVA):
    config = model.decoder.config
    assert not is_cheaper_joined([50, 50, 50], config), "nothing is padded"
    assert is_cheaper_joined([10, 10, 10, 100], config)
    assert not is_cheaper_joined([5000] * 8 + [6000], config), "attention between them would cost more"


def test_an_empty_batch_adds_nothing(model: ConvLLaVA):
    total, count = AnswerLoss(model)([])
    assert (float(total.detach()), count) == (0.0, 0)


def test_batches_count_what_they_hold(cases: list[dict]):
    items = [Conversation(c["train_input_ids"], c["train_labels"], [c["pixel_values"]], 108) for c in cases]
    batch = collate([*items, Skipped("x", "y")])
    assert (batch.samples, batch.images, batch.tokens, len(batch.skipped)) == (3, 3, 324, 1)


def gradients_of(task: ConversationTask, world: World = ALONE) -> dict[str, Tensor]:
    loop.place(task.model, task._recipe, world, torch.float32)
    for batch in next(task.steps(1, 2)):
        loss: Loss = task.loss(batch)
        loss.sum.backward()
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(recipe):
    plain = gradients_of(ConversationTask(read_recipe(recipe()), ALONE))
    saving = ConversationTask(read_recipe(recipe(gradient_checkpointing=True)), ALONE)
    assert saving.model.model.decoder.is_gradient_checkpointing
    assert all(stage.grad_checkpointing for stage in saving.model.model.image_encoder.encoder.stages)
    assert_near(gradients_of(saving), plain, 1e-6)


def test_gradient_checkpointing_in_bfloat16(recipe):
    plain, saving = (
        ConversationTask(read_recipe(recipe(gradient_checkpointing=on, precision="bf16")), ALONE)
        for on in (False, True)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(gradients_of(saving), gradients_of(plain), 0.02)


# Whole runs


@pytest.fixture(scope="module")
def zero_steps(conformance: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("zero") / "run"
    data = f"[{{records: {records}, images: {conformance}}}]"
    file = out.with_name("zero.yaml")
    file.write_text(
        f"{{out: {out}, checkpoint: {conformance / 'checkpoint'}, train: [projector, language_model], data: {data}, "
        "steps: 0, learning_rate: 1.0, global_batch: 2, micro_batch: 2, workers: 0}"
    )
    return train(file) / "final"


@torch.inference_mode()
def test_no_step_leaves_the_model_conformant(zero_steps: Path, cases: list[dict], reference: dict, conformance: Path):
    again = load_model(zero_steps)
    for case in cases:
        assert_close(again.image_encoder.encoder(case["pixel_values"][None])[0], case["encoder_features"])
        assert_close(again.image_encoder(case["pixel_values"][None])[0], case["image_embeds"])
        assert_close(again(case["input_ids"], [case["pixel_values"]])[0][-1], case["last_logits"])
        ids = again.generate(case["input_ids"], [case["pixel_values"]], reference["max_new_tokens"], EOS)
        assert ids == case["generated_ids"].tolist()
    assert_same(again.state_dict(), load_model(conformance / "checkpoint").state_dict())
    assert Checkpoint.open(zero_steps).config == Checkpoint.open(conformance / "checkpoint").config


def test_a_finished_run_is_left_alone(zero_steps: Path, capsys):
    before = (zero_steps / "model.safetensors").stat().st_mtime_ns
    train(zero_steps.parent.with_name("zero.yaml"))
    assert f"{zero_steps}: this run has finished" in capsys.readouterr().out
    assert (zero_steps / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def start(conformance: Path) -> dict[str, Tensor]:
    """The conformance checkpoint as `weights` reads them, whose files are not safetensors."""
    tower = torch.load(conformance / "checkpoint/vision_tower/pytorch_model.bin", weights_only=True)
    return torch.load(conformance / "checkpoint/pytorch_model.bin", weights_only=True) | {
        f"tower.{key}": value for key, value in tower.items()
    }


@pytest.mark.parametrize(
    ("parts", "changed"),
    [
        (["projector"], ["model.mm_projector."]),
        (["fifth_stage"], ["tower.encoder.stages.4."]),
        (["encoder.stages.3"], ["tower.encoder.stages.3.", "tower.encoder.stages.4."]),
        (["encoder"], ["tower."]),
        (["language_model"], ["model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."]),
    ],
    ids=lambda value: value[0] if value[0] in (*ALL, "fifth_stage", "encoder.stages.3") else "",
)
def test_what_is_trained_changes_and_nothing_else(parts: list[str], changed: list[str], recipe, start):
    out = train(recipe(train=parts, steps=3, learning_rate=0.03))
    final = weights(out / "final")
    assert final.keys() == {key for key in start if not key.startswith("tower.layernorm.")}
    for key, value in final.items():
        assert torch.equal(value, start[key]) != key.startswith(tuple(changed)), key


def test_parts_have_their_own_learning_rates(recipe):
    rates = {"projector": 1e-4, "encoder.stages.2": 1e-5}
    file = recipe(train=["projector", "encoder.stages.2", "language_model"], learning_rates=rates, weight_decay=0.1)
    task = ConversationTask(read_recipe(file), ALONE)
    names = {id(parameter): name for name, parameter in task.model.model.named_parameters()}
    for group in task.parameter_groups():
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            rate = 1e-4 if "projector" in name else 1e-5 if "encoder.stages" in name else 1e-3
            assert (group["lr"], group["weight_decay"]) == (rate, 0.1 if parameter.ndim > 1 else 0.0), name
    assert set(names.values()) == {n for n, p in task.model.model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("aspect", ["pad", "any"])
def test_the_cut_into_micro_batches_changes_nothing(aspect: str, recipe):
    whole = train(recipe("whole", micro_batch=4, aspect=aspect))
    cut = train(recipe("cut", micro_batch=1, aspect=aspect))
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(whole)[-1] < losses(whole)[0]
    assert_near(trained(cut), trained(whole), 1e-3)


def test_bfloat16_keeps_float32_weights_and_follows_float32(recipe):
    full, half = train(recipe("full")), train(recipe("half", precision="bf16"))
    assert losses(half) == pytest.approx(losses(full), rel=0.03)
    assert losses(half) != losses(full)
    assert {tensor.dtype for tensor in trained(half).values()} == {torch.float32}


def test_resolution_and_template_are_written_for_whoever_uses_the_checkpoint(recipe):
    out = train(recipe(steps=1, resolution=320, template="plain", train=["projector"], malformed_limit=100))
    checkpoint = Checkpoint.open(out / "final")
    assert checkpoint.resolution == 320
    assert checkpoint.config["conversation_template"] == "plain"
    assert checkpoint.preprocessor["crop_size"] == {"height": 320, "width": 320}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train": ["fifth_stag"]}, "unknown part fifth_stag; the nearest is fifth_stage"),
        ({"resolution": 300}, "resolution: 300 is not a multiple of 64; try 256 or 320"),
        ({"data": [{"records": "any", "resolution": 100}]}, "resolution: 100 is not a multiple of 64; try 64 or 128"),
        ({"attention": "flash_attention_2"}, "needs the package flash_attn, a GPU"),
        ({"train": ["language_model"], "lora": {"targets": ["nothing"]}}, "lora.targets: .*nothing"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(keys: dict, message: str, recipe):
    with pytest.raises(RecipeError, match=message):
        train(recipe(**keys))


def test_too_little_tolerance_for_malformed_records(recipe):
    result = run_main("train", recipe(malformed_limit=0))
    assert result.returncode == 2
    assert "error: 1 malformed records, more than malformed_limit (0)" in result.stderr
    assert "Traceback" not in result.stderr


# Adapters


def test_adapters_are_merged_as_peft_merges_them(model: ConvLLaVA):
    lora = Lora(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "down_proj"))
    ours, theirs = copy.deepcopy(model.decoder), copy.deepcopy(model.decoder)
    add_lora(ours, lora)
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=6, target_modules=list(lora.targets)))
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad
    }
    torch.manual_seed(0)
    state = ours.state_dict()
    for name in state:
        if "lora_" in name:
            state[name].copy_(torch.randn_like(state[name]) * 0.1)
    theirs.load_state_dict({f"base_model.model.{name}": tensor for name, tensor in state.items()})
    expected = theirs.merge_and_unload().state_dict()
    merged = merge_lora(state, lora)
    assert_near(merged, expected, 1e-6)
    changed = [name for name in merged if not torch.equal(merged[name], model.decoder.state_dict()[name])]
    assert len(changed) == 2 * model.decoder.config.num_hidden_layers


@pytest.mark.parametrize(("precision", "fsdp"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_a_run_with_adapters_saves_merged_weights(precision, fsdp, recipe, start):
    """What is frozen is saved as it was, although it is kept in bfloat16 while that is what is computed in."""
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}
    keys = {"learning_rate": 0.03, "precision": precision, "fsdp": fsdp}
    out = train(recipe(train=["projector", "language_model"], lora=lora, **keys))
    final = weights(out / "final")
    assert final.keys() == {key for key in start if not key.startswith("tower.layernorm.")}
    changed = {key for key in final if not torch.equal(final[key], start[key])}
    assert all("q_proj" in key or "v_proj" in key or "mm_projector" in key for key in changed)
    assert len(changed) == 2 * 3 + 4
    assert all("lora_" in key or "projector" in key for key in trained(out))
    load_model(out / "final")


def test_adapters_go_on_on_the_weights_below_them(model: ConvLLaVA):
    lora = Lora(rank=4, alpha=6.0, dropout=0.0, targets=("q_proj", "down_proj"))
    base = {name: weight.clone() for name, weight in model.decoder.state_dict().items()}
    before, after = copy.deepcopy(model.decoder), copy.deepcopy(model.decoder)
    add_lora(before, lora)
    torch.manual_seed(0)
    for name, parameter in before.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    trained = merge_lora(before.state_dict(), lora)
    after.load_state_dict(trained)
    add_lora(after, lora)
    go_on_from(after, base, lora)
    state = after.state_dict()
    for name, weight in state.items():
        if "base_layer" in name:
            assert torch.equal(weight, base[name.replace(".base_layer.", ".")])
    assert_near(merge_lora(state, lora), trained, 1e-5)
    for rank, targets, message in ((2, lora.targets, "rank 2"), (4, ("q_proj",), "down_proj differs")):
        other, given = copy.deepcopy(model.decoder), Lora(rank, 6.0, 0.0, targets)
        other.load_state_dict(trained)
        add_lora(other, given)
        with pytest.raises(RecipeError, match=f"lora.base: .*{message}"):
            go_on_from(other, base, given)


def test_a_run_goes_on_with_the_adapters_of_another(recipe, conformance):
    """What two runs have changed, one after the other, has the rank of one's adapters."""
    lora = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["q_proj"]}
    keys = {"train": ["language_model"], "learning_rate": 0.01, "steps": 2}
    first = train(recipe(out="first", lora=lora, **keys))
    base = str(conformance / "checkpoint")
    keys |= {"checkpoint": str(first / "final"), "seed": 1}
    second = train(recipe(out="second", lora=lora | {"base": base}, **keys))
    anew = train(recipe(out="anew", lora=lora, **keys))

    def language(folder) -> dict[str, Tensor]:
        return load_language_state(Checkpoint.open(Path(folder)), torch.float32)

    before, between, after = language(base), language(first / "final"), language(second / "final")
    changed = [name for name in before if not torch.equal(between[name], after[name])]
    assert len(changed) == 3
    assert all("q_proj" in name for name in changed)
    beyond = factors(before, after, 2)[1]  # but for what saving in float16 rounds away
    assert beyond < 0.05
    assert factors(before, language(anew / "final"), 2)[1] > 3 * beyond


# Interruptions

KILLED = """
import os, signal, sys
from train import __main__, loop, state

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where, steps = sys.argv[1], int(sys.argv[2])
if where == "step":
    original, done = loop.train_step, []
    def train_step(*arguments):
        if len(done) == steps:
            die()
        done.append(1)
        return original(*arguments)
    loop.train_step = train_step
else:
    original, saved = state._publish, []
    def publish(*arguments):
        saved.append(1)
        if len(saved) == steps:
            die()
        return original(*arguments)
    state._publish = publish
sys.argv = ["train", *sys.argv[3:]]
__main__.main()
"""


def killed(where: str, steps: int, file: Path) -> None:
    """Train in another process, which kills itself after some steps, or before its n-th checkpoint has its name."""
    command = [sys.executable, "-c", KILLED, where, str(steps), str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ.copy())
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_a_killed_run_goes_on_to_the_same_weights(recipe):
    """Killed in a step, again while it saves, and then left to finish; with dropout, adapters and a reading process."""
    keys = {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.3}, "workers": 1, "epochs": 2.5, "steps": None}
    whole, file = train(recipe("whole", **keys)), recipe("killed", **keys)
    stopped = whole.with_name("killed")
    killed("step", 5, file)
    assert sorted(path.name for path in stopped.glob("step-*")) == ["step-000002", "step-000004"]
    killed("save", 1, file)
    assert (stopped / "step-000006.partial").is_dir()
    (stopped / "step-000001.partial").mkdir()
    result = run_main("train", file)
    assert result.returncode == 0, result.stderr
    assert f"resuming from {stopped / 'step-000004'}" in result.stdout
    assert losses(stopped) == losses(whole)
    assert len(losses(whole)) == 10  # 2.5 epochs of 4 batches: 14 records, the last batch of two
    assert_same(trained(stopped), trained(whole))
    assert_same(weights(stopped / "final"), weights(whole / "final"))
    assert not list(stopped.glob("*.partial"))


def test_another_recipe_in_the_same_folder_is_refused(recipe):
    train(recipe(steps=1))
    with pytest.raises(RecipeError, match="holds a run of a recipe with other learning_rate, seed;"):
        train(recipe(steps=1, learning_rate=1e-5, seed=3, log_every=2))
