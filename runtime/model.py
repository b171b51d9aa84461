"""Images and a question -> an answer, piece by piece: the components of a bundle chained.

image -> preprocess -> encoder -> image embeddings -+
                                                    +-> prefill -> token -> decode one token at a time -> text
prompt -> template -> token IDs --------------------+

model = runtime.load("bundle")
for piece in model.generate(["page.png"], "What is the total?"):
    print(piece.text, end="", flush=True)
print(piece.result.timings.ttft_ms)
"""

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import cast

import numpy as np
from PIL import Image

from runtime.backends.base import Sequence as DecoderSequence
from runtime.backends.select import Backends, open_components
from runtime.bundle.manifest import Bundle, opening
from runtime.device.memory import Array, to_numpy
from runtime.errors import UserError
from runtime.generate.sampler import Sampler
from runtime.generate.session import Generation, NextToken, Prompt, Session
from runtime.image.embedding_cache import DEFAULT_BYTES, EmbeddingCache
from runtime.image.input import ImageInput
from runtime.text.grammar import Grammars
from runtime.text.stop import Answer
from runtime.text.template import first_turn, next_turn
from runtime.text.tokenizer import Tokenizer
from runtime.types import ImageSource, Options, Piece, Result, Timings, Trace

Images = ImageSource | Sequence[ImageSource]
SINGLE_IMAGES = (str, PathLike, bytes, bytearray, memoryview, np.ndarray, Image.Image)


@dataclass(frozen=True)
class _Encoded:
    """Images of a turn as (key, embeddings [T, D]), and what they took. pixel_values: of those encoded now."""

    images: list[tuple[Hashable, Array]]
    pixel_values: list[np.ndarray]
    preprocess_ms: float
    encode_ms: float

    @property
    def visual_tokens(self) -> int:
        return sum(len(rows) for _, rows in self.images)


class Model:
    """A loaded bundle. Make it with `runtime.load`."""

    def __init__(self, bundle: Bundle, backends: Backends | None = None, cache_bytes: int = DEFAULT_BYTES):
        begin = time.perf_counter()
        self.bundle = bundle
        self.cache = EmbeddingCache(cache_bytes)
        self.tokenizer = Tokenizer(bundle.path(bundle.tokenizer["file"]), bundle.tokenizer, bundle.decoder.vocab_size)
        components = open_components(bundle, backends or Backends())
        self.encoder, self.encoder_backend = components.encoder, components.encoder_backend
        self.decoder, self.decoder_backend = components.decoder, components.decoder_backend
        self.load_ms = _ms_since(begin)

    @cached_property
    def grammars(self) -> Grammars:
        """For answers that follow a schema. Raises UserError as `Grammars`."""
        file = self.bundle.path(self.bundle.tokenizer["file"])
        return Grammars(file, self.bundle.decoder.vocab_size, self.tokenizer.eos_token_ids)

    def generate(
        self,
        images: Images,
        prompt: str,
        options: Options | None = None,
        trace: Trace | None = None,
    ) -> Iterator[Piece]:
        """Answer one question.

        Args:
            images: files, bytes or PIL images.
            prompt: the question; `<image>` in it says where each image goes, else they come first.
            options: how to answer.
            trace: filled with intermediate values if given.

        Yields:
            A Piece for each new token; the last one carries the Result.

        Raises:
            UserError: at the first piece, for a bad image, more images than placeholders, or a prompt that does not fit
                the context.
        """
        return Conversation(self, options, single_turn=True).ask(prompt, images, trace)

    def chat(self, options: Options | None = None) -> "Conversation":
        """A conversation of several turns, whose images and answers are computed once."""
        return Conversation(self, options)

    def about(
        self, images: Images, options: Options | None = None, image_embeddings: Sequence[Array] | None = None
    ) -> "Questions":
        """Independent questions about the same images, which are encoded and prefilled once.

        Args:
            images: files, bytes or PIL images.
            options: how to answer.
            image_embeddings: [T, D] of each image where they were computed elsewhere, in place of `images`.
        """
        return Questions(self, images, options, image_embeddings)

    def open_images(self, images: Images, options: Options) -> list[ImageInput]:
        """Images opened and sized. Raises UserError as `ImageInput`."""
        single = isinstance(images, SINGLE_IMAGES) or hasattr(images, "read")
        several = cast(Sequence[ImageSource], [images] if single else images)
        return [ImageInput(image, self.bundle.image, options) for image in several]

    def new_tokens(self, token_ids: list[int], options: Options, before: int = 0) -> int:
        """How many new tokens may come after the prompt `token_ids`, which follows `before` positions.

        Raises:
            UserError: the prompt does not fit the context.
        """
        context = self.decoder.capacity
        room = context - before - len(token_ids)
        if room < 1:
            visual = sum(token < 0 for token in token_ids)
            earlier = f" after the {before} of the turns before" if before else ""
            raise UserError(
                f"prompt of {len(token_ids)} tokens ({visual} of them visual){earlier} is longer than the context of "
                f"{context}"
            )
        return min(options.max_new_tokens, room)

    def begin(self, limit: int, options: Options) -> tuple[Generation, Answer]:
        """The tokens and the text of a new answer of at most `limit` tokens. Raises UserError as `grammars`."""
        grammar = self.grammars.of_schema(options.json_schema) if options.json_schema is not None else None
        generation = Generation(Sampler(options.sampling, grammar), limit, self.tokenizer.eos_token_ids)
        # A grammar ends by itself, and its texts may hold what ends another answer
        stop = (*(() if grammar else self.bundle.prompt.stop), *options.stop)
        return generation, Answer(self.tokenizer, stop)


