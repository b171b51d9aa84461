"""A Llama as an ONNX graph of ONNX's own large operators, with a KV cache of fixed capacity that is updated in place.

RMSNormalization, RotaryEmbedding and grouped-query Attention are one node each, and TensorScatter writes the new keys
and values into the cache, so that a runtime can give `past` and `present` the same memory; TensorRT demands it.

    input_ids                   [batch, sequence] int64
    write_indices               [batch] int64: how many positions the cache holds already
    past_key_values.N.key/value [batch, kv_heads, capacity, head_dim]
    logits                      [batch, 1, vocab], of the last position
    present.N.key/value         as past_key_values.N, `sequence` more positions filled

Projections of the same input are one matrix, kept as PyTorch has it, [out, in], behind a Transpose. TensorRT would
merge and transpose them itself, but keeps what it has rearranged once for each optimisation profile.
"""

from collections.abc import Iterable

import onnx
import torch
from onnx import TensorProto, helper
from transformers import LlamaConfig

from export.decoder.writer import GraphWriter
from export.graphs.store import Read
from runtime.errors import UserError
from runtime.graph_io import INPUT_IDS, LOGITS, PAST, PRESENT, WRITE_INDICES

OPSET = 24  # the first with TensorScatter
IR_VERSION = 12


def llama_graph(config: LlamaConfig, state: dict[str, torch.Tensor], capacity: int) -> tuple[onnx.ModelProto, Read]:
    """(the graph in float32, whose weights have no values yet, their reader).

    Args:
        config, state: see `export.decoder.writer.GraphWriter`.
        capacity: positions of the KV cache, a constant, since TensorRT updates no cache of variable length.

    Raises:
        UserError: an activation other than SiLU, a capacity beyond the positions that the model knows.
    """
    if not 1 <= capacity <= config.max_position_embeddings:
        raise UserError(f"a KV cache of {capacity} positions: the model knows 1 to {config.max_position_embeddings}")
    writer = _Portable(config, state, capacity)
    return writer.whole(), writer.read


