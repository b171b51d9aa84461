"""The bundle's decoder on ONNX Runtime."""

from runtime.backends.graph_sequence import GraphSequence
from runtime.backends.ort_sequence import DecoderGraph, OnnxSequence
from runtime.backends.ort_slots import Slots
from runtime.generate.kv_cache import KVCache, allocate


class OnnxDecoder(DecoderGraph):
    """Starts sequences on a fused graph, see `runtime.backends.base.Decoder`."""

    def start(self, capacity: int) -> GraphSequence:
        part = self.part
        shape = (1, part.kv_heads, capacity, part.kv_width)
        return OnnxSequence(self, KVCache(allocate(part.layers, shape, part.kv_dtype, self.device)))

    def start_batch(self, count: int, batch_invariant: bool) -> Slots:
        min_rows = 2 if batch_invariant and not self.batch_invariant else 1
        return Slots(self, count, self.capacity, min_rows)
