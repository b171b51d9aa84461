"""Pictures and a question -> an answer, piece by piece: the parts of a bundle chained.

image -> preprocess -> encoder -> image embeds -+
                                                +-> prefill -> token -> decode one token at a time -> text
prompt -> template -> token ids ----------------+

model = runtime.load("bundle")
for piece in model.generate(["page.png"], "What is the total?"):
    print(piece.text, end="", flush=True)
print(piece.result.timings.ttft_ms)
"""

import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike

import numpy as np
from PIL import Image

from runtime.backends.base import Sequence as DecoderSequence
from runtime.backends.select import Backends, open_parts
from runtime.bundle.manifest import Bundle, opening
from runtime.device.memory import Array, concatenate, to_numpy
from runtime.errors import UserError
from runtime.generate.sampler import Sampling, next_token
from runtime.image.embedding_cache import DEFAULT_BYTES, EmbedsCache
from runtime.image.input import Picture
from runtime.text import template as prompts
from runtime.text.grammar import Grammars, JsonGrammar
from runtime.text.stop import Answer
from runtime.text.tokenizer import Tokenizer
from runtime.types import ImageSource, Options, Piece, Result, Timings, Trace


@dataclass(frozen=True)
class _Pictures:
    """The images of a turn: the visual tokens of each, and their embeds [sum of T, D] on the encoder's device.
    pixel_values: float32 [3, H, W] of those that were encoded now."""

    tokens: list[int]
    embeds: Array | None
    pixel_values: list[np.ndarray]
    preprocess_ms: float
    encode_ms: float


class Model:
    """A loaded bundle. Make it with `runtime.load`."""

    def __init__(self, bundle: Bundle, backends: Backends | None = None, cache_bytes: int = DEFAULT_BYTES):
        begin = time.perf_counter()
        self.bundle = bundle
        self.cache = EmbedsCache(cache_bytes)
        self.tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer)
        parts = open_parts(bundle, backends or Backends())
        self.encoder, self.decoder = parts.encoder, parts.decoder
        self.encoder_chosen, self.decoder_chosen = parts.encoder_chosen, parts.decoder_chosen
        self.load_ms = _ms_since(begin)

    @cached_property
    def grammars(self) -> Grammars:
        """For answers that follow a schema. Raises UserError as `Grammars`."""
        bundle, tokenizer = self.bundle, self.tokenizer
        file = bundle.path(bundle.tokenizer["file"])
        return Grammars(file, bundle.decoder.vocab_size, tokenizer.eos_token_ids)

    def generate(
        self,
        images: Sequence[ImageSource],
        prompt: str,
        options: Options | None = None,
        trace: Trace | None = None,
    ) -> Iterator[Piece]:
        """Answer one question.

        images: files, bytes or PIL images; `<image>` in the prompt says where each goes, else they come first.
        trace: filled with intermediate values if given.
        Yields a Piece for each new token; the last one carries the Result.
        Raises UserError (at the first piece) for a bad image, more images than placeholders, or a prompt that does not
        fit the context.
        """
        return Conversation(self, options, single_turn=True).ask(prompt, images, trace)

    def chat(self, options: Options | None = None) -> "Conversation":
        """A conversation of several turns, whose images and answers are computed once."""
        return Conversation(self, options)

    def about(self, images: Sequence[ImageSource], options: Options | None = None) -> "Questions":
        """Questions that do not know of each other, about the same images, which are encoded and prefilled once."""
        return Questions(self, images, options)


