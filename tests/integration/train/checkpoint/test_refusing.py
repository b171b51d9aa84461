"""What is no checkpoint, and what is said of it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import (
    HIDDEN,
    PROJECTOR,
    QUERY,
    STAGE5,
    TIED,
    TOWER,
    VOCABULARY,
    WIDTHS,
    Parts,
    assert_same_logits,
    edit_json,
    refusal,
    rewrite,
    write_bin,
    write_json,
    write_old_bin,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
    write_shards,
)
from tests.support.commands import assert_one_line_error, run_main
from train.model import (
    Checkpoint,
    load_language_state,
    load_model,
)


def check_problem(message: str, file: Path, key: str, expected: object, found: object) -> None:
    """The problem's own clause names its file, the key as stored, and both shapes."""
    (clause,) = [clause for clause in message.split("; ") if key in clause]
    assert clause.startswith(f"{file}: ")
    assert re.search(rf"\b{re.escape(key)}: expected (shape )?{re.escape(str(expected))}, found ", clause)
    assert re.search(rf", found (shape )?{re.escape(str(found))}(?= \(do|$)", clause)


PLACES = {  # place of the weights -> (folder, key, its shape)
    "language": ("", QUERY, (HIDDEN, HIDDEN)),
    "projector": ("", PROJECTOR, (HIDDEN, HIDDEN)),
    "encoder": ("vision_tower", STAGE5, (80, 20)),
    "encoder-in-main": ("", TOWER + STAGE5, (80, 20)),
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, folder: Path, parts: Parts) -> tuple[Path, str, tuple[int, ...]]:
    if request.param == "encoder-in-main":
        (folder / "vision_tower" / "model.safetensors").unlink()
        rewrite(folder, lambda state: state.update({TOWER + k: v for k, v in parts.tower_state().items()}))
    where, key, shape = PLACES[request.param]
    return folder / where, key, shape


def test_missing_key_is_named(place: tuple, folder: Path):
    where, key, shape = place
    rewrite(where, lambda state: state.pop(key))
    message = refusal(lambda: load_model(folder))
    check_problem(message, where / "model.safetensors", key, shape, "none")
    assert "missing key" in message
    assert message.endswith("(do these weights and their config.json belong together?)")


def test_wrong_shape_is_named(place: tuple, folder: Path):
    where, key, shape = place
    rewrite(where, lambda state: state.update({key: torch.zeros(7, 3)}))
    message = refusal(lambda: load_model(folder))
    check_problem(message, where / "model.safetensors", key, shape, (7, 3))
    assert "wrong shape" in message
    assert "missing" not in message


@pytest.mark.parametrize(
    "where, key",
    [
        ("", "model.layers.2.mlp.up_proj.weight"),
        ("", "model.image_newline"),
        ("", "model.mm_projector.4.weight"),
        ("vision_tower", "encoder.stages.4.layers.2.dwconv.weight"),
        ("vision_tower", "classifier.weight"),
        ("vision_tower", "stem.0.weight"),  # timm's name has no place in the layout
    ],
)
def test_unexpected_key_is_named_as_it_is_stored(where: str, key: str, folder: Path):
    rewrite(folder / where, lambda state: state.update({key: torch.zeros(7, 3)}))
    message = refusal(lambda: load_model(folder))
    check_problem(message, folder / where / "model.safetensors", key, "none", (7, 3))
    assert "unexpected key" in message


def test_wrong_pooler_norm_is_named(folder: Path):
    rewrite(folder / "vision_tower", lambda state: state.update({"layernorm.bias": torch.ones(7)}))
    message = refusal(lambda: load_model(folder))
    check_problem(message, folder / "vision_tower" / "model.safetensors", "layernorm.bias", "(16,) or (20,)", "(7,)")


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("rows", [VOCABULARY - 1, VOCABULARY + 1])
def test_rows_unlike_the_vocabulary_are_named(key: str, rows: int, folder: Path):
    rewrite(folder, lambda state: state.update({key: torch.zeros(rows, HIDDEN)}))
    message = refusal(lambda: load_model(folder))
    assert f"wrong shape of {key}: expected {(VOCABULARY, HIDDEN)}, found {(rows, HIDDEN)} ({rows} rows" in message
    assert f"where vocab_size in config.json is {VOCABULARY})" in message


