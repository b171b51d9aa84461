"""Decoders of several libraries behind one interface, for `benchmarks.peers.worker`. Nothing of a library is imported
before its class is made, since each may live in an environment of its own."""

import ctypes
import json
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Peer(ABC):
    """One sequence on one library.

    Each keeps what it was fed; `prefill` takes ids [S] or embeds [S, D] float32 after it, `step` one id, and both
    return the likeliest next id; `rewind` forgets all but the first `length` positions.
    """

    embeds = True  # whether `prefill` takes embeds, or ids alone
    batches = False  # whether it has `fork` and `step_rows`

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

    def reserve(self, positions: int, rows: int = 1) -> None:
        """Forget everything; the next work takes so many positions, in so many sequences."""
        self.rewind(0)

    def fork(self, rows: int) -> None:
        """The sequence becomes `rows` of them, until `reserve`."""
        raise NotImplementedError

    def step_rows(self, tokens: list[int]) -> list[int]:
        """One id for each of the rows; returns the likeliest next of each."""
        raise NotImplementedError


class Decoding:
    """The pieces of work. spec: also ids, of the text that all peers are given, and hidden, the width of embeds."""

    def __init__(self, peer: Peer, spec: dict[str, Any]):
        self._peer, self._ids, self._held = peer, spec["ids"], 0  # the context that it holds and has room for
        self._embeds = np.random.default_rng(0).standard_normal((spec["capacity"], spec["hidden"]), np.float32) * 0.1

    def prefill(self, tokens: int) -> dict:
        """Seconds from `tokens` embeds (ids, where the library cannot begin with embeds) to the likeliest next id."""
        self._peer.reserve(tokens + 1)
        self._held = 0
        given = (None, self._embeds[:tokens]) if self._peer.embeds else (self._ids[:tokens],)
        begin = time.perf_counter()
        self._peer.prefill(*given)
        return {"seconds": time.perf_counter() - begin}

    def decode(self, context: int, steps: int, batch: int = 1) -> dict:
        """Seconds of `steps` greedy steps after the first `context` ids, 2 or more, and the ids found.

        batch: sequences, that all begin alike; the ids are those of the last one.
        """
        if batch > 1:
            return self._decode_rows(context, steps, batch)
        if self._held != context:  # no cache is larger than its work
            self._peer.reserve(context + steps + 1)
            self._peer.prefill(self._ids[: context - 1])
        self._peer.rewind(context - 1)
        self._held = context
        token = self._peer.prefill(self._ids[context - 1 : context])
        found = []
        begin = time.perf_counter()
        for _ in range(steps):
            token = self._peer.step(token)
            found.append(token)
        return {"seconds": time.perf_counter() - begin, "ids": found}

    def _decode_rows(self, context: int, steps: int, batch: int) -> dict:
        self._held = 0
        self._peer.reserve(context + steps + 1, batch)
        self._peer.prefill(self._ids[: context - 1])
        self._peer.fork(batch)
        tokens = self._peer.step_rows([self._ids[context - 1]] * batch)
        found = []
        begin = time.perf_counter()
        for _ in range(steps):
            tokens = self._peer.step_rows(tokens)
            found.append(tokens[-1])
        return {"seconds": time.perf_counter() - begin, "ids": found}


class Ours(Peer):
    """The bundle's decoder through `runtime.backends.ort_decoder` and `runtime.backends.ort_slots`."""

    batches = True

    def __init__(self, spec: dict[str, Any]):
        from runtime.backends.memory_plan import DTYPES
        from runtime.backends.select import Backends, open_decoder
        from runtime.bundle.manifest import open_bundle

        bundle = open_bundle(spec["bundle"])
        cache = next(name for name, dtype in DTYPES.items() if dtype == bundle.decoder.kv_dtype)  # whatever is free
        backends = Backends(decoder=spec["products"], threads=spec["threads"], kv_precision=cache)
        self._decoder = open_decoder(bundle, backends)
        self.reserve(spec["capacity"])

    def reserve(self, positions: int, rows: int = 1) -> None:
        from runtime.backends.ort_slots import Slots

        self._slots = Slots(self._decoder, rows, positions)

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        ids = list(range(-1, -1 - len(embeds), -1)) if ids is None else ids
        return self._slots[0].forward_greedy(ids, embeds)

    def rewind(self, length: int) -> None:
        self._slots[0].rewind(length)

    def fork(self, rows: int) -> None:
        for row in range(1, rows):
            self._slots.copy(0, row)

    def step_rows(self, tokens: list[int]) -> list[int]:
        return self._slots.step(tokens)


