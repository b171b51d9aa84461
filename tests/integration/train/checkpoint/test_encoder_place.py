"""Where a checkpoint's encoder lies."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest

from tests.support.checkpoints import (
    STAGE5,
    TOWER,
    Parts,
    assert_bit_equal,
    assert_same_logits,
    edit_json,
    elsewhere,
    refusal,
    rewrite,
    stored,
)
from train.model import (
    Checkpoint,
    load_image_encoder,
    load_model,
    save_checkpoint,
)


@pytest.mark.parametrize("name", [..., "/home/author/stage2/vision_tower", "author/encoder", "~nobody/encoder"])
def test_encoder_inside_needs_no_right_name(name: str, folder: Path, parts: Parts):
    edit_json(folder / "config.json", mm_vision_tower=name)
    assert Checkpoint.open(folder).vision_folder == folder / "vision_tower"
    assert_same_logits(folder, parts)


def test_encoder_inside_comes_before_another_that_is_named(folder: Path, parts: Parts, tmp_path: Path):
    """A freshly trained checkpoint still names the encoder that its training began with."""
    shutil.copytree(folder / "vision_tower", tmp_path / "before")
    rewrite(tmp_path / "before", lambda state: state[STAGE5].zero_())
    edit_json(folder / "config.json", mm_vision_tower=str(tmp_path / "before"))
    assert_same_logits(folder, parts)


def test_encoder_is_found_by_a_path(folder: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside = elsewhere(folder, folder / "encoder", "encoder")
    assert Checkpoint.open(folder).vision_folder == inside
    beside = tmp_path / "encoder"
    inside.rename(beside)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (str(beside), "~/encoder", "../encoder"):
        edit_json(folder / "config.json", mm_vision_tower=name)
        assert Checkpoint.open(folder).vision_folder.resolve() == beside
        assert_same_logits(folder, parts)
    monkeypatch.chdir(tmp_path)
    edit_json(folder / "config.json", mm_vision_tower="./encoder")
    assert_same_logits(folder, parts)


def test_hub_ids_are_downloaded(folder: Path, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = {"author/model": folder, "author/encoder": elsewhere(folder, tmp_path / "cache", "author/encoder")}
    asked = {}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(hub[repo_id])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = Checkpoint.open("author/model")
    assert (checkpoint.folder, checkpoint.vision_folder) == (folder, tmp_path / "cache")
    assert asked.keys() == hub.keys()
    files = ["config.json", "tokenizer.model", "model-00001-of-00002.safetensors", "vision_tower/pytorch_model.bin"]
    for patterns in asked.values():
        assert set(files) == set(huggingface_hub.utils.filter_repo_objects([*files, "a.png"], allow_patterns=patterns))
    assert_same_logits("author/model", parts)


def test_hub_failures_name_the_id_and_its_source(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def snapshot_download(repo_id: str, **_: object) -> str:
        raise OSError("404 Client Error\nmore than anyone wants to know")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = refusal(lambda: Checkpoint.open("author/model"))
    assert message == "author/model: no such folder, and the Hub gave none: 404 Client Error"
    elsewhere(folder, tmp_path / "moved", "author/encoder")
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder / 'config.json'}: mm_vision_tower: author/encoder: no such folder")
    assert str(folder / "vision_tower") in message


@pytest.mark.parametrize("source", ["/nowhere/checkpoint", "./checkpoint", "../checkpoint", "~/no/such/checkpoint"])
def test_paths_are_not_asked_of_the_hub(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert refusal(lambda: Checkpoint.open(source)).startswith(f"{source}: no such folder, and not a Hub id")


def test_encoder_nowhere_is_an_error(folder: Path):
    shutil.rmtree(folder / "vision_tower")
    edit_json(folder / "config.json", mm_vision_tower=...)
    message = refusal(lambda: Checkpoint.open(folder))
    assert message.startswith(f"{folder}: no vision_tower/config.json inside and no mm_vision_tower in config.json")


def test_encoder_weights_in_the_main_file_are_read(folder: Path, parts: Parts, tmp_path: Path):
    (folder / "vision_tower" / "model.safetensors").unlink()
    inside = {TOWER + key: value for key, value in parts.tower.state_dict().items()}
    rewrite(folder, lambda state: state.update(inside))
    assert_same_logits(folder, parts)
    save_checkpoint(load_model(folder), Checkpoint.open(folder), tmp_path / "saved")
    assert_bit_equal(stored(tmp_path / "saved" / "vision_tower"), parts.tower_state())
    assert_bit_equal(stored(tmp_path / "saved"), parts.main_state())


def test_folders_encoder_weights_count_where_both_places_have_some(folder: Path, parts: Parts):
    other = {TOWER + key: value + 1 for key, value in parts.tower_state().items()}
    rewrite(folder, lambda state: state.update(other))
    assert_same_logits(folder, parts)


def test_no_encoder_weights_is_one_error(folder: Path):
    (folder / "vision_tower" / "model.safetensors").unlink()
    message = refusal(lambda: load_image_encoder(Checkpoint.open(folder)))
    assert message.startswith(f"{folder / 'vision_tower'}: no encoder weights, expected model.safetensors")
    assert str(folder) in message.split("or keys model.vision_tower.*")[1]
