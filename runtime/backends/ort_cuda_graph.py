"""Decoding that stays on the GPU: a step begins with the token that the step before has left there.

A step has the same addresses and shapes each time, so ONNX Runtime captures its kernels as one CUDA graph and replays
it. The token is the argmax, an output of the graph, or sampled from the logits by a second small graph, for which the
host sends nothing but the next random number. The next step is put into the stream before the host has read the token
of the last one; if that token was the last of the answer, one step was computed for nothing, and is forgotten.
"""

import itertools
import logging
import weakref
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession

from runtime.backends.graph_sequence import GraphSequence
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.ort_sequence import OnnxSequence
from runtime.backends.ort_session import bind_input, bind_output, open_session, run_options
from runtime.bundle.manifest import DecoderPart
from runtime.device.cuda import Cuda, CudaEvent
from runtime.device.memory import Array, CudaArray
from runtime.errors import InvalidLogitsError, UserError
from runtime.generate.kv_cache import KVCache, allocate
from runtime.graph_io import ATTENTION_MASK, IMAGE_EMBEDS, INPUT_IDS, LOGITS, NEXT_TOKEN, PAST, PRESENT
from runtime.types import Sampling

logger = logging.getLogger("convllava.backends")

MIN_CAPACITY = 256  # positions; capacities are powers of two from there on, so that few are captured, and kept


class CudaGraphDecoder(OnnxDecoder):
    """A fused graph on ONNX Runtime's CUDA provider. Its sequences hand on what they have captured once they are gone:
    ONNX Runtime keeps a captured graph as long as the session.

    sampler: the graph that samples tokens; None, or one that cannot be captured, leaves that to the host.
    Raises UserError where ONNX Runtime cannot capture a step, which is where the CUDA provider lacks an operator, and
    for a graph without the argmax as an output.
    """

    def __init__(self, file: Path, part: DecoderPart, device: Cuda, sampler: Path | None = None):
        super().__init__(file, part, provider="cuda", device=device, cuda_graph=True)
        if not self.has_argmax:
            raise UserError(f"{file} has no output {NEXT_TOKEN}, which decoders have if they are exported anew")
        self.gpu = device
        self.sampler: InferenceSession | None = None
        self._idle: dict[int, list[_Captured]] = {}
        self._numbers = itertools.count(1)
        # Whether it can be captured shows in the first run alone, and how it fails is ONNX Runtime's affair
        try:
            self.start(MIN_CAPACITY).forward_greedy([0])
        except Exception as error:
            raise UserError(f"{file}: ONNX Runtime cannot record its steps: {error}") from error
        if sampler:
            try:
                self.sampler = open_session(sampler, None, "cuda", device, cuda_graph=True)
                self.start(MIN_CAPACITY).forward_sampled([0], None, Sampling(temperature=1.0), np.random.default_rng(0))
            except Exception as error:
                self.sampler = None
                logger.warning("tokens are sampled on the host: %s cannot be captured: %s", sampler, error)

    def start(self, capacity: int) -> "CudaGraphSequence":
        """A new sequence with room for `capacity` positions or some more."""
        capacity = min(max(MIN_CAPACITY, 1 << (capacity - 1).bit_length()), self.capacity)
        idle = self._idle.setdefault(capacity, [])
        captured = idle.pop() if idle else _Captured(self, capacity, next(self._numbers))
        captured.cache.rewind(0)
        sequence = CudaGraphSequence(self, captured)
        weakref.finalize(sequence, idle.append, captured)
        return sequence


class _Captured:
    """What the captured step of one sequence reads and writes, always at the same addresses. number: by which ONNX
    Runtime knows it."""

    def __init__(self, decoder: CudaGraphDecoder, capacity: int, number: int):
        device, part = decoder.gpu, decoder.part
        shape = (1, part.kv_heads, capacity, part.head_dim)
        self.cache = KVCache(allocate(part.layers, shape, part.kv_dtype, device))
        self.logits = device.zeros((1, 1, part.vocab_size), part.kv_dtype)
        self.token = device.zeros((1, 1), np.int64)
        self.argmax = device.zeros((1, 1, 1), np.int64)
        # As wide as the cache is long; the filled positions are 1, and attention goes by their number
        self.mask = device.zeros((1, capacity), np.int64)
        self.ones = device.take(np.ones(capacity), np.int64)
        self.binding = decoder.session.io_binding()
        inputs = {INPUT_IDS: self.token, ATTENTION_MASK: self.mask, IMAGE_EMBEDS: decoder.no_images}
        outputs = {LOGITS: self.logits, NEXT_TOKEN: self.argmax}
        for name, array in (inputs | self.cache.tensors(PAST)).items():
            bind_input(self.binding, name, array, device)
        for name, array in (outputs | self.cache.tensors(PRESENT)).items():
            bind_output(self.binding, name, array, device)
        self.options = run_options(device, number)
        self.tokens_read = [device.pinned((1, 1, 1), np.int64) for _ in range(2)]
        self.draws: _SamplerGraph | None = None  # once one was asked for


