"""What a graph computes on the way to its outputs."""

import shutil
from pathlib import Path

import numpy as np
import onnx

from export.graphs.load import weights_file
from runtime.backends.ort_session import open_session


class Probe:
    """Runs a graph and gives the tensors `names`, inputs of the graph among them.

    folder: where the graph with these outputs is put; it must last as long as the probe.
    """

    def __init__(self, source: Path, names: list[str], folder: Path):
        model = onnx.load(str(source), load_external_data=False)
        inputs = {value.name for value in model.graph.input}
        self._names, self._inner = names, [name for name in names if name not in inputs]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._inner)
        external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        for data in {weights_file(tensor, source) for tensor in external}:
            copy = folder / data.relative_to(source.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data, copy)  # ONNX Runtime looks for it beside the graph
        file = folder / "probe.onnx"
        onnx.save(model, str(file))
        self._session = open_session(file, None)

    def __call__(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """feed: the graph's inputs."""
        found = dict(zip(self._inner, map(np.asarray, self._session.run(self._inner, feed)), strict=True))
        return {name: found[name] if name in found else feed[name] for name in self._names}