@pytest.mark.parametrize("name, write", [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)])
def test_the_shard_at_fault_is_named(name: str, write: Callable, parts: Parts, tmp_path: Path):
    folder = parts.write(tmp_path / "checkpoint", lambda state, to: write_shards(state, to, name, write))
    index = folder / f"{name}.index.json"
    shard = folder / json.loads(index.read_text())["weight_map"][QUERY]
    state = load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard)
    write({key: value for key, value in state.items() if key != QUERY}, shard)
    message = refusal(lambda: load_language_state(Checkpoint.open(folder)))
    check_problem(message, shard, QUERY, (HIDDEN, HIDDEN), "none")

    left = {key: file for key, file in json.loads(index.read_text())["weight_map"].items() if key != QUERY}
    edit_json(index, weight_map=left)
    message = refusal(lambda: load_language_state(Checkpoint.open(folder)))
    check_problem(message, index, QUERY, (HIDDEN, HIDDEN), "none")


@pytest.mark.parametrize("write", [write_sharded_bin, write_sharded_safetensors])
def test_an_absent_shard_is_named(write: Callable, parts: Parts, tmp_path: Path):
    folder = parts.write(tmp_path / "checkpoint", write)
    (index,) = folder.glob("*.index.json")
    shard = folder / json.loads(index.read_text())["weight_map"][QUERY]
    shard.unlink()
    message = refusal(lambda: load_model(folder))
    assert message == f"{shard}: no such file, but {index} names it; is the download complete?"


def test_many_problems_are_counted(folder: Path):
    edit_json(folder / "config.json", num_hidden_layers=3)
    message = refusal(lambda: load_language_state(Checkpoint.open(folder)))
    assert message.count("missing key model.layers.2.") == 5
    assert "; and 4 more (do" in message


def test_untied_head_is_missed(tmp_path: Path):
    parts = Parts(**TIED)
    folder = parts.write(tmp_path / "checkpoint")
    edit_json(folder / "config.json", tie_word_embeddings=False)
    message = refusal(lambda: load_model(folder))
    check_problem(message, folder / "model.safetensors", "lm_head.weight", (VOCABULARY, HIDDEN), "none")


def test_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path):
    """transformers 4 would silently drop one that differs, transformers 5 would use it."""
    parts = Parts(**TIED)
    folder = parts.write(tmp_path / "checkpoint")
    rewrite(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    assert_same_logits(folder, parts)
    assert "lm_head.weight" not in load_language_state(Checkpoint.open(folder))
    rewrite(folder, lambda state: state["lm_head.weight"].mul_(2))
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{folder / 'model.safetensors'}: lm_head.weight differs from model.embed_tokens.weight")
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("name", ["config.json", "vision_tower/config.json", "vision_tower/preprocessor_config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]"], ids=["cut off", "not UTF-8", "a list"])
def test_corrupt_json_is_named(name: str, content: bytes, folder: Path):
    (folder / name).write_bytes(content)
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder / name}: ")
    assert "JSON" in message


def test_missing_json_is_named(folder: Path):
    (folder / "config.json").unlink()
    assert refusal(lambda: Checkpoint.open(folder)).startswith(f"{folder / 'config.json'}: no such file")


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {QUERY: 3}}])
def test_corrupt_index_is_named(index: dict, folder: Path):
    (folder / "model.safetensors").unlink()
    file = folder / "model.safetensors.index.json"
    write_json(file, index)
    assert refusal(lambda: load_model(folder)).startswith(f"{file}: no weight_map")


def test_missing_weights_are_named(folder: Path):
    (folder / "model.safetensors").unlink()
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{folder}: no weights, expected model.safetensors, pytorch_model.bin or shards")