class _Portable(GraphWriter):
    def __init__(self, config: LlamaConfig, state: dict[str, torch.Tensor], capacity: int):
        super().__init__(config, state, TensorProto.FLOAT)
        self.capacity = capacity

    def whole(self) -> onnx.ModelProto:
        self.constants()
        table = self.weight("model.embed_tokens.weight", "model.embed_tokens.weight")  # [vocab, hidden]
        hidden = self.node("Gather", [table, INPUT_IDS], "embed_tokens")  # [batch, sequence, hidden]
        positions = self.positions()
        mask = self.causal_mask(positions)
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            attended = self.attention(self.norm(hidden, f"{layer}.input_layernorm"), i, positions, mask)
            hidden = self.node("Add", [hidden, attended], f"{layer}.attention_residual")
            mapped = self.mlp(self.norm(hidden, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
            hidden = self.node("Add", [hidden, mapped], f"{layer}.mlp_residual")
        last = self.norm(self.node("Gather", [hidden, "minus_one"], "last_position", axis=1), "model.norm")
        if not self.config.tie_word_embeddings:
            table = self.weight("lm_head.weight", "lm_head.weight")
        logits = self.node("Gemm", [last, table], "lm_head", transB=1)  # transposes itself: a tied table is stored once
        self.node("Unsqueeze", [logits, "axis_1"], "logits", LOGITS)
        inputs = [
            helper.make_tensor_value_info(INPUT_IDS, TensorProto.INT64, ["batch_size", "sequence_length"]),
            helper.make_tensor_value_info(WRITE_INDICES, TensorProto.INT64, ["batch_size"]),
            *self.caches(PAST, self.capacity),
        ]
        logits = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch_size", 1, self.config.vocab_size])
        return self.model("llama", inputs, [logits, *self.caches(PRESENT, self.capacity)], {"": OPSET}, IR_VERSION)

    def constants(self) -> None:
        self.rotary_tables(("cos", "sin"), self.capacity)
        integers = {
            "zero": 0,
            "one": 1,
            "minus_one": -1,
            "capacity": self.capacity,
            "axis_1": [1],
            "axes_1_3": [1, 3],
            "qkv_heads": [self.heads, self.kv_heads, self.kv_heads],
            # Shapes, where 0 leaves a dimension as it is
            "by_head": [0, 0, self.heads + 2 * self.kv_heads, self.head_dim],
            "joined_heads": [0, 0, self.heads * self.head_dim],
            "gate_and_up": [0, 0, 2, self.config.intermediate_size],
        }
        for name, value in integers.items():
            self.integer(name, value)

    def positions(self) -> str:
        """Of the new tokens: [batch, sequence]."""
        sequence = self.node("Shape", ["input_ids"], "sequence", start=1, end=2)
        steps = self.node("Range", ["zero", self.node("Squeeze", [sequence], "sequence_scalar"), "one"], "steps")
        return self.node("Add", [self.node("Unsqueeze", ["write_indices", "axis_1"], "first"), steps], "positions")

    def causal_mask(self, positions: str) -> str:
        """True where a query may look, [batch, 1, sequence, capacity]; one for all layers.

        Not Attention's is_causal with nonpad_kv_seqlen: TensorRT's parser ignores the latter, so that the first query
        would see the first key alone, whatever the cache holds.
        """
        keys = self.node("Range", ["zero", "capacity", "one"], "key_positions")
        queries = self.node("Unsqueeze", [positions, "axes_1_3"], "query_positions")
        return self.node("GreaterOrEqual", [queries, keys], "causal_mask")

    def attention(self, hidden: str, i: int, positions: str, mask: str) -> str:
        name = f"model.layers.{i}.self_attn"
        qkv = self.linear(hidden, f"{name}.qkv_proj", [f"{name}.{x}_proj" for x in "qkv"])
        qkv = self.node("Reshape", [qkv, "by_head"], f"{name}.by_head")
        qkv = self.node("Transpose", [qkv], f"{name}.heads_first", perm=[0, 2, 1, 3])  # [batch, heads, sequence, dim]
        query, key, value = self.split(qkv, "qkv_heads", [f"{name}.{x}" for x in ("query", "key", "value")])
        keys = self.append(self.rotate(key, positions), f"{i}.key")
        values = self.append(value, f"{i}.value")
        out = self.node("Attention", [self.rotate(query, positions), keys, values, mask], f"{name}.attention")
        out = self.node("Transpose", [out], f"{name}.positions_first", perm=[0, 2, 1, 3])
        return self.linear(self.node("Reshape", [out, "joined_heads"], f"{name}.joined_heads"), f"{name}.o_proj")

    def rotate(self, heads: str, positions: str) -> str:
        return self.node("RotaryEmbedding", [heads, "cos", "sin", positions], f"{heads}.rotary")

    def append(self, new: str, name: str) -> str:
        inputs = [f"{PAST}.{name}", new, WRITE_INDICES]
        return self.node("TensorScatter", inputs, f"update.{name}", f"{PRESENT}.{name}", axis=2)

    def mlp(self, hidden: str, name: str) -> str:
        both = self.linear(hidden, f"{name}.gate_up_proj", [f"{name}.gate_proj", f"{name}.up_proj"])
        both = self.node("Reshape", [both, "gate_and_up"], f"{name}.gate_and_up")
        gate = self.node("Gather", [both, "zero"], f"{name}.gate", axis=2)
        up = self.node("Gather", [both, "one"], f"{name}.up", axis=2)
        silu = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{name}.sigmoid")], f"{name}.silu")
        return self.linear(self.node("Mul", [silu, up], f"{name}.gated"), f"{name}.down_proj")

    def norm(self, hidden: str, name: str) -> str:
        scale = self.weight(f"{name}.weight", f"{name}.weight")
        return self.node("RMSNormalization", [hidden, scale], name, axis=-1, epsilon=self.config.rms_norm_eps)

    def linear(self, rows: str, name: str, parts: Iterable[str] = ()) -> str:
        """x @ W.T + b; W and b are those of `parts`, by default of `name`, one below the other."""
        parts = list(parts) or [name]
        weight = self.weight(f"{name}.weight", [f"{part}.weight" for part in parts])
        weight = self.node("Transpose", [weight], f"{name}.transposed", perm=[1, 0])
        out = self.node("MatMul", [rows, weight], name)
        if f"{parts[0]}.bias" not in self.state:
            return out
        bias = self.weight(f"{name}.bias", [f"{part}.bias" for part in parts])
        return self.node("Add", [out, bias], f"{name}.biased")

    def split(self, heads: str, sizes: str, outputs: list[str]) -> list[str]:
        self.node("Split", [heads, sizes], f"{heads}.split", outputs, axis=1)
        return outputs
