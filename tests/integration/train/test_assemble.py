"""A model put together from an encoder and a language model, as Hugging Face and timm have them."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import ConvNextConfig, ConvNextForImageClassification, LlamaConfig, LlamaForCausalLM

from train.__main__ import run_recipe
from train.assemble import Source
from train.errors import CheckpointError, RecipeError
from train.model import Checkpoint, load_model
from train.recipe import Encoder, Recipe, Records

DEPTHS, WIDTHS = [1, 1, 2, 1], [8, 12, 16, 20]
LANGUAGE = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}


@pytest.fixture
def llama(conformance: Path, tmp_path: Path) -> Path:
    """A Llama in bfloat16 with tied embeddings, in its Hub layout."""
    torch.manual_seed(1)
    config = LlamaConfig(**LANGUAGE, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(conformance / "checkpoint" / name, tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def convnext(tmp_path: Path) -> Path:
    """A Hugging Face ConvNeXt with its classifier; ImageNet's mean and std."""
    torch.manual_seed(2)
    config = ConvNextConfig(depths=DEPTHS, hidden_sizes=WIDTHS, layer_scale_init_value=0.5, num_labels=3)
    ConvNextForImageClassification(config).save_pretrained(tmp_path / "convnext")
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "convnext/preprocessor_config.json").write_text(json.dumps(statistics))
    return tmp_path / "convnext"


def recipe_for(llama: Path, encoder: Encoder, **keys) -> Recipe:
    keys = {"out": "unused", "train": ("projector",), "resolution": 128, "data": (Records("unused"),)} | keys
    keys = {"learning_rate": 0.01, "global_batch": 2, "micro_batch": 2, "steps": 2, "workers": 0} | keys
    return Recipe(language_model=str(llama), encoder=encoder, **keys)


def four_stages(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    x = model.stem(pixels)
    for stage in model.stages[:4]:
        x = stage(x)
    return x


def test_a_hugging_face_convnext_gets_a_fifth_stage(llama: Path, convnext: Path):
    source = Source.open(recipe_for(llama, Encoder(pretrained=str(convnext), fifth_stage=(2, 24))))
    assert (source.encoder_config.depths, source.encoder_config.widths) == ((*DEPTHS, 2), (*WIDTHS, 24))
    model = source.load()
    pixels = torch.randn(1, 3, 128, 192)
    with torch.inference_mode():
        tower = ConvNextForImageClassification.from_pretrained(convnext).eval().convnext
        expected = tower.encoder(tower.embeddings(pixels)).last_hidden_state
        found = four_stages(model.image_encoder.encoder, pixels)
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        assert model.image_encoder(pixels).shape == (1, 2 * 3, LANGUAGE["hidden_size"])
        ids = torch.arange(9)[None]
        expected = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)(ids).logits
        assert (model.decoder(ids).logits - expected).norm() <= 1e-5 * expected.norm()


def test_the_stages_of_the_original_run_one_after_the_other(llama: Path, convnext: Path, conformance: Path, tmp_path):
    """Parts, then the checkpoint of the first stage, then that of the second."""
    records = tmp_path / "records.json"
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    records.write_text(json.dumps([{"image": f"case{i}.png", "conversations": talk} for i in range(3)]))
    data = (Records(str(records), str(conformance)),)
    encoder = Encoder(pretrained=str(convnext), fifth_stage=(2, 24))
    first = recipe_for(llama, encoder, data=data, out=str(tmp_path / "1"), train=("projector", "fifth_stage"))
    run_recipe(first)
    opened = Checkpoint.open(tmp_path / "1/final")
    assert (opened.resolution, opened.encoder_config.stride) == (128, 64)
    assert opened.preprocessor["image_mean"] == [0.485, 0.456, 0.406]
    assert {t.dtype for t in load_file(tmp_path / "1/final/model.safetensors").values()} == {torch.bfloat16}
    language = load_file(llama / "model.safetensors")
    kept = load_file(tmp_path / "1/final/model.safetensors")
    assert all(torch.equal(kept[key], value) for key, value in language.items())

    keys = {"learning_rate": 0.01, "global_batch": 2, "micro_batch": 2, "steps": 2, "workers": 0, "data": data}
    parts = ("encoder.stages.2", "fifth_stage", "projector", "language_model")
    run_recipe(Recipe(out=str(tmp_path / "2"), checkpoint=str(tmp_path / "1/final"), train=parts, **keys))
    before, after = (load_model(tmp_path / stage / "final").state_dict() for stage in "12")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {
        n for n in before if n.startswith(("image_encoder.encoder.stem", "image_encoder.encoder.stages.0"))
    } | {n for n in before if n.startswith("image_encoder.encoder.stages.1")}