class _Answers:
    """What conversations and independent questions share: a session and the answer under way in it."""

    def __init__(self, model: Model, options: Options | None, single_turn: bool = False):
        self._model, self._options, self._single_turn = model, options or Options(), single_turn
        self._session: Session | None = None  # from the first prefill on
        self._turn = 0  # how many were begun

    def _encode(self, images: list[ImageInput], begin: float, traced: bool) -> _Encoded:
        """Embeddings of the images, from the model's cache where it has them. A traced turn encodes all of its own."""
        cache = EmbeddingCache(0) if traced else self._model.cache
        # Without a cache nothing is hashed: each image is then like no other, also none of another turn
        keys: list[Hashable] = [image.key if cache.max_bytes else object() for image in images]
        known = {key: cache.get(key) for key in keys}
        missing = {key: image for key, image in zip(keys, images, strict=True) if known[key] is None}
        pixel_values = [image.pixel_values for image in missing.values()]
        preprocess_ms = _ms_since(begin)
        begin = time.perf_counter()
        for key, pixels in zip(missing, pixel_values, strict=True):
            known[key] = rows = self._model.encoder([pixels])
            cache.put(key, rows)
        encoded = [(key, rows) for key in keys if (rows := known[key]) is not None]
        return _Encoded(encoded, pixel_values, preprocess_ms, _ms_since(begin))

    def _answer(
        self, prompt: Prompt, limit: int, encoded: _Encoded, trace: Trace | None, begin: float
    ) -> Iterator[Piece]:
        """Prefill the prompt, then decode. begin: when the call began."""
        prefill_begin = time.perf_counter()
        model = self._model
        generation, answer = model.begin(limit, self._options)
        next_token = generation.sampler.after
        if self._session is None:
            capacity = len(prompt.token_ids) + limit if self._single_turn else model.decoder.capacity
            self._session = Session(model.decoder, capacity)
        session, cached = self._session, self._session.cached(prompt)
        self._turn += 1
        turn = self._turn
        token = session.prefill(prompt, next_token if trace is None else _traced(generation.sampler, trace))
        if trace is not None:
            trace.pixel_values = encoded.pixel_values
            embeddings = [to_numpy(rows) for _, rows in encoded.images]
            trace.image_embeds = np.concatenate(embeddings) if embeddings else None
        prefill_ms, first_ms, decode_s = _ms_since(prefill_begin), 0.0, 0.0
        self._began(prompt, answer)
        while True:
            elapsed = _ms_since(begin)
            first_ms = first_ms or elapsed
            generation.push(token)
            text = answer.push(token, generation.finish_reason)
            if answer.finish_reason is not None:
                break
            yield Piece(text, token, elapsed)
            if turn != self._turn:
                raise UserError("this answer was ended by another question; ask one after the other")
            step_begin = time.perf_counter()  # what the consumer of the pieces takes is not ours
            token = session.step(token, next_token)
            decode_s += time.perf_counter() - step_begin
        count = len(generation.token_ids)
        rate = (count - 1) / decode_s if count > 1 else None
        timings = Timings(encoded.preprocess_ms, encoded.encode_ms, prefill_ms, first_ms, rate)
        new_positions = len(prompt.token_ids) - cached
        result = Result(
            answer.text, generation.token_ids, answer.finish_reason, encoded.visual_tokens, new_positions, timings
        )
        yield Piece(text, token, elapsed, result)

    def _began(self, prompt: Prompt, answer: Answer) -> None:
        """Called once the first token of an answer is there."""


