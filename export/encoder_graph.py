"""Encoder and projector as an ONNX graph of standard operators, written tensor by tensor.

    pixel_values [batch, 3, height, width] -> image_embeds [batch, visual_tokens, hidden]

Nodes, their values and weights carry the names of PyTorch's modules: `encoder.stages.2.blocks.0` is that block's
output. Weights of linear layers are stored transposed, [in, out], as MatMul takes them.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from tqdm import tqdm

from export.graphs.store import store
from train.model import ImageEncoder
from train.model.streamed import PROJECTOR, named_blocks

OPSET = 20  # the first with Gelu as one operator
IR_VERSION = 10
NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


def write_encoder(model: ImageEncoder, file: Path, dtype: torch.dtype, external: bool) -> None:
    """Write the graph to `file`, and with `external` its large weights to `file`.data.

    Args:
        model: parameters of any float type, mapped files for instance; one tensor is converted at a time.
        dtype: of inputs, weights and outputs.

    Raises:
        OSError: there is no room.
    """
    if not external:
        onnx.save(_Writer(dtype, None).model(model), str(file))
        return
    with open(f"{file}.data", "wb") as data:
        graph = _Writer(dtype, data).model(model)
    onnx.save(graph, str(file))


class _Writer:
    """Appends nodes and weights in the order of a forward pass; its methods take and return names of values."""

    def __init__(self, dtype: torch.dtype, data: BinaryIO | None):
        self._dtype, self._data = dtype, data
        self._element = helper.np_dtype_to_tensor_dtype(np.dtype(str(dtype).removeprefix("torch.")))
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[TensorProto] = []

    def model(self, model: ImageEncoder) -> onnx.ModelProto:
        x, channels = "pixel_values", 3
        blocks = list(named_blocks(model))
        for name, module in tqdm(blocks, "encoder: weights", unit="block", disable=None):
            if name == PROJECTOR:
                x = self._features(x, channels)
                channels = self._projector(x, name, module, channels)
                continue
            if name == "encoder.stem":
                x = self._norm_map(self._conv(x, f"{name}.0", module[0]), f"{name}.1", module[1], name)
                channels = module[0].out_channels
            elif name.endswith("downsample"):
                x = self._conv(self._norm_map(x, f"{name}.0", module[0]), f"{name}.1", module[1], name)
                channels = module[1].out_channels
            else:
                x = self._block(x, name, module)
        shapes = ["batch", 3, "height", "width"], ["batch", "visual_tokens", channels]
        inputs, outputs = (
            [helper.make_tensor_value_info(value, self._element, shape)]
            for value, shape in zip(("pixel_values", "image_embeds"), shapes, strict=True)
        )
        graph = helper.make_graph(self._nodes, "encoder", inputs, outputs, self._initializers)
        graph.value_info.extend(
            helper.make_tensor_value_info(node.output[0], self._element, None) for node in self._nodes[:-1]
        )
        opset = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="convllava-deploy")

    def _block(self, x: str, name: str, block: nn.Module) -> str:
        """A ConvNeXt block: x + gamma * fc2(gelu(fc1(norm(depthwise(x))))); the linear layers along the last axis."""
        y = self._transpose(self._conv(x, f"{name}.conv_dw", block.conv_dw), NHWC)
        y = self._norm(y, f"{name}.norm", block.norm)
        y = self._gelu(self._linear(y, f"{name}.mlp.fc1", block.mlp.fc1), f"{name}.mlp.act")
        y = self._transpose(self._linear(y, f"{name}.mlp.fc2", block.mlp.fc2), NCHW)
        if block.gamma is not None:
            y = self._node("Mul", [y, self._weight(f"{name}.gamma", block.gamma.reshape(1, -1, 1, 1))], f"{name}.scale")
        return self._node("Add", [y, x], name)

    def _features(self, x: str, channels: int) -> str:
        """[batch, channels, rows, columns] -> [batch, rows * columns, channels], in reading order."""
        shape = TensorProto(name="encoder.shape", data_type=TensorProto.INT64, dims=[3])
        shape.raw_data = np.array([0, channels, -1], np.int64).tobytes()  # 0: as it is
        self._initializers.append(shape)
        flat = self._node("Reshape", [x, shape.name], "encoder.flatten")
        return self._node("Transpose", [flat], "encoder", perm=[0, 2, 1])

    def _projector(self, x: str, name: str, projector: nn.Module, width: int) -> int:
        """Ends in `image_embeds`; returns their width."""
        layers = list(projector.named_children()) or [("", projector)]
        for i, (child, layer) in enumerate(layers):
            path, output = f"{name}.{child}".rstrip("."), "image_embeds" if i == len(layers) - 1 else None
            if isinstance(layer, nn.Identity):
                x = self._node("Identity", [x], output or path)
            elif isinstance(layer, nn.GELU):
                x = self._gelu(x, output or path)
            else:
                assert isinstance(layer, nn.Linear)
                x, width = self._linear(x, path, layer, output), layer.out_features
        return width

    def _conv(self, x: str, name: str, conv: nn.Conv2d, output: str | None = None) -> str:
        inputs = [x, self._weight(f"{name}.weight", conv.weight), self._weight(f"{name}.bias", conv.bias)]
        pads = [int(side) for side in conv.padding]
        return self._node(
            "Conv",
            inputs,
            output or name,
            group=conv.groups,
            pads=[*pads, *pads],
            strides=list(conv.stride),
            dilations=list(conv.dilation),
            kernel_shape=list(conv.kernel_size),
        )

    def _norm_map(self, x: str, name: str, norm: nn.LayerNorm, output: str | None = None) -> str:
        """LayerNorm over the channels of [batch, channels, rows, columns]."""
        y = self._norm(self._transpose(x, NHWC), name, norm)
        return self._transpose(y, NCHW, output)

    def _norm(self, x: str, name: str, norm: nn.LayerNorm) -> str:
        inputs = [x, self._weight(f"{name}.weight", norm.weight), self._weight(f"{name}.bias", norm.bias)]
        return self._node("LayerNormalization", inputs, name, axis=-1, epsilon=norm.eps, stash_type=1)

    def _linear(self, x: str, name: str, linear: nn.Linear, output: str | None = None) -> str:
        product = self._node(
            "MatMul", [x, self._weight(f"{name}.weight", linear.weight, transpose=True)], f"{name}.matmul"
        )
        return self._node("Add", [product, self._weight(f"{name}.bias", linear.bias)], output or name)

    def _gelu(self, x: str, name: str) -> str:
        return self._node("Gelu", [x], name, approximate="none")

    def _transpose(self, x: str, perm: list[int], output: str | None = None) -> str:
        return self._node("Transpose", [x], output or f"{x}.{'nhwc' if perm is NHWC else 'nchw'}", perm=perm)

    def _node(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def _weight(self, name: str, tensor: Tensor, transpose: bool = False) -> str:
        values = tensor.detach().to(self._dtype).numpy()
        values = values.T if transpose else values
        if self._data is None:
            self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        else:
            self._initializers.append(store(name, values, self._data))
        return name