def test_a_timm_convnext_is_taken_with_its_weights_and_statistics(llama: Path, monkeypatch: pytest.MonkeyPatch):
    create = timm.create_model

    def without_network(name: str, pretrained: bool, **options):
        torch.manual_seed(3)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", without_network)
    source = Source.open(recipe_for(llama, Encoder(timm="convnext_atto", fifth_stage=(1, 32))))
    model, expected = source.load(), without_network("convnext_atto", False, num_classes=0)
    assert source.like.preprocessor["image_mean"] == [0.485, 0.456, 0.406]
    pixels = torch.randn(1, 3, 64, 128)
    with torch.inference_mode():
        found, wanted = four_stages(model.image_encoder.encoder, pixels), four_stages(expected, pixels)
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    with pytest.raises(CheckpointError, match=r"convnextv2_atto: .*it is not a plain ConvNeXt"):
        Source.open(recipe_for(llama, Encoder(timm="convnextv2_atto"))).load()


def test_a_variant_is_drawn_from_the_seed(llama: Path):
    states = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        source = Source.open(recipe_for(llama, Encoder(variant="atto", fifth_stage=(1, 32), layer_scale=0.5)))
        states.append(source.load().image_encoder.state_dict())
    assert states[0]["encoder.stages.4.blocks.0.gamma"].unique().tolist() == [0.5]
    name = "encoder.stages.4.blocks.0.conv_dw.weight"
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize(("given", "expected"), [(0.25, 0.25), (None, 0.5)])
def test_a_new_fifth_stage_has_the_layer_scale_of_the_recipe(llama: Path, convnext: Path, given, expected):
    """The four before it keep what they were trained to; without a word it begins as they did."""
    source = Source.open(recipe_for(llama, Encoder(pretrained=str(convnext), fifth_stage=(1, 24), layer_scale=given)))
    four, fifth = (source.load().image_encoder.encoder.stages[at].blocks[0].gamma for at in (0, 4))
    assert torch.equal(four, torch.full_like(four, 0.5))
    assert torch.equal(fifth, torch.full_like(fifth, expected))


def test_what_is_no_part_is_refused(llama: Path, convnext: Path, conformance: Path):
    five = conformance / "checkpoint/vision_tower"
    for encoder, message in (
        (Encoder(variant="huge"), "encoder.variant: unknown ConvNeXt 'huge'"),
        (Encoder(pretrained=str(five), fifth_stage=(1, 8)), "encoder.fifth_stage: .* has one already"),
        (Encoder(timm="vit_tiny_patch16_224"), "is a VisionTransformer, not a ConvNeXt"),
        (Encoder(timm="convnext_enormous"), "encoder.timm: convnext_enormous: "),
    ):
        with pytest.raises(RecipeError, match=message):
            Source.open(recipe_for(llama, encoder))
    with pytest.raises(CheckpointError, match="model_type is 'convnext', expected 'llama'"):
        Source.open(recipe_for(convnext, Encoder(variant="atto")))
    for there in (llama, llama / "nowhere"):  # its name is looked at before the model
        with pytest.raises(RecipeError, match="projector: unknown projector 'mlp'"):
            Source.open(recipe_for(there, Encoder(variant="atto"), projector="mlp"))
