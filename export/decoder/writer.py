"""Nodes of a decoder graph in the order of a forward pass, and weights that are read when they are written."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from runtime.errors import UserError
from runtime.graph_io import KINDS


class GraphWriter:
    """Appends nodes and weights; its methods take and return names of tensors.

    Initializers for weights have a name, a type and a shape; `read` gives their values.

    Args:
        config: as transformers' LlamaForCausalLM has it.
        state: that module's weights by name, of any float type, such as mapped files.
        element: type of weights and activations, of onnx.TensorProto.

    Raises:
        UserError: an activation other than SiLU.
    """

    def __init__(self, config: LlamaConfig, state: dict[str, torch.Tensor], element: int):
        if config.hidden_act != "silu":
            raise UserError(f"hidden_act is {config.hidden_act!r}, but the decoder's graph knows silu alone")
        self.config, self.state, self.element = config, state, element
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._values: dict[str, Callable[[], torch.Tensor]] = {}

    def model(self, name: str, inputs: list, outputs: list, opsets: dict[str, int], ir_version: int) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, name, inputs, outputs, self.initializers)
        imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, producer_name="convllava-deploy")

    def read(self, name: str) -> np.ndarray:
        """Values of a weight; a view of the state's where it is stored so and numpy has its type, else float32."""
        value = self._values[name]().detach()
        return (value if value.dtype in (torch.float16, torch.float32) else value.float()).numpy()

    def node(
        self, operator: str, inputs: list[str], name: str, outputs: str | list[str] | None = None, **attributes: Any
    ) -> str:
        """Append a node and return its first output, `<name>/output_0` unless `outputs` says otherwise."""
        outputs = [f"{name}/output_0"] if outputs is None else [outputs] if isinstance(outputs, str) else outputs
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def integer(self, name: str, value: int | list[int]) -> str:
        self.initializers.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def weight(
        self, name: str, parts: str | Iterable[str], transposed: bool = False, element: int | None = None
    ) -> str:
        """Add tensors of the state as one, one below the other.

        Args:
            transposed: as [in, out].
            element: its type, if that is not the graph's.
        """
        tensors = [self.state[part] for part in ([parts] if isinstance(parts, str) else parts)]

        def value() -> torch.Tensor:
            joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
            return joined.t() if transposed else joined

        shape = [sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:]]
        return self._add(name, shape[::-1] if transposed else shape, value, element)

    def rotary_tables(self, names: tuple[str, str], positions: int) -> None:
        """Cosines and sines, [positions, head_dim / 2]: both halves are alike."""
        rotary = LlamaRotaryEmbedding(self.config)
        tables = rotary(torch.zeros(1), torch.arange(positions)[None])
        for name, table in zip(names, tables, strict=True):
            half = table[0, :, : self.head_dim // 2]
            self._add(name, list(half.shape), lambda half=half: half)

    def caches(self, name: str, positions: str | int) -> list[onnx.ValueInfoProto]:
        shape = ["batch_size", self.kv_heads, positions, self.head_dim]
        names = [f"{name}.{i}.{kind}" for i in range(self.config.num_hidden_layers) for kind in KINDS]
        return [helper.make_tensor_value_info(name, self.element, shape) for name in names]

    def _add(self, name: str, shape: list[int], value: Callable[[], torch.Tensor], element: int | None = None) -> str:
        self.initializers.append(TensorProto(name=name, data_type=element or self.element, dims=shape))
        self._values[name] = value
        return name
