"""A decoder and an encoder of a few lines: what they answer depends on every token and image row they were fed."""

import zlib
from types import SimpleNamespace

import numpy as np

from runtime.errors import InvalidLogitsError
from runtime.generate.sampler import next_token
from runtime.image.embedding_cache import EmbeddingCache
from runtime.image.preprocess import ImageRule
from runtime.model import Model
from runtime.text.template import PLAIN

VOCABULARY = 50
EOS = 2
NAN_TOKEN = VOCABULARY  # never generated; once a sequence was fed it, its logits are NaN
POISON = VOCABULARY + 1  # never generated; a run that feeds it raises
LATE_POISON = VOCABULARY + 2  # never generated; once a sequence was fed it, later runs of that sequence raise


def logits_of(fed: list) -> np.ndarray:
    """[V] float32, a pure function of all that a sequence was fed."""
    if NAN_TOKEN in fed or any(np.isnan(row).any() for row in fed if isinstance(row, tuple)):
        return np.full(VOCABULARY, np.nan, np.float32)
    seed = zlib.crc32(repr(fed).encode())
    return np.random.default_rng(seed).standard_normal(VOCABULARY).astype(np.float32)


def check_poison(fed: list, token_ids: list[int]) -> None:
    if POISON in token_ids or LATE_POISON in fed:
        raise RuntimeError("indices element out of data bounds")


def greedy_answer(fed: list, count: int, eos: frozenset[int] = frozenset({EOS})) -> list[int]:
    """What greedy decoding must answer, computed without any cache."""
    fed, answer = list(fed), []
    while len(answer) < count and not eos & set(answer):
        answer.append(int(logits_of(fed).argmax()))
        fed.append(answer[-1])
    return answer


class FakeSequence:
    """Its KV cache is the list of what it was fed. fault: called before each run, may raise."""

    def __init__(self, capacity: int, fault=lambda: None):
        self.fed, self.capacity, self.fault = [], capacity, fault
        self.runs = []  # how many positions each run fed

    @property
    def length(self) -> int:
        return len(self.fed)

    def rewind(self, length: int) -> None:
        if not 0 <= length <= len(self.fed):
            raise ValueError(f"cannot rewind to {length} positions, the KV cache holds {len(self.fed)}")
        del self.fed[length:]

    def forward(self, token_ids, image_embeddings=None) -> np.ndarray:
        if len(self.fed) + len(token_ids) > self.capacity:
            raise ValueError("positions do not fit")
        self.fault()
        check_poison(self.fed, token_ids)
        self.fed += [token if token >= 0 else tuple(image_embeddings[-1 - token].tolist()) for token in token_ids]
        self.runs.append(len(token_ids))
        return logits_of(self.fed)

    def forward_greedy(self, token_ids, image_embeddings=None) -> int:
        logits = self.forward(token_ids, image_embeddings)
        if np.isnan(logits).any():
            raise InvalidLogitsError
        return int(logits.argmax())

    def forward_sampled(self, token_ids, image_embeddings, sampling, random) -> int:
        return next_token(self.forward(token_ids, image_embeddings), [], sampling, random)


class FakeBatch:
    def __init__(self, count: int, capacity: int, fault):
        self._slots = [FakeSequence(capacity, fault) for _ in range(count)]
        self._logits = np.empty((0, VOCABULARY), np.float32)
        self.fault = fault
        self.steps = []  # how many rows each step had

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> FakeSequence:
        return self._slots[slot]

    def step(self, tokens: list[int]) -> list[int | None]:
        self.fault()
        for slot, token in enumerate(tokens):
            check_poison(self._slots[slot].fed, [token])
        self.steps.append(len(tokens))
        for slot, token in enumerate(tokens):
            self._slots[slot].fed.append(token)
        self._logits = np.stack([logits_of(self._slots[slot].fed) for slot in range(len(tokens))])
        return [None if np.isnan(row).any() else int(row.argmax()) for row in self._logits]

    def logits(self, count: int) -> np.ndarray:
        return self._logits[:count]

    def copy(self, source: int, target: int, length: int) -> None:
        self._slots[target].fed = self._slots[source].fed[:length]

    def swap(self, one: int, other: int) -> None:
        slots = self._slots
        slots[one].fed, slots[other].fed = slots[other].fed, slots[one].fed


class FakeDecoder:
    def __init__(self, capacity: int = 200, fault=lambda: None):
        self.capacity, self.fault = capacity, fault
        self.sequences, self.batches = [], []

    def start(self, capacity: int) -> FakeSequence:
        self.sequences.append(FakeSequence(capacity, self.fault))
        return self.sequences[-1]

    def start_batch(self, count: int, batch_invariant: bool) -> FakeBatch:
        self.batches.append(FakeBatch(count, self.capacity, self.fault))
        return self.batches[-1]


class FakeImage:
    """An image of `tokens` visual tokens whose embeddings repeat its seed."""

    def __init__(self, seed: int, tokens: int = 3):
        self.seed, self.tokens, self.key, self.embeddings = seed, tokens, ("image", seed, tokens), None
        self.pixel_values, self.shape = np.full((3, 1, tokens), seed, np.float32), (1, tokens, 3)

    def rows(self) -> list[tuple]:
        return [(float(self.seed), float(row)) for row in range(self.tokens)]


class FakeEncoder:
    """Embeddings [T, 2]: the image's seed and the row. fault: called before each run, may raise."""

    def __init__(self, batches: bool = False, fault=lambda: None):
        self.batches, self.fault = batches, fault
        self.runs = []  # how many images each run had

    def __call__(self, images: list[np.ndarray]) -> np.ndarray:
        self.fault()
        self.runs.append(len(images))
        rows = [[(pixels[0, 0, 0], row) for row in range(pixels.shape[2])] for pixels in images]
        return np.array([row for image in rows for row in image], np.float32)


class FakeTokenizer:
    """A token a character; DEADLY is one that no decoder takes. Answers read as numbers."""

    DEADLY = "☠"
    eos_token_ids = frozenset({EOS})

    def encode_prompt(self, text: str, image_tokens: list[int]) -> list[int]:
        first, *others = [
            [POISON if character == self.DEADLY else 3 + ord(character) % 47 for character in part]
            for part in text.split("<image>")
        ]
        row = 0
        for count, others_ids in zip(image_tokens, others, strict=True):
            first += [*range(-row - 1, -row - 1 - count, -1), *others_ids]
            row += count
        return first

    def detokenizer(self) -> "FakeTokenizer":
        return self

    def push(self, token: int) -> str:
        return f"{token} "

    def flush(self) -> str:
        return ""


def fake_model(decoder: FakeDecoder | None = None, encoder: FakeEncoder | None = None) -> Model:
    """A Model of fakes. Images must be at least twice as wide as high: a row of 3 or 4 visual tokens each."""
    model = object.__new__(Model)
    model.encoder, model.decoder = encoder or FakeEncoder(), decoder or FakeDecoder()
    model.cache, model.tokenizer = EmbeddingCache(), FakeTokenizer()
    rule = ImageRule((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "any", resolution=2, multiple=1, max_visual_tokens=4)
    model.bundle = SimpleNamespace(image=rule, prompt=PLAIN)
    return model