class _SamplerGraph:
    """What the graph that draws a token reads and writes, for one sequence."""

    def __init__(self, decoder: CudaGraphDecoder, captured: _Captured, session: InferenceSession):
        device, self._vocab_size = decoder.gpu, decoder.part.vocab_size
        self._device, self._session, self._options = device, session, captured.options
        self.token = device.zeros((1, 1, 1), np.int64)
        types = {"temperature": np.float64, "top_k": np.int64, "top_p": np.float64, "random": np.float64}
        self._settings = {name: device.zeros((1,), dtype) for name, dtype in types.items()}
        self._numbers = [device.pinned((1,), np.float64) for _ in range(2)]
        self._binding = session.io_binding()
        for name, array in ({LOGITS: captured.logits} | self._settings).items():
            bind_input(self._binding, name, array, device)
        bind_output(self._binding, NEXT_TOKEN, self.token, device)

    def begin(self, sampling: Sampling) -> None:
        """Draw by `sampling` from now on."""
        top_k = min(sampling.top_k or self._vocab_size, self._vocab_size)
        for name, value in (("temperature", sampling.temperature), ("top_k", top_k), ("top_p", sampling.top_p)):
            array = self._settings[name]
            self._device.copy(array, self._device.take([value], array.dtype))

    def draw(self, random: np.random.Generator, turn: int) -> None:
        """Put a draw into the stream. turn: 0 and 1 in turn, so that a number is sent before its place is used anew."""
        self._numbers[turn][0] = random.random()
        self._device.upload(self._settings["random"], self._numbers[turn])
        self._session.run_with_iobinding(self._binding, self._options)


class CudaGraphSequence(GraphSequence):
    """One sequence; see the module. Prompts, and tokens that are chosen on the host, take the way of `OnnxSequence`."""

    def __init__(self, decoder: CudaGraphDecoder, captured: _Captured):
        super().__init__(captured.cache, captured.logits, captured.argmax)
        self._decoder, self._device, self._session, self._captured = decoder, decoder.gpu, decoder.session, captured
        self._vocab_size = decoder.part.vocab_size  # what is drawn where that cannot be
        self._prompts: GraphSequence = OnnxSequence(decoder, captured.cache, captured.logits, captured.argmax)
        self._shown = -1  # positions that are 1 in the mask; -1: unknown
        self._expected: int | None = None  # the token that was returned last, while it is what the next step is fed
        # After which its successor can be read, if that step is in the stream already
        self._ahead: CudaEvent | None = None
        self._turn = 0
        self._sampling: Sampling | None = None  # by which tokens are drawn, with the numbers of `_random`
        self._random: np.random.Generator | None = None

    def forward_greedy(self, token_ids: list[int], image_embeddings: Array | None = None) -> int:
        """As `GraphSequence.forward_greedy`. Where `token_ids` is the token that the call before returned,
        nothing goes to the GPU, and the step has usually begun already."""
        return self._forward(token_ids, image_embeddings, None, None)

    def forward_sampled(
        self, token_ids: list[int], image_embeddings: Array | None, sampling: Sampling, random: np.random.Generator
    ) -> int:
        """As `GraphSequence.forward_sampled`; as `forward_greedy` but for a random number that goes to the
        GPU. `random` is one number ahead of the tokens that were returned."""
        if (sampler := self._decoder.sampler) is None:
            return super().forward_sampled(token_ids, image_embeddings, sampling, random)
        self._captured.draws = self._captured.draws or _SamplerGraph(self._decoder, self._captured, sampler)
        return self._forward(token_ids, image_embeddings, sampling, random)

    def rewind(self, length: int) -> None:
        if length != self.cache.length:
            self._forget()
        super().rewind(length)

    def _forward(
        self,
        token_ids: list[int],
        image_embeddings: Array | None,
        sampling: Sampling | None,
        random: np.random.Generator | None,
    ) -> int:
        total = self.cache.room_for(len(token_ids))
        if sampling != self._sampling or random is not self._random:
            self._forget()
            self._sampling, self._random = sampling, random
            if sampling and self._captured.draws:
                self._captured.draws.begin(sampling)
        if image_embeddings is not None or self._expected is None or token_ids != [self._expected]:
            self._run(token_ids, image_embeddings)
            event = self._choose()
        elif self._ahead is not None:
            event, self._ahead = self._ahead, None
        else:
            event = self._step()
        self.cache.length = total
        slot = self._turn
        if total < self.cache.capacity:
            self._ahead = self._step()
            self.cache.length = total  # the caller has not asked for it yet
        self._device.wait(event)
        self._expected = int(self._captured.tokens_read[slot][0, 0, 0])
        if self._expected == self._vocab_size:
            raise InvalidLogitsError
        return self._expected

    def _run(self, token_ids: list[int], image_embeddings: Array | None) -> None:
        self._forget()
        self._prompts._run(token_ids, image_embeddings)

    def _forget(self) -> None:
        """A step ahead was for nothing: what it wrote lies behind the cache's length, and will be written over."""
        self._ahead = self._expected = None

    def _step(self) -> CudaEvent:
        """Feed the token that was chosen last; returns the event after which the next one can be read."""
        captured, device = self._captured, self._device
        total = self.cache.room_for(1)
        self._show(total)
        device.copy(captured.token, self._chosen())
        self._session.run_with_iobinding(captured.binding, captured.options)
        self.cache.length = total
        return self._choose()

    def _chosen(self) -> CudaArray:
        """Where the token that was chosen last lies."""
        captured = self._captured
        return captured.draws.token if self._sampling and captured.draws else captured.argmax

    def _choose(self) -> CudaEvent:
        """Choose the next token and begin to copy it to the host."""
        self._turn = 1 - self._turn
        if self._random and self._captured.draws:
            self._captured.draws.draw(self._random, self._turn)
        return self._device.begin_download(self._captured.tokens_read[self._turn], self._chosen())

    def _show(self, total: int) -> None:
        """Make the first `total` positions of the mask 1 and all others 0."""
        mask, ones, shown = self._captured.mask, self._captured.ones, self._shown
        row = mask.reshape((self.cache.capacity,))
        if not 0 <= shown <= total:
            self._device.fill(row, 0)
            shown = 0
        if shown < total:
            self._device.copy(row[shown:total], ones[shown:total])
        self._shown = total
