"""A Llama as an ONNX graph of ONNX's own large operators, with a KV cache of fixed capacity that is updated in place.

RMSNormalization, RotaryEmbedding and grouped-query Attention are one node each, and TensorScatter writes new keys and
values into the cache, so that a runtime may bind `past` and `present` to the same memory; TensorRT does.

    input_ids                   [batch, sequence] int64
    write_indices               [batch] int64: positions that the cache holds already
    past_key_values.N.key/value [batch, kv_heads, capacity, head_dim]
    logits                      [batch, 1, vocab], of the last position
    present.N.key/value         as past_key_values.N, with `sequence` more positions
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from runtime.errors import UserError

OPSET = 24  # TensorScatter's, and that of an Attention whose keys and values are a cache
IR_VERSION = 12
SMALL = 4096  # bytes of a tensor that stays in the graph's own file
CACHE = ("batch", "kv_heads", "capacity", "head_dim")


def llama_graph(config: LlamaConfig, state: dict[str, torch.Tensor], data: Path, capacity: int) -> onnx.ModelProto:
    """The float32 graph; large weights are written to the file `data`, beside which the graph must be saved.

    config, state: as transformers' LlamaForCausalLM has them; of any float type, converted one tensor at a time.
    Raises UserError for an activation other than SiLU.
    """
    if config.hidden_act != "silu":
        raise UserError(f"hidden_act is {config.hidden_act!r}; the portable graph knows silu")
    with data.open("wb") as stream:
        return _Writer(config, state, capacity, stream, data.name).model()


class _Writer:
    """Appends nodes and weights in the order of a forward pass; methods take and return names of tensors."""

    def __init__(self, config: LlamaConfig, state: dict[str, torch.Tensor], capacity: int, stream, location: str):
        self.config, self.state, self.capacity = config, state, capacity
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.nodes, self.initializers = [], []
        self._stream, self._location = stream, location

    def model(self) -> onnx.ModelProto:
        config = self.config
        embeddings = self.weight("model.embed_tokens.weight", self.state["model.embed_tokens.weight"])
        self.constants()
        hidden = self.node("Gather", [embeddings, "input_ids"], "embeds")  # [batch, sequence, hidden]
        positions = self.positions()
        mask = self.causal_mask(positions)
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            normed = self.norm(hidden, f"{layer}.input_layernorm")
            hidden = self.add(hidden, self.attention(normed, i, positions, mask), f"{layer}/attention_residual")
            normed = self.norm(hidden, f"{layer}.post_attention_layernorm")
            hidden = self.add(hidden, self.mlp(normed, f"{layer}.mlp"), f"{layer}/mlp_residual")
        last = self.node("Gather", [hidden, "minus_one"], "last_hidden", axis=1)  # [batch, hidden]
        last = self.norm(last, "model.norm")
        # Gemm transposes by itself, so that a tied table is stored once
        tied = config.tie_word_embeddings or "lm_head.weight" not in self.state
        head = embeddings if tied else self.weight("lm_head.weight", self.state["lm_head.weight"])
        logits = self.node("Gemm", [last, head], "last_logits", transB=1)
        self.node("Unsqueeze", [logits, "axis_1"], "logits", output="logits")
        graph = helper.make_graph(self.nodes, "llama", self.inputs(), self.outputs(), self.initializers)
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="convllava-deploy")

    def inputs(self) -> list[onnx.ValueInfoProto]:
        return [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("write_indices", TensorProto.INT64, ["batch"]),
            *self.caches("past_key_values"),
        ]

    def outputs(self) -> list[onnx.ValueInfoProto]:
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, self.config.vocab_size])
        return [logits, *self.caches("present")]

    def caches(self, name: str) -> list[onnx.ValueInfoProto]:
        shape = ["batch", self.kv_heads, self.capacity, self.head_dim]
        names = [f"{name}.{i}.{kind}" for i in range(self.config.num_hidden_layers) for kind in ("key", "value")]
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]

    def constants(self) -> None:
        rotary = LlamaRotaryEmbedding(self.config)
        positions = torch.arange(self.config.max_position_embeddings)[None]
        for name, table in zip(("cos", "sin"), rotary(torch.zeros(1), positions), strict=True):
            self.weight(name, table[0, :, : self.head_dim // 2])  # [positions, head_dim / 2]: both halves are alike
        integers = {
            "zero": 0,
            "one": 1,
            "minus_one": -1,
            "axis_1": [1],
            "axes_1_3": [1, 3],
            "query_heads": [0, 0, self.heads, self.head_dim],
            "kv_heads": [0, 0, self.kv_heads, self.head_dim],
            "one_row": [0, 0, self.heads * self.head_dim],
        }
        for name, value in integers.items():
            self.initializers.append(numpy_helper.from_array(np.array(value, np.int64), name))

    def positions(self) -> str:
        """Of the new tokens: [batch, sequence]."""
        length = self.scalar(self.node("Shape", ["input_ids"], "positions/length", start=1, end=2), "positions/scalar")
        steps = self.node("Range", ["zero", length, "one"], "positions/steps")
        start = self.node("Unsqueeze", ["write_indices", "axis_1"], "positions/start")
        return self.node("Add", [start, steps], "positions")

    def causal_mask(self, positions: str) -> str:
        """True where a query may look: [batch, 1, sequence, capacity]; one for all layers."""
        shape = self.node("Shape", ["past_key_values.0.key"], "mask/capacity", start=2, end=3)
        keys = self.node("Range", ["zero", self.scalar(shape, "mask/scalar"), "one"], "mask/keys")
        queries = self.node("Unsqueeze", [positions, "axes_1_3"], "mask/queries")
        return self.node("GreaterOrEqual", [queries, keys], "mask")

    def attention(self, hidden: str, i: int, positions: str, mask: str) -> str:
        name = f"model.layers.{i}.self_attn"
        query = self.rotate(self.split_heads(self.linear(hidden, f"{name}.q_proj"), "query_heads"), positions)
        key = self.rotate(self.split_heads(self.linear(hidden, f"{name}.k_proj"), "kv_heads"), positions)
        value = self.split_heads(self.linear(hidden, f"{name}.v_proj"), "kv_heads")
        keys, values = self.append(key, f"{i}.key"), self.append(value, f"{i}.value")
        out = self.node("Attention", [query, keys, values, mask], f"{name}/attention")  # [batch, heads, sequence, dim]
        out = self.node("Transpose", [out], f"{name}/by_position", perm=[0, 2, 1, 3])
        return self.linear(self.node("Reshape", [out, "one_row"], f"{name}/joined"), f"{name}.o_proj")

    def split_heads(self, rows: str, shape: str) -> str:
        """[batch, sequence, n * head_dim] -> [batch, n, sequence, head_dim]"""
        heads = self.node("Reshape", [rows, shape], f"{rows}/heads")
        return self.node("Transpose", [heads], f"{rows}/by_head", perm=[0, 2, 1, 3])

    def rotate(self, heads: str, positions: str) -> str:
        return self.node("RotaryEmbedding", [heads, "cos", "sin", positions], f"{heads}/rotated")

    def append(self, update: str, name: str) -> str:
        past, present = f"past_key_values.{name}", f"present.{name}"
        return self.node("TensorScatter", [past, update, "write_indices"], f"{present}/update", output=present, axis=2)

    def mlp(self, hidden: str, name: str) -> str:
        gate, up = self.linear(hidden, f"{name}.gate_proj"), self.linear(hidden, f"{name}.up_proj")
        gate = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{name}/sigmoid")], f"{name}/silu")
        return self.linear(self.node("Mul", [gate, up], f"{name}/gated"), f"{name}.down_proj")

    def norm(self, hidden: str, name: str) -> str:
        scale = self.weight(f"{name}.weight", self.state[f"{name}.weight"])
        return self.node("RMSNormalization", [hidden, scale], name, axis=-1, epsilon=self.config.rms_norm_eps)

    def linear(self, rows: str, name: str) -> str:
        weight = self.weight(f"{name}.weight", self.state[f"{name}.weight"].T)  # [in, out], as MatMul wants it
        out = self.node("MatMul", [rows, weight], name)
        if (bias := self.state.get(f"{name}.bias")) is None:
            return out
        return self.add(out, self.weight(f"{name}.bias", bias), f"{name}/biased")

    def add(self, a: str, b: str, name: str) -> str:
        return self.node("Add", [a, b], name)

    def scalar(self, one_long: str, name: str) -> str:
        return self.node("Squeeze", [one_long], name)

    def node(self, operator: str, inputs: list[str], name: str, output: str | None = None, **attributes) -> str:
        """Append a node; its output is called as it is, unless `output` says otherwise."""
        output = output or f"{name}/out"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def weight(self, name: str, value: torch.Tensor) -> str:
        """Add an initializer in float32, its bytes at the end of the data file unless they are few."""
        array = np.ascontiguousarray(value.detach().float().numpy())
        if array.nbytes <= SMALL:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self._location, "offset": self._stream.tell(), "length": array.nbytes}
        tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=str(v)) for k, v in place.items())
        array.tofile(self._stream)
        self.initializers.append(tensor)
        return name
