"""Answers that follow a JSON schema: which tokens may come next, by llguidance."""

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np

from runtime.errors import UserError

MAX_COMPILED = 8  # schemas that are kept; a server lets one take 64 MiB
MAX_MULTIPLE = 100_000  # of `multipleOf`, without its point: a third of a second
# One space where there may be any: a model that is unsure of an answer would go on with spaces for ever
COMPILING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class SchemaError(UserError):
    """A JSON schema that cannot be followed."""


class Grammars:
    """Makes grammars over a bundle's vocabulary. vocab_size: width of the logits.

    Raises UserError where llguidance is not installed or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: frozenset[int]):
        try:
            import llguidance
        except ImportError as error:
            raise UserError(f"a JSON schema: {error}; pip install '.[schema]'") from error
        self._lib = llguidance
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # by their texts, the oldest first
        self._lock = threading.Lock()
        try:
            plain = without_special_texts(tokenizer.read_text(encoding="utf-8"))
            slices = llguidance.LLTokenizer.json_slices()
            with _as_user_errors():
                self._tokenizer = llguidance.LLTokenizer(plain, vocab_size, sorted(eos_token_ids), slices=slices)
        except (OSError, ValueError, RuntimeError, UserError) as error:
            raise UserError(f"{tokenizer}: llguidance cannot read it: {error}") from error

    def known(self, source: str) -> bool:
        """Whether the source, as of `of_source`, was compiled not long ago."""
        return source in self._compiled

    def of_schema(self, schema: dict[str, Any]) -> "JsonGrammar":
        """A grammar for one answer that follows a JSON schema. Raises UserError as `of_source`."""
        return self.of_source(json.dumps(schema))

    def of_source(self, source: str) -> "JsonGrammar":
        """A grammar for one answer.

        Args:
            source: the text of a JSON schema, or a grammar in llguidance's Lark syntax whose schemas `json_rule` wrote.

        Raises:
            UserError: the schema is none, or has what llguidance cannot do, or `multipleOf` a number of too many
                digits, for which llguidance builds as many states.
        """
        matcher = self._compiled.get(source)
        if matcher is None:
            matcher = self._compile(source)
            with self._lock:
                self._compiled[source] = matcher
                while len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return JsonGrammar(matcher.deep_copy())

    def _compile(self, source: str) -> Any:
        try:
            with _as_user_errors():
                compiler = self._lib.LLMatcher
                if source.startswith("{"):
                    check_multiples(json.loads(source))
                    grammar = compiler.grammar_from_json_schema(source, overrides=COMPILING)
                else:
                    grammar = compiler.grammar_from_lark(source)
                matcher = self._lib.LLMatcher(self._tokenizer, grammar, log_level=0)
        except (ValueError, TypeError) as error:
            raise UserError(f"a JSON schema: {error}") from error
        if matcher.is_error():
            raise UserError(f"a JSON schema: {matcher.get_error().splitlines()[0]}")
        return matcher


def json_rule(schema: dict[str, Any]) -> str:
    """What stands for a JSON text in a Lark grammar; references within the schema stay within it.

    Raises UserError as `Grammars.of_source` for `multipleOf`.
    """
    check_multiples(schema)
    return f"%json {json.dumps(schema | {'x-guidance': COMPILING})}"


def without_special_texts(tokenizer: str) -> str:
    """A tokenizer.json in which no text reads as a special token.

    llguidance tokenizes what a schema fixes, and would take a special token for its text, which is none. Its name is
    put behind a control character, which no JSON text holds unescaped.
    """
    content: dict[str, Any] = json.loads(tokenizer)
    added: list[dict[str, Any]] = content.get("added_tokens") or []
    # llguidance takes those between brackets for special, whatever is said of them
    special = {one["content"] for one in added if one["special"] or re.fullmatch("<.*>", one["content"], re.DOTALL)}

    def renamed(name: str) -> str:
        return f"\x01{name}" if name in special else name

    for token in added:
        token["content"] = renamed(token["content"])
    model: dict[str, Any] = content["model"]
    vocab: dict[str, int] | list[tuple[str, float]] = model["vocab"]  # a list of a unigram model
    if isinstance(vocab, dict):
        model["vocab"] = {renamed(name): token_id for name, token_id in vocab.items()}
    else:
        model["vocab"] = [[renamed(name), score] for name, score in vocab]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed(model["unk_token"])
    content["post_processor"] = None  # names special tokens; what a schema fixes has none
    return json.dumps(content)


@contextmanager
def _as_user_errors() -> Generator[None]:
    """A panic within llguidance, which pyo3 raises as an exception that is no Exception."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise SchemaError(f"a JSON schema: llguidance failed: {str(error)[:200]!r}") from error


def check_multiples(schema: object) -> None:
    """Raises UserError for a `multipleOf` that llguidance does not bound."""
    for value in cast(list[object], schema) if isinstance(schema, list) else ():
        check_multiples(value)
    for key, value in cast(dict[str, object], schema).items() if isinstance(schema, dict) else ():
        if key == "multipleOf" and type(value) in (int, float) and _has_many_states(cast(float, value)):
            raise UserError(f"a JSON schema: multipleOf {value} is not supported, at most {MAX_MULTIPLE}")
        check_multiples(value)


def _has_many_states(multiple: float) -> bool:
    """llguidance builds a state for each remainder, few of them where one digit has zeros after it."""
    if not math.isfinite(multiple):
        return False  # which is no JSON
    _, digits, exponent = Decimal(str(multiple)).normalize().as_tuple()
    whole = int("".join(map(str, digits))) * 10 ** max(0, int(exponent))
    return whole > MAX_MULTIPLE and len(digits) > 1


class JsonGrammar:
    """Where one answer stands. `allow` before each token, `push` after it."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits [V] with minus infinity where a token may not come; the end of the sequence may, once the
        answer is whole. Raises SchemaError where the schema has become too much for llguidance."""
        with _as_user_errors():
            bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():  # it would allow the end alone
            raise SchemaError(f"a JSON schema: {self._matcher.get_error().splitlines()[0]}")
        mask = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        allowed = logits.copy()
        allowed[: len(mask)][mask[: len(logits)] == 0] = -np.inf
        allowed[len(mask) :] = -np.inf
        return allowed

    def push(self, token: int) -> None:
        """The token that was chosen among those allowed."""
        with _as_user_errors():
            self._matcher.consume_token(token)


def read_schema(file: Path) -> dict[str, Any]:
    """Raises UserError where the file is no JSON object."""
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--json-schema {file}: {error}") from error
    if not isinstance(schema, dict):
        raise UserError(f"--json-schema {file}: a schema is a JSON object")
    return cast(dict[str, Any], schema)
