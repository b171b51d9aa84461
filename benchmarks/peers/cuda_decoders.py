"""Llama decoders of several libraries on a GPU (or, to try them out, on the CPU), for `benchmarks.peers.worker`.

spec: device, `cuda` or `cpu`; llama, a Hugging Face folder; graph, a folder with our graph and `part.json`; genai, one
with GenAI's; and what `benchmarks.peers.decoders.Decoding` takes.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import decoders
from benchmarks.peers.decoders import Decoding, Peer, Transformers, static_rewind


class Ours(Peer):
    """The fused graph through `runtime.backends.ort_cuda_graph`, or on the CPU `runtime.backends.ort_decoder`."""

    def __init__(self, spec: dict[str, Any]):
        from runtime.backends.ort_decoder import OnnxDecoder
        from runtime.backends.ort_session import open_device
        from runtime.bundle.manifest import DecoderPart

        folder = Path(spec["graph"])
        part = DecoderPart(**json.loads((folder / "part.json").read_text()))
        self._device = open_device(spec["device"])
        if spec["device"] == "cuda":
            from runtime.backends.ort_cuda_graph import CudaGraphDecoder

            self._decoder = CudaGraphDecoder(folder / part.file, part, self._device)
        else:
            self._decoder = OnnxDecoder(folder / part.file, part, spec["threads"])
        self.reserve(spec["capacity"])

    def reserve(self, positions: int, rows: int = 1) -> None:
        self._sequence = None  # hands on its memory to the next
        self._sequence = self._decoder.start(positions)

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        if embeds is None:
            return self._sequence.forward_greedy(ids)
        return self._sequence.forward_greedy(list(range(-1, -1 - len(embeds), -1)), embeds)

    def rewind(self, length: int) -> None:
        self._sequence.rewind(length)


class Torch(Transformers):
    """transformers' Llama as it comes, with its usual cache, in the weights' own type."""

    batches = False

    def __init__(self, spec: dict[str, Any]):
        import torch
        from transformers import LlamaForCausalLM

        self._torch, self._on = torch, spec["device"]
        self._model = LlamaForCausalLM.from_pretrained(spec["llama"], dtype="auto").eval().to(self._on)
        self.reserve(spec["capacity"])

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        if embeds is None:
            return self._forward(input_ids=self._torch.tensor([ids], device=self._on))[0]
        embeds = self._torch.from_numpy(embeds)[None].to(self._on, self._model.dtype)
        return self._forward(inputs_embeds=embeds)[0]

    def _forward(self, **given) -> list[int]:
        torch = self._torch
        count = next(iter(given.values())).shape[1]
        places = torch.arange(self._length, self._length + count, device=self._on)
        with torch.inference_mode():
            model = self._model if count > 1 else self._stepped()
            logits = model(**given, past_key_values=self._cache, cache_position=places, logits_to_keep=1).logits
        self._length += count
        return logits[:, -1].argmax(-1).tolist()

    def _stepped(self):
        return self._model


class TorchStatic(Torch):
    """The same with a cache of fixed size, steps compiled into CUDA graphs."""

    _compiled = None

    def reserve(self, positions: int, rows: int = 1) -> None:
        from transformers import StaticCache

        if self._compiled is None:
            mode = "reduce-overhead" if self._on == "cuda" else "default"
            self._compiled = self._torch.compile(self._model, mode=mode, fullgraph=False)
        self._cache, self._length = StaticCache(config=self._model.config, max_cache_len=positions), 0

    def rewind(self, length: int) -> None:
        self._length = length  # positions beyond it are masked and written anew
        static_rewind(self._cache, length)

    def _stepped(self):
        return self._compiled


class Genai(decoders.Genai):
    """ONNX Runtime GenAI's own loop, on the provider that its own graph was made for."""

    def __init__(self, spec: dict[str, Any]):
        import onnxruntime_genai

        self._lib, self._capacity = onnxruntime_genai, spec["capacity"]
        self._model = onnxruntime_genai.Model(spec["genai"])
        self.rewind(0)


PEERS = {"ours": Ours, "transformers": Torch, "transformers-static": TorchStatic, "ort-genai": Genai}


class DecodingOnGpu(Decoding):
    """The pieces of work, and what the GPU can do at best."""

    def limits(self) -> dict:
        return {"seconds": 0.0, **gpu_limits()}


def gpu_limits() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and operations a second of a product in half precision."""
    import torch

    values = torch.ones(2**29, dtype=torch.float16, device="cuda")
    other, square = torch.empty_like(values), torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    copy = _least(lambda: other.copy_(values))
    product = _least(lambda: square @ square)
    return {"copy": 2 * values.nbytes / copy, "product": 2 * 8192**3 / product}


def _least(work, rounds: int = 20) -> float:
    import torch

    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def start(name: str, spec: dict[str, Any]) -> Decoding:
    return DecodingOnGpu(PEERS[name](spec), spec)
