"""The encoder against two implementations that are not ours: transformers' ConvNextModel and timm's own models."""

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from transformers import ConvNextConfig, ConvNextModel

from train.model import VARIANTS, ConvNeXtEncoder, EncoderConfig
from train.model.names import hf_to_timm, timm_to_hf

DEPTHS, WIDTHS = (1, 2, 1, 1, 2), (8, 12, 16, 20, 24)


def hugging_face(stages: int = 5, layer_scale: float = 0.5) -> ConvNextModel:
    """Random weights everywhere, biases, norms and layer scales too: an ignored one would show."""
    torch.manual_seed(0)
    config = ConvNextConfig(
        num_stages=stages,
        depths=list(DEPTHS[:stages]),
        hidden_sizes=list(WIDTHS[:stages]),
        layer_scale_init_value=layer_scale,
    )
    model = ConvNextModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def hugging_face_features(model: ConvNextModel, pixels: Tensor) -> Tensor:
    """What ConvLLaVA's ConvNeXtCLIPVisionTower.forward computes: [B, h*w, C]."""
    last = model.encoder(model.embeddings(pixels), output_hidden_states=True).hidden_states[-1]
    last = last.permute(0, 2, 3, 1)
    return last.reshape(last.shape[0], -1, last.shape[3])


def ours(config: EncoderConfig, weights: dict[str, Tensor]) -> ConvNeXtEncoder:
    encoder = ConvNeXtEncoder(config)
    encoder.load_state_dict(weights)
    return encoder.eval()


def renamed(model: ConvNextModel) -> dict[str, Tensor]:
    return {hf_to_timm(key): value for key, value in model.state_dict().items() if not key.startswith("layernorm.")}


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@torch.inference_mode()
@pytest.mark.parametrize("stages", [4, 5])
@pytest.mark.parametrize("layer_scale", [0.5, 0.0])
def test_features_are_those_of_hugging_faces_convnext(stages: int, layer_scale: float):
    reference = hugging_face(stages, layer_scale)
    config = EncoderConfig(DEPTHS[:stages], WIDTHS[:stages], layer_scale=layer_scale)
    encoder = ours(config, renamed(reference))
    assert config.stride == (64 if stages == 5 else 32)
    pixels = torch.randn(2, 3, 2 * config.stride, 3 * config.stride)  # oblong: rows and columns cannot be swapped
    features = encoder(pixels)
    assert features.shape == (2, 6, WIDTHS[stages - 1])
    assert_close(features, hugging_face_features(reference, pixels))


@torch.inference_mode()
@pytest.mark.parametrize("stages", [4, 5])
def test_select_layer_minus_two_leaves_out_the_last_block(stages: int):
    reference = hugging_face(stages)
    pixels = torch.randn(1, 3, 128, 128)
    whole = hugging_face_features(reference, pixels)
    reference.encoder.stages[-1].layers.pop(-1)  # as the original does for mm_vision_select_layer: -2
    encoder = ours(EncoderConfig(DEPTHS[:stages], WIDTHS[:stages], skip_last_block=True), renamed(reference))
    assert_close(encoder(pixels), hugging_face_features(reference, pixels))
    assert (encoder(pixels) - whole).norm() > 0.01 * whole.norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_timms(name: str):
    device = torch.device("meta")
    with device:
        theirs = timm.create_model(f"convnext_{name}", num_classes=0)
    encoder = ConvNeXtEncoder(EncoderConfig.from_variant(name), device=device)
    expected = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("head.")}
    # The small ones' MLPs are 1x1 convolutions in timm: the same numbers, two axes more
    expected = {key: shape[:2] if ".mlp." in key else shape for key, shape in expected.items()}
    assert {key: value.shape for key, value in encoder.state_dict().items()} == expected

    def epsilons(model: nn.Module) -> list[float]:
        return [module.eps for key, module in model.named_modules() if hasattr(module, "eps") and "head" not in key]

    assert epsilons(encoder) == epsilons(theirs)