class Conversation:
    """Turns that share a KV cache, which has room for the whole context; with single_turn, for one question and its
    answer alone."""

    def __init__(self, model: Model, options: Options | None = None, single_turn: bool = False):
        self._model = model
        self._options = options or Options()
        self._single_turn = single_turn
        self._sequence = None  # from the first prefill on
        self._unfed: list[int] = []  # tokens of the last answer that the cache does not hold
        self._turn = 0  # how many were begun

    def ask(self, prompt: str, images: Sequence[ImageSource] = (), trace: Trace | None = None) -> Iterator[Piece]:
        """As `Model.generate`, after the turns before. Leaving the iterator early ends the answer there, and so does
        the next turn; a turn that fails or is interrupted before its first piece leaves the conversation as it was.

        Raises UserError as `Model.generate`, and where an answer goes on after another turn was begun.
        """
        begin = time.perf_counter()
        ids, limit, pictures = self._inputs(prompt, _several(images), trace)
        sequence = self._sequence or self._start(len(ids) + limit)
        yield from self._answer(sequence, ids, limit, pictures, trace, begin)

    def _answer(
        self,
        sequence: DecoderSequence,
        ids: list[int],
        limit: int,
        pictures: "_Pictures",
        trace: Trace | None,
        begin: float,
    ) -> Iterator[Piece]:
        """Prefill `ids`, then decode. begin: when the call began."""
        prefill_begin = time.perf_counter()
        options = self._options
        grammar = self._model.grammars.of_schema(options.json_schema) if options.json_schema is not None else None
        choose = _Choice(options.sampling, grammar)
        before = sequence.cache.length
        try:
            if trace is None:
                token = choose.after(sequence, ids, pictures.embeds)
            else:
                logits = sequence.forward(ids, pictures.embeds)
                trace.pixel_values, trace.first_logits = pictures.pixel_values, logits.copy()
                trace.image_embeds = None if pictures.embeds is None else to_numpy(pictures.embeds)
                token = choose.among(logits)
        except BaseException:  # an interrupt may come once the cache is longer
            sequence.rewind(before)
            raise
        prefill_ms = _ms_since(prefill_begin)
        self._sequence, self._unfed = sequence, []

        def finish(answer: Answer, first_ms: float, decode_s: float) -> Result:
            generated = answer.token_ids
            rate = (len(generated) - 1) / decode_s if len(generated) > 1 else None
            timings = Timings(pictures.preprocess_ms, pictures.encode_ms, prefill_ms, first_ms, rate)
            visual_tokens = 0 if pictures.embeds is None else len(pictures.embeds)
            return Result(answer.text, generated, answer.finish_reason, visual_tokens, len(ids), timings)

        yield from self._decode(token, limit, begin, choose, finish)

    def _start(self, single_turn_length: int = 0) -> DecoderSequence:
        capacity = single_turn_length if self._single_turn else self._model.decoder.capacity
        return self._model.decoder.start(capacity)

    def _inputs(
        self, prompt: str, images: Sequence[ImageSource], trace: Trace | None = None
    ) -> tuple[list[int], int, "_Pictures"]:
        """(prompt ids, below 0 for each image embed; how many new tokens may come; the images).

        Whether all of it fits the context is settled before anything large is computed.
        """
        begin = time.perf_counter()
        pictures = [Picture(self._model, source, self._options) for source in images]
        tokens = [picture.tokens for picture in pictures]
        ids = self._prompt_ids(prompt, tokens)
        limit = self._limit(ids)
        cache = EmbedsCache(0) if trace is not None else self._model.cache
        keys = [picture.key for picture in pictures] if cache.max_bytes else list(range(len(pictures)))
        known = {key: cache.get(key) for key in keys}
        missing = {key: picture for key, picture in zip(keys, pictures, strict=True) if known[key] is None}
        pixel_values = [picture.pixel_values for picture in missing.values()]
        preprocess_ms = _ms_since(begin)
        begin = time.perf_counter()
        for key, pixels in zip(missing, pixel_values, strict=True):
            known[key] = self._model.encoder([pixels])
            cache.put(key, known[key])
        embeds = concatenate([known[key] for key in keys]) if keys else None
        return ids, limit, _Pictures(tokens, embeds, pixel_values, preprocess_ms, _ms_since(begin))

    def _prompt_ids(self, prompt: str, image_tokens: list[int]) -> list[int]:
        template, tokenizer = self._model.bundle.prompt, self._model.tokenizer
        if self._sequence is None:
            text = prompts.first_turn(template, prompt, len(image_tokens), self._options.system)
            return tokenizer.encode_prompt(text, image_tokens)
        text = prompts.next_turn(template, prompt, len(image_tokens))
        return self._unfed + tokenizer.encode_prompt(text, image_tokens, continued=True)

    def _limit(self, ids: list[int]) -> int:
        """How many new tokens may come after `ids`."""
        context = self._model.decoder.capacity
        used = self._sequence.cache.length if self._sequence else 0
        room = context - used - len(ids)
        if room < 1:
            visual = sum(token < 0 for token in ids)
            before = f" after the {used} of the turns before" if used else ""
            raise UserError(
                f"prompt of {len(ids)} tokens ({visual} of them visual){before} is longer than the context of {context}"
            )
        return min(self._options.max_new_tokens, room)

    def _decode(
        self, token: int, limit: int, begin: float, choose: "_Choice", finish: Callable[..., Result]
    ) -> Iterator[Piece]:
        """token: the first one. finish: makes the Result."""
        stop = (*self._model.bundle.prompt.stop, *self._options.stop)
        answer = Answer(self._model.tokenizer, stop, limit)
        first_ms, decode_s = 0.0, 0.0
        prefilled = self._sequence.cache.length
        self._turn += 1
        turn = self._turn
        while answer.finish_reason is None:
            step = time.perf_counter()  # what the consumer of the pieces takes is not ours
            if answer.token_ids:
                if turn != self._turn:
                    raise UserError("this answer was ended by another question; ask one after the other")
                token = choose.after(self._sequence, answer.token_ids[-1:])
                self._unfed = []
            elapsed = _ms_since(begin)
            if answer.token_ids:
                decode_s += time.perf_counter() - step
            else:
                first_ms = elapsed
            text = answer.push(token)
            self._unfed = answer.unfed
            if answer.before_stop is not None:  # what was not shown is not part of the conversation
                self._sequence.rewind(prefilled + answer.before_stop)
            result = finish(answer, first_ms, decode_s) if answer.finish_reason else None
            yield Piece(text, token, elapsed, result)