class Conversation(_Answers):
    """Turns that share a KV cache, which has room for the whole context; with single_turn, for one question and its
    answer alone."""

    _prompt: Prompt | None = None  # of the last turn, everything before it included
    _last: Answer | None = None

    def ask(self, prompt: str, images: Images = (), trace: Trace | None = None) -> Iterator[Piece]:
        """As `Model.generate`, after the turns before. Leaving the iterator early ends the answer there, and so does
        the next turn; a turn that fails or is interrupted before its first piece leaves the conversation as it was.

        Raises:
            UserError: as `Model.generate`, and where an answer goes on after another turn was begun.
        """
        begin = time.perf_counter()
        opened = self._model.open_images(images, self._options)
        tokens = [image.tokens for image in opened]
        template, tokenizer = self._model.bundle.prompt, self._model.tokenizer
        if self._prompt is None or self._last is None:
            before, answer_ids = Prompt(), []
            text = first_turn(template, prompt, len(tokens), self._options.system)
            token_ids = tokenizer.encode_prompt(text, tokens)
        else:
            before, answer_ids = self._prompt, self._last.kept_ids
            text = next_turn(template, prompt, len(tokens))
            token_ids = tokenizer.encode_prompt(text, tokens, continued=True)
        positions = len(before.token_ids) + len(answer_ids)
        limit = self._model.new_tokens(token_ids, self._options, positions)  # before anything large is computed
        encoded = self._encode(opened, begin, trace is not None)
        whole = before.followed_by(answer_ids, Prompt.of(token_ids, encoded.images))
        yield from self._answer(whole, limit, encoded, trace, begin)

    def _began(self, prompt: Prompt, answer: Answer) -> None:
        self._prompt, self._last = prompt, answer


class Questions(_Answers):
    """Questions about the same images, each answered as if it were the only one."""

    def __init__(
        self,
        model: Model,
        images: Images,
        options: Options | None = None,
        image_embeddings: Sequence[Array] | None = None,
    ):
        """See `Model.about`. Nothing is computed before the first question."""
        super().__init__(model, options)
        self._images = images
        self._encoded: _Encoded | None = None  # once they are
        if image_embeddings is not None:
            self._encoded = _Encoded(list(enumerate(image_embeddings)), [], 0.0, 0.0)

    def ask(self, prompt: str, trace: Trace | None = None) -> Iterator[Piece]:
        """As `Model.generate` with the images: the same tokens. The Result's prompt_tokens are those prefilled anew.

        An answer that is under way ends there; going on with it raises UserError.
        """
        begin = time.perf_counter()
        opened = [] if self._encoded else self._model.open_images(self._images, self._options)
        tokens = [len(rows) for _, rows in self._encoded.images] if self._encoded else [one.tokens for one in opened]
        text = first_turn(self._model.bundle.prompt, prompt, len(tokens), self._options.system)
        token_ids = self._model.tokenizer.encode_prompt(text, tokens)
        limit = self._model.new_tokens(token_ids, self._options)
        encoded = self._encoded or self._encode(opened, begin, trace is not None)
        self._encoded = replace(encoded, pixel_values=[], preprocess_ms=0.0, encode_ms=0.0)  # for the next questions
        yield from self._answer(Prompt.of(token_ids, encoded.images), limit, encoded, trace, begin)


def _traced(sampler: Sampler, trace: Trace) -> NextToken:
    """As `sampler.after`, with the logits noted."""

    def next_token(sequence: DecoderSequence, token_ids: list[int], image_embeddings: Array | None) -> int:
        logits = sequence.forward(token_ids, image_embeddings)
        trace.first_logits = logits.copy()
        return sampler.choose(logits)

    return next_token


def load(
    bundle: str | PathLike[str],
    threads: int | None = None,
    backends: Backends | None = None,
    cache_bytes: int = DEFAULT_BYTES,
) -> Model:
    """Open a bundle and load its components.

    Args:
        bundle: the folder.
        threads: of one operator on the CPU; None takes what `backends` says, or one per physical core.
        backends: what runs the components; None: ONNX Runtime on the CPU, or a TensorRT engine where one fits.
        cache_bytes: of image embeddings that are kept, so that an image seen before is not encoded again; 0 keeps none.

    Raises:
        UserError: the bundle is missing, damaged or of another format, or a backend cannot be had.
    """
    backends = backends or Backends()
    if threads is not None:
        backends = replace(backends, threads=threads)
    with opening(bundle) as opened:
        return Model(opened, backends, cache_bytes)


def _ms_since(begin: float) -> float:
    return (time.perf_counter() - begin) * 1000
