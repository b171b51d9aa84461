"""The model's forward pass with the weights of one block or layer in memory: the reference for comparisons.

Parameters stay in the checkpoint's mapped files until their block is computed, in float32.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from train.model.checkpoint.layout import EMBEDDING, HEAD
from train.model.checkpoint.load import with_prefix
from train.model.convllava import ImageEncoder

PROJECTOR = "projector"
HEAD_ROWS = 4096  # rows of the language model's head that are in memory in float32


def named_blocks(model: ImageEncoder) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what follows one another in a forward pass: stem, downsampling layers, blocks, projector.

    Each takes the output of the one before it, see `run_block`.
    """
    yield "encoder.stem", model.encoder.stem
    for i, stage in enumerate(model.encoder.stages):
        if not isinstance(stage.downsample, nn.Identity):
            yield f"encoder.stages.{i}.downsample", stage.downsample
        for j, block in enumerate(stage.blocks):
            if not isinstance(block, nn.Identity):
                yield f"encoder.stages.{i}.blocks.{j}", block
    yield PROJECTOR, model.projector


@torch.inference_mode()
def run_block(name: str, block: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """A block of `named_blocks` on several float32 inputs, [B, C, h, w] each; the projector gives [B, h*w, D]."""
    block = copy.deepcopy(block).float()
    return [block(x.flatten(2).transpose(1, 2) if name == PROJECTOR else x) for x in inputs]


def image_embeddings(model: ImageEncoder, pixel_values: Tensor) -> Tensor:
    """What `model` computes, [B, 3, H, W] -> [B, T, D], block by block."""
    x = [pixel_values]
    for name, block in named_blocks(model):
        x = run_block(name, block, x)
    return x[0]


class StreamedDecoder:
    """A Llama whose layers are read when they are computed; one sequence, all positions at once.

    Args:
        config, state: as `Checkpoint.llama_config` and `load_language_state` give them.
    """

    def __init__(self, config: LlamaConfig, state: dict[str, Tensor]):
        self._config, self._state = copy.deepcopy(config), state
        self._config._attn_implementation = "sdpa"  # causal without a mask
        self._rotary = LlamaRotaryEmbedding(self._config)

    def embed(self, token_ids: list[int]) -> Tensor:
        """[S] -> [S, D] float32."""
        return self._state[EMBEDDING][torch.tensor(token_ids, dtype=torch.long)].float()

    def hidden_states(self, embeddings: Tensor) -> Iterator[Tensor]:
        """The hidden state [S, D] after each layer, of embeddings [S, D]."""
        hidden = embeddings[None]
        cos_sin = self._rotary(hidden, torch.arange(hidden.shape[1])[None])
        for i in range(self._config.num_hidden_layers):
            weights = with_prefix(f"model.layers.{i}.", self._state)
            with torch.device("meta"):
                layer = LlamaDecoderLayer(self._config, i)
            layer.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
            with torch.inference_mode():
                output = layer.eval()(hidden, position_embeddings=cos_sin, attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output  # transformers 4 and 5
            yield hidden[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] after the last layer -> [N, V]."""
        norm = LlamaRMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.weight = nn.Parameter(self._state["model.norm.weight"].float(), requires_grad=False)
        head = self._state[EMBEDDING if self._config.tie_word_embeddings else HEAD]
        normed = norm(hidden)
        return torch.cat([normed @ rows.float().T for rows in head.split(HEAD_ROWS)], dim=-1)