class LlamaCpp(Peer):
    """llama.cpp through the functions that llama-cpp-python declares, without that package's own loop."""

    batches = True

    def __init__(self, spec: dict[str, Any]):
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(spec["gguf"].encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {spec['gguf']}")
        self._threads, self._context = spec["threads"], None
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.reserve(spec["capacity"])

    def reserve(self, positions: int, rows: int = 1) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        options = self._lib.llama_context_default_params()
        each = -(-positions // 256) * 256  # of a sequence; llama.cpp rounds to its own steps
        options.n_ctx, options.n_batch, options.n_seq_max = each * rows, each, rows
        options.n_threads = options.n_threads_batch = self._threads
        self._context = self._lib.llama_init_from_model(self._model, options)
        self._length = 0

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        count = len(embeds) if ids is None else len(ids)
        self._decode(ids, embeds, [self._length + i for i in range(count)], [0] * count, [False] * (count - 1) + [True])
        self._length += count
        return self._likeliest(-1)

    def fork(self, rows: int) -> None:
        memory = self._lib.llama_get_memory(self._context)
        for row in range(1, rows):
            self._lib.llama_memory_seq_cp(memory, 0, row, -1, -1)

    def step_rows(self, tokens: list[int]) -> list[int]:
        count = len(tokens)
        self._decode(tokens, None, [self._length] * count, list(range(count)), [True] * count)
        self._length += 1
        return [self._likeliest(row) for row in range(count)]

    def _decode(self, ids, embeds, positions: list[int], rows: list[int], wanted: list[bool]) -> None:
        count = len(positions)
        batch = self._lib.llama_batch_init(count, 0 if embeds is None else embeds.shape[1], 1)
        batch.n_tokens = count
        for i in range(count):
            if embeds is None:
                batch.token[i] = ids[i]
            batch.pos[i] = positions[i]
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, rows[i]
            batch.logits[i] = wanted[i]
        if embeds is not None:
            ctypes.memmove(batch.embd, np.ascontiguousarray(embeds, np.float32).ctypes.data, embeds.nbytes)
        code = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode failed with {code}")

    def _likeliest(self, index: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def rewind(self, length: int) -> None:
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), 0, length, -1)
        self._length = length


class Transformers(Peer):
    """transformers' Llama in float32 with its usual cache."""

    batches = True
    dtype = "float32"

    def __init__(self, spec: dict[str, Any]):
        import torch
        from transformers import LlamaForCausalLM

        from train.model import Checkpoint, load_language_state

        torch.set_num_threads(spec["threads"])
        self._torch, dtype = torch, getattr(torch, self.dtype)
        checkpoint = Checkpoint.open(spec["checkpoint"])
        state = load_language_state(checkpoint, dtype)
        config = checkpoint.llama_config
        self._model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()
        self.reserve(spec["capacity"])

    def reserve(self, positions: int, rows: int = 1) -> None:
        from transformers import DynamicCache

        self._cache, self._length = DynamicCache(config=self._model.config), 0

    def prefill(self, ids: list[int] | None, embeds: np.ndarray | None = None) -> int:
        if embeds is None:
            return self._forward(input_ids=self._torch.tensor([ids]))[0]
        return self._forward(inputs_embeds=self._torch.from_numpy(embeds)[None].to(self._model.dtype))[0]

    @property
    def embeddings(self) -> np.ndarray:
        """Of all ids, [V, D]."""
        return self._model.get_input_embeddings().weight.detach().numpy()

    def fork(self, rows: int) -> None:
        self._cache.batch_repeat_interleave(rows)

    def step_rows(self, tokens: list[int]) -> list[int]:
        return self._forward(input_ids=self._torch.tensor(tokens)[:, None])

    def _forward(self, **given) -> list[int]:
        torch = self._torch
        count = next(iter(given.values())).shape[1]
        with torch.inference_mode():
            logits = self._model(
                **given,
                past_key_values=self._cache,
                cache_position=torch.arange(self._length, self._length + count),
                logits_to_keep=1,
            ).logits
        self._length += count
        return logits[:, -1].argmax(-1).tolist()

    def rewind(self, length: int) -> None:
        self._cache.crop(length - self._cache.get_seq_length())  # negative: how many to forget
        self._length = length


class TransformersBf16(Transformers):
    """The same in bfloat16."""

    dtype = "bfloat16"


def static_rewind(cache: Any, length: int) -> None:
    """Since version 5 transformers' static caches count by themselves what was written to them."""
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length.fill_(length)


class TransformersStatic(Transformers):
    """The same with a cache of fixed size, as large as the work; not compiled."""

    batches = False

    def reserve(self, positions: int, rows: int = 1) -> None:
        from transformers import StaticCache

        self._cache, self._length = StaticCache(config=self._model.config, max_cache_len=positions), 0

    def rewind(self, length: int) -> None:
        self._length = length  # positions beyond it are masked and written anew
        static_rewind(self._cache, length)


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
        past = self._past or ()
        self._past = (length and tuple(tuple(part[:, :, :length] for part in layer) for layer in past)) or None
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
        self.reserve(spec["capacity"])

    def reserve(self, positions: int, rows: int = 1) -> None:
        self._capacity = positions
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
    **{f"llama.cpp-{form}": LlamaCpp for form in ("q4_0", "q4_1", "q4_k")},
    "transformers": Transformers,
    "transformers-bf16": TransformersBf16,
    "transformers-static": TransformersStatic,
    "optimum": Optimum,
    "ort-genai": Genai,
}


def start(name: str, spec: dict[str, Any]) -> Decoding:
    """spec: also folders, what each library made for itself, by its name here."""
    spec = {"gguf": spec.get("folders", {}).get(name)} | spec
    return Decoding(PEERS[name](spec), spec)
