"""Parameter names of a ConvNeXt in Hugging Face's checkpoints and in timm's modules; one to one."""

import re

_RULES = [  # (Hugging Face, timm); {} stands for a number
    ("embeddings.patch_embeddings.", "stem.0."),
    ("embeddings.layernorm.", "stem.1."),
    ("encoder.stages.{}.downsampling_layer.", "stages.{}.downsample."),
    ("encoder.stages.{}.layers.{}.dwconv.", "stages.{}.blocks.{}.conv_dw."),
    ("encoder.stages.{}.layers.{}.layernorm.", "stages.{}.blocks.{}.norm."),
    ("encoder.stages.{}.layers.{}.pwconv1.", "stages.{}.blocks.{}.mlp.fc1."),
    ("encoder.stages.{}.layers.{}.pwconv2.", "stages.{}.blocks.{}.mlp.fc2."),
    ("encoder.stages.{}.layers.{}.layer_scale_parameter", "stages.{}.blocks.{}.gamma"),
]


def _translate(name: str, source: int) -> str:
    for rule in _RULES:
        pattern = re.escape(rule[source]).replace(r"\{\}", r"(\d+)")
        if match := re.match(pattern, name):
            return rule[1 - source].format(*match.groups()) + name[match.end() :]
    raise KeyError(name)


def hf_to_timm(name: str) -> str:
    """`encoder.stages.0.layers.1.dwconv.weight` -> `stages.0.blocks.1.conv_dw.weight`; KeyError if it has no place."""
    return _translate(name, 0)


def timm_to_hf(name: str) -> str:
    """The inverse of `hf_to_timm`."""
    return _translate(name, 1)
