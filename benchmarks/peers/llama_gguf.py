"""A checkpoint's language model as GGUF in float16, by the `gguf` package; and a GGUF's weights in our own graph.

python -m benchmarks.peers.llama_gguf CHECKPOINT FILE
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from export.decoder.fused import fused_graph
from export.decoder.surgery import add_next_token, merge_image_embeds
from export.graphs.store import write_graph
from train.model import Checkpoint, load_language_state

# Hugging Face's name of a layer's tensor -> GGUF's
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(checkpoint: Checkpoint, file: Path) -> None:
    """Write the language model in float16, norms in float32, a tensor at a time; without a vocabulary of texts."""
    config = checkpoint.llama_config
    state = load_language_state(checkpoint)  # mapped
    names = {key: gguf_name(key) for key in state}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    rope = checkpoint.config.get("rope_parameters") or checkpoint.config
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    for key, tensor in state.items():
        dtype = dtype_of(tensor)
        writer.add_tensor_info(names[key], tensor.shape, np.dtype(dtype), tensor.numel() * np.dtype(dtype).itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, tensor in state.items():
        writer.write_tensor_data(stored(key, tensor, config))
    writer.close()


def gguf_name(key: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`; KeyError for what llama.cpp has no place for."""
    name, _, kind = key.rpartition(".")
    if name in OUTSIDE:
        return f"{OUTSIDE[name]}.{kind}"
    _, _, layer, within = name.split(".", 3)
    return f"blk.{layer}.{LAYER[within]}.{kind}"


def dtype_of(tensor: Tensor) -> type[np.floating]:
    return np.float16 if tensor.ndim > 1 else np.float32


def stored(key: str, tensor: Tensor, config: LlamaConfig) -> np.ndarray:
    """A tensor's values as llama.cpp wants them: its rotary embedding turns neighbors, Hugging Face's both halves."""
    exact = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # which numpy does not have
    values = exact.numpy().astype(dtype_of(tensor), copy=False)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads:
        halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values)


def write_graph_of(file: Path, checkpoint: Checkpoint, target: Path) -> None:
    """Write the checkpoint's float32 decoder graph with the weights that `file`, a GGUF of it, stands for."""
    llama = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state = {key: llama.state_dict()[key] for key in load_language_state(checkpoint)}
    model, read = fused_graph(checkpoint.llama_config, state, TensorProto.FLOAT)
    merge_image_embeds(model)
    add_next_token(model)
    write_graph(model, read, target)


def main() -> None:
    checkpoint, file = sys.argv[1:]
    write_gguf(Checkpoint.open(checkpoint), Path(file))


if __name__ == "__main__":
    main()
