"""A Llama as an ONNX graph of ONNX Runtime's fused operators, as ONNX Runtime GenAI's model builder writes it.

GroupQueryAttention rotates queries and keys and updates the KV cache, SkipSimplifiedLayerNormalization adds and
normalizes. Only the last position gets logits.

    input_ids                   [batch, sequence] int64
    attention_mask              [batch, length] int64: ones for the filled positions
    past_key_values.N.key/value [batch, kv_heads, past, head_dim]
    logits                      [batch, 1, vocab]
    present.N.key/value         as past_key_values.N, `sequence` more positions
"""

import torch
from onnx import ModelProto, TensorProto, helper
from transformers import LlamaConfig

from export.decoder.writer import GraphWriter
from export.graphs.store import Read
from runtime.graph_io import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, PRESENT, cache_name

OPSETS = {"": 22, "com.microsoft": 1}
IR_VERSION = 10


def fused_graph(config: LlamaConfig, state: dict[str, torch.Tensor], element: int) -> tuple[ModelProto, Read]:
    """(the graph, whose initializers have no values yet, their reader); see `export.decoder.writer.GraphWriter`."""
    writer = _Fused(config, state, element)
    return writer.whole(), writer.read


class _Fused(GraphWriter):
    def whole(self) -> ModelProto:
        lengths = self.lengths()
        self.rotary_tables(("cos_cache", "sin_cache"), self.config.max_position_embeddings)
        hidden = self.embeddings()
        delta = ""  # what the layer before adds to `hidden`
        for i in range(self.config.num_hidden_layers):
            layer = f"/model/layers.{i}"
            normed, hidden = self.norm(hidden, delta, f"{layer}/input_layernorm")
            attended = self.attention(normed, i, lengths)
            normed, hidden = self.norm(hidden, attended, f"{layer}/post_attention_layernorm")
            delta = self.mlp(normed, f"{layer}/mlp")
        self.head(hidden, delta)
        inputs = [
            helper.make_tensor_value_info(INPUT_IDS, TensorProto.INT64, ["batch_size", "sequence_length"]),
            helper.make_tensor_value_info(ATTENTION_MASK, TensorProto.INT64, ["batch_size", "total_sequence_length"]),
            *self.caches(PAST, "past_sequence_length"),
        ]
        logits = helper.make_tensor_value_info(LOGITS, self.element, ["batch_size", 1, self.config.vocab_size])
        outputs = [logits, *self.caches(PRESENT, "total_sequence_length")]
        return self.model("main_graph", inputs, outputs, OPSETS, IR_VERSION)

    def lengths(self) -> list[str]:
        """What GroupQueryAttention wants to know: positions of each sequence less one, and of the longest, int32."""
        name = "/model/attn_mask_reformat/attn_mask_subgraph"
        for constant, value in (("one", 1), ("axis_1", [1]), ("minus_one", -1)):
            self.integer(constant, value)
        filled = self.node("ReduceSum", [ATTENTION_MASK, "axis_1"], f"{name}/ReduceSum", keepdims=0)
        before = self.node("Sub", [filled, "axis_1"], f"{name}/Sub")
        shape = self.node("Shape", [ATTENTION_MASK], f"{name}/Shape")
        longest = self.node("Gather", [shape, "one"], f"{name}/Gather", axis=0)
        return [
            self.node("Cast", [value], f"{name}/{of}/Cast", to=TensorProto.INT32)
            for value, of in ((before, "Sub"), (longest, "Gather"))
        ]

    def embeddings(self) -> str:
        """[batch, sequence, hidden]. Tied to the head, they are looked up in its matrix; a table of their own stays in
        float16 where it was stored so, since only a few of its rows are converted."""
        name, key = "/model/embed_tokens", "model.embed_tokens.weight"
        if self.config.tie_word_embeddings:
            head = self.weight("lm_head.MatMul.weight", key, transposed=True)
            table = self.node("Transpose", [head], f"{name}/Transpose", perm=[1, 0])
            return self.node("Gather", [table, INPUT_IDS], f"{name}/Gather")
        is_half = self.state[key].dtype == torch.float16
        table = self.weight(key, key, element=TensorProto.FLOAT16 if is_half else None)
        rows = self.node("Gather", [table, INPUT_IDS], f"{name}/Gather")
        if not is_half or self.element == TensorProto.FLOAT16:
            return rows
        return self.node("Cast", [rows], f"{name}/Cast", to=self.element)

    def norm(self, hidden: str, delta: str, name: str) -> tuple[str, str]:
        """(hidden + delta normalized, hidden + delta); the embeddings have no delta."""
        weight = self.weight(f"{_dotted(name)}.weight", f"{_dotted(name)}.weight")
        if delta:
            outputs = [f"{name}/output_0", "", "", f"{name}/output_3"]
            return self.skip_norm([hidden, delta, weight], name, outputs), outputs[3]
        kind = {"axis": -1, "epsilon": self.config.rms_norm_eps, "stash_type": 1}
        operator = "SimplifiedLayerNormalization"
        return self.node(operator, [hidden, weight], f"{name}/LayerNorm", f"{name}/output_0", **kind), hidden

    def skip_norm(self, inputs: list[str], name: str, outputs: str | list[str]) -> str:
        kind = {"epsilon": self.config.rms_norm_eps, "domain": "com.microsoft"}
        return self.node("SkipSimplifiedLayerNormalization", inputs, f"{name}/SkipLayerNorm", outputs, **kind)

    def attention(self, normed: str, i: int, lengths: list[str]) -> str:
        name = f"/model/layers.{i}/attn"
        qkv = self.linear(normed, f"{name}/qkv_proj", [f"model.layers.{i}.self_attn.{x}_proj" for x in "qkv"])
        past, present = ([cache_name(side, i, kind) for kind in ("key", "value")] for side in (PAST, PRESENT))
        attended = self.node(
            "GroupQueryAttention",
            [qkv, "", "", *past, *lengths, "cos_cache", "sin_cache"],
            f"{name}/GroupQueryAttention",
            [f"{name}/GroupQueryAttention/output_0", *present],
            domain="com.microsoft",
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=self.head_dim**-0.5,
            do_rotary=1,
        )
        return self.linear(attended, f"{name}/o_proj", [f"model.layers.{i}.self_attn.o_proj"])

    def mlp(self, normed: str, name: str) -> str:
        gate, up = (self.linear(normed, f"{name}/{x}_proj", [f"{_dotted(name)}.{x}_proj"]) for x in ("gate", "up"))
        sigmoid = self.node("Sigmoid", [gate], f"{name}/act_fn/Sigmoid")
        silu = self.node("Mul", [gate, sigmoid], f"{name}/act_fn/Mul")
        gated = self.node("Mul", [silu, up], f"{name}/Mul")
        return self.linear(gated, f"{name}/down_proj", [f"{_dotted(name)}.down_proj"])

    def linear(self, rows: str, name: str, parts: list[str]) -> str:
        """x @ W.T + b, W and b those of `parts`, one below the other."""
        weight = self.weight(f"{_dotted(name)}.MatMul.weight", [f"{part}.weight" for part in parts], transposed=True)
        out = self.node("MatMul", [rows, weight], f"{name}/MatMul")
        if f"{parts[0]}.bias" not in self.state:
            return out
        bias = self.weight(f"{_dotted(name)}.Add.bias", [f"{part}.bias" for part in parts])
        return self.node("Add", [out, bias], f"{name}/Add")

    def head(self, hidden: str, delta: str) -> None:
        """Logits of the last position."""
        name = f"/model/layers.{self.config.num_hidden_layers}/final_norm_layernorm"
        scale = self.weight(f"{_dotted(name)}.weight", "model.norm.weight")
        normed = self.skip_norm([hidden, delta, scale], name, f"{name}/output_0")
        last = self.node("Gather", [normed, "minus_one"], "/lm_head/prune/Gather", axis=1)
        last = self.node("Unsqueeze", [last, "axis_1"], "/lm_head/prune/Unsqueeze")
        matrix = "lm_head.MatMul.weight"
        if not self.config.tie_word_embeddings:
            self.weight(matrix, "lm_head.weight", transposed=True)
        self.node("MatMul", [last, matrix], "/lm_head/MatMul", LOGITS)


def _dotted(name: str) -> str:
    """Of a node's name, what its weights' begin with."""
    return name[1:].replace("/", ".")
