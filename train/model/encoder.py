"""ConvNeXt with a fifth stage: the encoder of ConvLLaVA (arXiv 2405.15738, section 3).

timm's ConvNeXt has four stages whatever it is asked for, so the fifth is timm's `ConvNeXtStage` (2x2 stride-2
downsampling, then blocks) once more: total stride 64 instead of 32. The classifier, its pooling and its norm are not
used: the original takes the last stage's output as it is.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from timm.layers import LayerNorm, LayerNorm2d
from timm.models import named_apply
from timm.models.convnext import ConvNeXt, ConvNeXtStage
from torch import Tensor, nn

# timm's names: (blocks, channels) of the four stages
VARIANTS = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
    "xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
}


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of the encoder.

    depths, widths: blocks and channels of each of four or five stages.
    layer_scale: initial value of each block's layer scale; 0 or less means the blocks have none (as in Hugging Face).
    drop_path_rate: stochastic depth of the last block while training; rises linearly from 0 at the first.
    norm_eps: epsilon of every LayerNorm. Hugging Face's blocks use 1e-6 whatever `layer_norm_eps` says.
    skip_last_block: leave out the last block of the last stage (the original's `mm_vision_select_layer: -2`).
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    patch_size: ClassVar[int] = 4  # of the stem, pixels; with another, timm strides or dilates unlike Hugging Face
    layer_scale: float = 1e-6
    drop_path_rate: float = 0.0
    norm_eps: float = 1e-6
    skip_last_block: bool = False

    def __post_init__(self):
        if len(self.depths) not in (4, 5) or len(self.widths) != len(self.depths):
            raise ValueError(
                f"a ConvNeXt encoder has 4 or 5 stages with a depth and a width each, not depths {self.depths} "
                f"and widths {self.widths}"
            )

    @classmethod
    def from_variant(cls, name: str, fifth_stage: tuple[int, int] | None = None, **options) -> "EncoderConfig":
        """`name`: a key of `VARIANTS`; `fifth_stage`: its (depth, width), or None for stride 32."""
        if name not in VARIANTS:
            raise ValueError(f"unknown ConvNeXt {name!r}, expected one of {', '.join(VARIANTS)}")
        depths, widths = VARIANTS[name]
        if name == "xxlarge":
            options.setdefault("norm_eps", 1e-5)  # OpenCLIP's xxlarge alone was trained so
        if fifth_stage:
            depths, widths = (*depths, fifth_stage[0]), (*widths, fifth_stage[1])
        return cls(depths, widths, **options)

    @property
    def stride(self) -> int:
        """Pixels of one side that become one visual token: 64 with a fifth stage, 32 without."""
        return self.patch_size * 2 ** (len(self.depths) - 1)


class ConvNeXtEncoder(nn.Module):
    """pixel_values [B, 3, H, W] -> features [B, (H/stride)*(W/stride), widths[-1]], in reading order.

    H and W must be multiples of the stride; the strided convolutions would silently drop a remainder.
    `device`: where the parameters are made; "meta" makes none, for a checkpoint's to be assigned.
    """

    def __init__(self, config: EncoderConfig, device: torch.device | str | None = None):
        super().__init__()
        self.config = config
        layer_scale = config.layer_scale if config.layer_scale > 0 else None
        rates = np.linspace(0, config.drop_path_rate, sum(config.depths)).tolist()
        four = sum(config.depths[:4])
        backbone = ConvNeXt(
            num_classes=0,
            depths=config.depths[:4],
            dims=config.widths[:4],
            patch_size=config.patch_size,
            ls_init_value=layer_scale,
            norm_eps=config.norm_eps,
            drop_path_rate=rates[four - 1],
            device=device,
        )
        self.stem, self.stages = backbone.stem, backbone.stages
        if len(config.depths) == 5:
            fifth = ConvNeXtStage(
                config.widths[3],
                config.widths[4],
                depth=config.depths[4],
                drop_path_rates=rates[four:],
                ls_init_value=layer_scale,
                norm_layer=partial(LayerNorm2d, eps=config.norm_eps),
                norm_layer_cl=partial(LayerNorm, eps=config.norm_eps),
                device=device,
            )
            self.stages.append(named_apply(_init_weights, fifth))
        if config.skip_last_block:
            self.stages[-1].blocks[-1] = nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        return x.flatten(2).transpose(1, 2)  # [B, C, h, w] -> [B, h*w, C]


def _init_weights(module: nn.Module, name: str) -> None:
    """timm's initialisation of its own four stages, for the fifth: truncated normal, 0.02; zero biases."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
