"""Decoders of several libraries behind one interface, for `benchmarks.peers.worker`. Nothing of a library is imported
before its class is made, since each may live in an environment of its own."""

import ctypes
import json
from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Peer(ABC):
    """One sequence on one library.

    Each keeps what it was fed; `prefill` takes ids [S] or embeds [S, D] float32 after it, `step` one id, and both
    return the likeliest next id; `rewind` forgets all but the first `length` positions.
    """

    embeds = True  # whether `prefill` takes embeds, or ids alone

    @abstractmethod
    def __init__(self, spec: dict[str, Any]):
        """spec: what `benchmarks.decode` hands to every worker."""

    @abstractmethod
    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        """Feed either; returns the likeliest next id."""

    def step(self, token: int) -> int:
        return self.prefill([token])

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Forget all but the first `length` positions."""

    def reserve(self, positions: int) -> None:
        """Forget everything; the next work takes so many positions."""
        self.rewind(0)


class Ours(Peer):
    """The bundle's decoder through `runtime.decoder`."""

    def __init__(self, spec: dict[str, Any]):
        from runtime.bundle import open_bundle
        from runtime.decoder import Decoder

        bundle = open_bundle(spec["bundle"])
        decoder = Decoder(bundle.path(bundle.decoder.file), bundle.decoder, spec["threads"])
        self._sequence = decoder.start(spec["capacity"])

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        ids = list(range(-1, -1 - len(embeds), -1)) if ids is None else ids
        return self._sequence.forward_greedy(ids, embeds)

    def rewind(self, length: int) -> None:
        self._sequence.rewind(length)


class LlamaCpp(Peer):
    """llama.cpp through the functions that llama-cpp-python declares, without that package's own loop."""

    def __init__(self, spec: dict[str, Any]):
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(spec["gguf"].encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {spec['gguf']}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = spec["capacity"]
        options.n_threads = options.n_threads_batch = spec["threads"]
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self._length = 0

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        count = len(embeds) if ids is None else len(ids)
        batch = self._lib.llama_batch_init(count, 0 if embeds is None else embeds.shape[1], 1)
        batch.n_tokens = count
        for i in range(count):
            if embeds is None:
                batch.token[i] = ids[i]
            batch.pos[i] = self._length + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == count - 1
        if embeds is not None:
            ctypes.memmove(batch.embd, np.ascontiguousarray(embeds, np.float32).ctypes.data, embeds.nbytes)
        code = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")
        self._length += count
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def rewind(self, length: int) -> None:
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, length, -1)
        self._length = length


class Transformers(Peer):
    """transformers' Llama in float32 with its usual cache."""

    def __init__(self, spec: dict[str, Any]):
        import torch
        from transformers import LlamaForCausalLM

        from train.model import Checkpoint, load_language_state

        torch.set_num_threads(spec["threads"])
        self._torch = torch
        checkpoint = Checkpoint.open(spec["checkpoint"])
        state = load_language_state(checkpoint, torch.float32)
        config = checkpoint.llama_config
        self._model = LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32
        ).eval()
        self.reserve(spec["capacity"])

    def reserve(self, positions: int) -> None:
        from transformers import DynamicCache

        self._cache, self._length = DynamicCache(config=self._model.config), 0

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        torch = self._torch
        given = (
            {"input_ids": torch.tensor([ids])} if embeds is None else {"inputs_embeds": torch.from_numpy(embeds)[None]}
        )
        count = len(embeds) if ids is None else len(ids)
        with torch.inference_mode():
            logits = self._model(
                **given,
                past_key_values=self._cache,
                cache_position=torch.arange(self._length, self._length + count),
                logits_to_keep=1,
            ).logits
        self._length += count
        return int(logits[0, -1].argmax())

    def rewind(self, length: int) -> None:
        self._cache.crop(length)
        self._length = length


class TransformersStatic(Transformers):
    """The same with a cache of fixed size, as large as the work; not compiled."""

    def reserve(self, positions: int) -> None:
        from transformers import StaticCache

        self._cache, self._length = StaticCache(config=self._model.config, max_cache_len=positions), 0

    def rewind(self, length: int) -> None:
        self._length = length  # positions beyond it are masked and written anew


class Optimum(Peer):
    """optimum-onnx's ORTModelForCausalLM, exported by it in float32."""

    embeds = False

    def __init__(self, spec: dict[str, Any]):
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = spec["threads"]
        self._torch = torch
        self._model = ORTModelForCausalLM.from_pretrained(
            spec["folders"]["optimum"], use_io_binding=False, session_options=options
        )
        self._past, self._length = None, 0

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        torch = self._torch
        total = self._length + len(ids)
        out = self._model(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones((1, total), dtype=torch.int64),
            position_ids=torch.arange(self._length, total)[None],
            past_key_values=self._past,
        )
        self._past, self._length = out.past_key_values, total
        return int(out.logits[0, -1].argmax())

    def rewind(self, length: int) -> None:
        self._past = (length and tuple(tuple(part[:, :, :length] for part in layer) for layer in self._past)) or None
        self._length = length


class Genai(Peer):
    """ONNX Runtime GenAI's own loop on the graph that its builder writes in int4."""

    embeds = False

    def __init__(self, spec: dict[str, Any]):
        import onnxruntime_genai

        self._lib = onnxruntime_genai
        config = onnxruntime_genai.Config(spec["folders"]["ort-genai"])
        options = {"session_options": {"intra_op_num_threads": spec["threads"]}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = onnxruntime_genai.Model(config)
        self._capacity = spec["capacity"]
        self.rewind(0)

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        self._generator.append_tokens(np.array([ids], np.int32))
        return self.step(None)

    def step(self, token: int | None) -> int:
        """Feeds what it chose itself."""
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def rewind(self, length: int) -> None:
        if length:
            self._generator.rewind_to(length)
        else:
            parameters = self._lib.GeneratorParams(self._model)
            parameters.set_search_options(max_length=self._capacity, do_sample=False)
            self._generator = self._lib.Generator(self._model, parameters)


PEERS = {
    "ours": Ours,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "transformers-static": TransformersStatic,
    "optimum": Optimum,
    "ort-genai": Genai,
}