@torch.inference_mode()
def test_four_stage_features_are_timms():
    torch.manual_seed(0)
    theirs = timm.create_model("convnext_atto", num_classes=0).eval()
    weights = {key: value for key, value in theirs.state_dict().items() if not key.startswith("head.")}
    weights = {key: value.flatten(1) if ".mlp." in key and value.ndim == 4 else value for key, value in weights.items()}
    weights = {key: torch.rand_like(value) if "gamma" in key else value for key, value in weights.items()}
    theirs.load_state_dict({key: value for key, value in weights.items() if "gamma" in key}, strict=False)
    pixels = torch.randn(1, 3, 64, 96)
    expected = theirs.forward_intermediates(pixels, intermediates_only=True, norm=False)[-1]  # [1, 320, 2, 3]
    encoder = ours(EncoderConfig.from_variant("atto"), weights)
    assert_close(encoder(pixels), expected.flatten(2).transpose(1, 2))


def test_fifth_stage_is_appended_to_a_variant():
    config = EncoderConfig.from_variant("large", (6, 3072), drop_path_rate=0.1)
    assert (config.depths, config.widths) == ((3, 3, 27, 3, 6), (192, 384, 768, 1536, 3072))
    assert (config.stride, config.drop_path_rate) == (64, 0.1)
    assert EncoderConfig.from_variant("large").stride == 32


def test_fifth_stage_begins_like_the_other_four():
    torch.manual_seed(0)
    encoder = ConvNeXtEncoder(EncoderConfig((1, 1, 1, 2, 2), (8, 16, 32, 64, 64), layer_scale=0.25))
    fourth, fifth = (dict(stage.named_parameters()) for stage in encoder.stages[3:])
    assert fourth.keys() == fifth.keys()
    for key, value in fifth.items():
        if value.ndim > 1:
            assert [value.std().item(), fourth[key].std().item()] == pytest.approx([0.02, 0.02], rel=0.15)
        else:
            assert value.unique().tolist() == fourth[key].unique().tolist()
    assert fifth["blocks.1.gamma"].unique().tolist() == [0.25]


@pytest.mark.parametrize("stages", [4, 5])
def test_drop_path_rises_over_all_stages_as_in_hugging_face(stages: int):
    encoder = ConvNeXtEncoder(EncoderConfig(DEPTHS[:stages], WIDTHS[:stages], drop_path_rate=0.3))
    paths = [block.drop_path for stage in encoder.stages for block in stage.blocks]
    rates = [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths]
    assert rates == pytest.approx(torch.linspace(0, 0.3, sum(DEPTHS[:stages])).tolist())


@torch.inference_mode()
def test_norm_epsilon_reaches_every_stage():
    reference = hugging_face()
    for module in reference.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 0.1
    pixels = torch.randn(1, 3, 64, 64)
    encoder = ours(EncoderConfig(DEPTHS, WIDTHS, norm_eps=0.1), renamed(reference))
    assert_close(encoder(pixels), hugging_face_features(reference, pixels))


def test_meta_device_makes_no_parameters():
    encoder = ConvNeXtEncoder(EncoderConfig(DEPTHS, WIDTHS), device="meta")
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}


def test_names_map_one_to_one():
    theirs = [key for key in hugging_face().state_dict() if not key.startswith("layernorm.")]
    encoder = ConvNeXtEncoder(EncoderConfig(DEPTHS, WIDTHS), device="meta")
    assert sorted(map(hf_to_timm, theirs)) == sorted(encoder.state_dict())
    assert [timm_to_hf(hf_to_timm(key)) for key in theirs] == theirs


def test_names_without_a_place_are_refused():
    with pytest.raises(KeyError, match=r"classifier\.weight"):
        hf_to_timm("classifier.weight")
    with pytest.raises(KeyError, match=r"head\.fc\.weight"):
        timm_to_hf("head.fc.weight")


def test_wrong_shapes_of_an_encoder_are_refused():
    with pytest.raises(ValueError, match=r"unknown ConvNeXt 'huge', expected one of atto, .*xxlarge"):
        EncoderConfig.from_variant("huge")
    with pytest.raises(ValueError, match=r"4 or 5 stages .* \(1, 1, 1\) and widths \(8, 8, 8\)"):
        EncoderConfig((1, 1, 1), (8, 8, 8))
    with pytest.raises(ValueError, match=r"a depth and a width each"):
        EncoderConfig((1, 1, 1, 1, 1), (8, 8, 8, 8))