class _Choice:
    """Chooses the tokens of one answer, one after the other."""

    def __init__(self, sampling: Sampling, grammar: JsonGrammar | None):
        self._sampling, self._grammar = sampling, grammar
        self._random = np.random.default_rng(sampling.seed)
        self._chosen: list[int] = []

    def after(self, sequence: DecoderSequence, ids: list[int], embeds: Array | None = None) -> int:
        """Feed `ids` and choose the token after them; where a device can choose, the logits stay there."""
        if self._sampling.greedy and self._grammar is None:
            return sequence.forward_greedy(ids, embeds)
        if self._sampling.plain and self._grammar is None:
            return sequence.forward_sampled(ids, embeds, self._sampling, self._random)
        return self.among(sequence.forward(ids, embeds))

    def among(self, logits: np.ndarray) -> int:
        """From logits [V]."""
        if self._grammar is not None:
            logits = self._grammar.allow(logits)
        token = next_token(logits, self._chosen, self._sampling, self._random)
        self._chosen.append(token)
        if self._grammar is not None:
            self._grammar.push(token)
        return token


class Questions(Conversation):
    """Questions about the same images, each answered as if it were the only one.

    What the prompts have in common up to the first token that differs, the images above all, stays in the KV cache.
    """

    def __init__(self, model: Model, images: Sequence[ImageSource], options: Options | None = None):
        """Nothing is computed before the first question."""
        super().__init__(model, options)
        self._images = _several(images)
        self._seen: _Pictures | None = None  # once they are encoded
        self._held: list[int] = []  # ids of the last prompt, which the KV cache still begins with

    def ask(self, prompt: str, trace: Trace | None = None) -> Iterator[Piece]:
        """As `Model.generate` with the images: the same tokens. The Result's prompt_tokens are those prefilled anew.

        An answer that is under way ends there, even if this question fails; going on with it raises UserError.
        """
        begin = time.perf_counter()
        if self._sequence is None:
            ids, limit, pictures = self._inputs(prompt, self._images, trace)
            sequence, kept = self._start(), 0
            # what they cost the next questions
            self._seen = replace(pictures, pixel_values=[], preprocess_ms=0.0, encode_ms=0.0)
        else:
            sequence, pictures = self._sequence, self._seen
            text = prompts.first_turn(self._model.bundle.prompt, prompt, len(pictures.tokens), self._options.system)
            ids = self._model.tokenizer.encode_prompt(text, pictures.tokens)
            # The last id is fed in any case, for its logits. A prefill that failed left the cache shorter than its ids.
            kept = common_length(self._held[: sequence.cache.length], ids[:-1])
            self._turn += 1  # an answer under way has no place to go on from, whatever becomes of this one
            sequence.rewind(kept)
            limit = self._limit(ids[kept:])
        self._held = ids
        yield from self._answer(sequence, ids[kept:], limit, pictures, trace, begin)


def _several(images: ImageSource | Sequence[ImageSource]) -> list[ImageSource]:
    return [images] if isinstance(images, str | bytes | PathLike | Image.Image) else list(images)


def common_length(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many items the two begin with alike."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def load(
    bundle: str | PathLike | None = None,
    threads: int | None = None,
    backends: Backends | None = None,
    cache_bytes: int = DEFAULT_BYTES,
) -> Model:
    """Open a bundle and load its parts.

    bundle: the folder; None takes the demo model's and makes it first if need be. threads: of one operator; None takes
    what `backends` says, or one a physical core. backends: what runs the parts; None: ONNX Runtime on the CPU, or a
    TensorRT engine where one fits. cache_bytes: of image embeds that are kept, so that a picture seen before is not
    encoded again; 0 keeps none.
    Raises UserError for a bundle that is missing, damaged or of another format, and for a backend that cannot be had.
    """
    backends = backends or Backends()
    if threads is not None:
        backends = replace(backends, threads=threads)
    with opening(bundle) as opened:
        return Model(opened, backends, cache_bytes)


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1000