@pytest.mark.parametrize("write", [write_safetensors, write_bin, write_old_bin])
@pytest.mark.parametrize("keep", [0, 3, 0.5])
def test_cut_off_weights_are_named(write: Callable, keep: float, parts: Parts, tmp_path: Path):
    folder = parts.write(tmp_path / "checkpoint", write)
    (file,) = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{file}: cannot be read as ")
    assert message.endswith("is the download complete?")
    assert "\n" not in message
    assert "weights_only" not in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointer_in_place_of_weights_is_named(name: str, folder: Path):
    """What a clone without Git LFS has."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13476835328\n")
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{folder / name}: cannot be read as ")
    assert message.endswith("is the download complete?")
    assert "weights_only" not in message


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("config", [True, False], ids=["LLaVA's folder", "peft's folder"])
@pytest.mark.parametrize("whole", [True, False], ids=["beside a model", "alone"])
def test_adapters_are_no_model(weights: str, config: bool, whole: bool, folder: Path):
    """Beside a whole model too: transformers would add them, and here they would count for nothing."""
    if not whole:
        (folder / "model.safetensors").unlink()
    if not config:
        (folder / "config.json").unlink()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "lmsys/vicuna-7b-v1.5", "r": 128})
    for name in (weights, "non_lora_trainables.bin"):
        (folder / name).touch()
    assert refusal(lambda: Checkpoint.open(folder)) == (
        f"{folder}: LoRA adapters (adapter_config.json, {weights}, non_lora_trainables.bin), no whole model; merge "
        "them into their base model lmsys/vicuna-7b-v1.5 (peft's merge_and_unload, LLaVA's merge_lora_weights.py) and "
        "give the result"
    )


def test_adapters_whose_base_is_not_named(folder: Path):
    write_json(folder / "adapter_config.json", {})
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder}: LoRA adapters (adapter_config.json), no whole model")
    assert "into their base model (peft" in message


@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
def test_a_projector_is_no_model(name: str, folder: Path):
    (folder / name).touch()
    Checkpoint.open(folder)  # beside a model it is nothing
    (folder / "model.safetensors").unlink()
    assert refusal(lambda: Checkpoint.open(folder)).startswith(f"{folder}: a projector ({name}), no whole model; give ")


@pytest.mark.parametrize("kind", ["adapter", "projector"])
def test_parts_are_no_language_model_to_train(kind: str, folder: Path, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    edit_json(folder / "config.json", model_type="llama")
    write_json(folder / ("adapter_config.json" if kind == "adapter" else "mm_projector.bin"), {})
    recipe = {"out": str(tmp_path / "run"), "language_model": str(folder), "encoder": {"variant": "tiny"}}
    recipe |= {"projector": "linear", "train": ["projector"], "steps": 1, "learning_rate": 1e-3}
    recipe |= {"global_batch": 1, "micro_batch": 1, "data": [{"records": str(tmp_path / "none.json")}]}
    write_json(tmp_path / "recipe.yaml", recipe)
    assert_one_line_error(run_main("train", tmp_path / "recipe.yaml"), folder, kind, "no whole model")


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(zipped: bool, folder: Path, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save({QUERY: Trap(tmp_path / "sprung")}, file, _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{file}: refused: its pickle asks for ")
    assert "safetensors" in message
    assert "weights_only" not in message  # torch's advice is to run the code
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content, told",
    [
        ([torch.zeros(1)], "holds a list"),
        ({"state_dict": {QUERY: torch.zeros(1)}}, "'state_dict' is a dict"),
        ({3: torch.zeros(1)}, "3 is a Tensor"),
    ],
)
def test_bin_without_a_dictionary_of_tensors_is_refused(content: object, told: str, folder: Path):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    message = refusal(lambda: load_model(folder))
    assert message == f"{folder / 'pytorch_model.bin'}: {told}, expected a dictionary of tensors"


@pytest.mark.parametrize("model_type", ["llava_mistral", "llama", ...])
def test_other_models_are_refused(model_type: str, folder: Path):
    """A Mistral's keys are a Llama's: nothing later would tell."""
    edit_json(folder / "config.json", model_type=model_type)
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder / 'config.json'}: model_type is ")
    assert "expected 'llava_llama'" in message


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model_type": "convnextv2"}, "model_type is 'convnextv2', expected 'convnext'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
        ({"num_channels": 4}, "num_channels is 4, expected 3"),
        ({"patch_size": 8}, "patch_size is 8, expected 4"),
        ({"num_stages": 4}, "num_stages is 4, but depths are [1, 1, 2, 1, 2]"),
        ({"depths": ...}, "no key 'depths'"),
        ({"hidden_sizes": WIDTHS[:4]}, "a depth and a width each"),
        ({"hidden_sizes": None}, "hidden_sizes is None, expected a list of whole numbers above 0"),
    ],
)
def test_other_encoders_are_refused(change: dict, told: str, folder: Path):
    file = folder / "vision_tower" / "config.json"
    edit_json(file, **change)
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{file}: ")
    assert told in message


@pytest.mark.parametrize(
    "change, told",
    [
        ({"mm_projector_type": "resampler"}, "mm_projector_type: unknown projector 'resampler'"),
        ({"mm_projector_type": "identity"}, f"'identity' cannot turn {WIDTHS[-1]} features into {HIDDEN}"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "spiral"),
        ({"hidden_act": "swoosh"}, "swoosh"),
        ({"hidden_size": "wide"}, "int"),
        ({"rope_parameters": [1]}, "not a Llama's configuration"),
    ],
)
def test_impossible_configurations_are_named(change: dict, told: str, folder: Path):
    edit_json(folder / "config.json", **change)
    message = refusal(lambda: load_model(folder))
    assert message.startswith(f"{folder / 'config.json'}: ")
    assert told in message
