"""Schemas whose texts read as special tokens, for the tokenizers that models have."""

import json

import numpy as np
import pytest
import sentencepiece
import tokenizers

import runtime
from runtime.errors import UserError
from runtime.serve.tools import Tool, ToolAnswer, callable_tools
from runtime.text.grammar import Grammars, JsonGrammar
from runtime.types import Options, Sampling
from tests.support.tiny_tokenizers import (
    MODELS,
    SPECIAL_TOKENS,
    add_tokens,
    change,
    export_and_load,
    sentencepiece_checkpoint,
    train_byte_level,
    train_sentencepiece,
)


@pytest.fixture(scope="module", params=["bpe", "unigram", "byte-level"])
def vocabulary(request, tmp_path_factory):
    """(file, runtime's tokenizer, width of the logits, names of special tokens)"""
    folder = tmp_path_factory.mktemp("vocabulary")
    if request.param == "byte-level":
        checkpoint, names = folder / "checkpoint", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        checkpoint.mkdir()
        train_byte_level().save(str(checkpoint / "tokenizer.json"))
        change(checkpoint / "tokenizer_config.json", eos_token="<|endoftext|>")
        change(checkpoint / "config.json", model_type="llama", eos_token_id=0)
    else:
        model = train_sentencepiece(**MODELS[request.param])
        checkpoint = sentencepiece_checkpoint(folder / "checkpoint", model)
        add_tokens(checkpoint, sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size())
        names = SPECIAL_TOKENS
    (folder / "out").mkdir()
    _, tokenizer = export_and_load(checkpoint, folder / "out")
    file = folder / "out/tokenizer.json"
    return file, tokenizer, tokenizers.Tokenizer.from_file(str(file)).get_vocab_size(), names


def answer(vocabulary, schema, seed) -> str:
    """Of a model that knows nothing."""
    file, tokenizer, size, _ = vocabulary
    grammar = Grammars(file, size, tokenizer.eos_token_ids).of_schema(schema)
    random, detokenizer, text = np.random.default_rng(seed), tokenizer.detokenizer(), ""
    for _ in range(500):
        token = int(grammar.allow(random.standard_normal(size).astype(np.float32)).argmax())
        if token in tokenizer.eos_token_ids:
            return (text + detokenizer.flush()).strip()
        grammar.push(token)
        text += detokenizer.push(token)
    raise AssertionError(text)


@pytest.mark.parametrize("around", ["{}", "{}x", "x {}", "a{}{} b", '"{}\\'])
def test_special_tokens_in_a_schema_are_texts(vocabulary, around):
    for seed, name in enumerate(vocabulary[-1]):
        expected = {around.replace("{}", name): around.replace("{}", name)}
        assert json.loads(answer(vocabulary, {"const": expected}, seed)) == expected
        assert json.loads(answer(vocabulary, {"enum": [around.replace("{}", name)]}, seed)) in expected


def test_names_of_special_tokens_are_spelled_where_a_pattern_wants_them(vocabulary):
    for seed, name in enumerate(vocabulary[-1]):
        pattern = "^[ab]{2}" + name.replace("|", "[|]") + "$"
        found = json.loads(answer(vocabulary, {"type": "string", "pattern": pattern}, seed))
        assert found[2:] == name


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


@pytest.mark.parametrize("text", ["x </s>", "</s>", "<s>x", "a</s>b<unk>"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_string_of_the_template_cuts_in_a_schema(model, text, temperature):
    assert model.bundle.prompt.stop == ("</s>",)
    options = Options(100, Sampling(temperature, seed=1), json_schema={"const": text})
    *_, last = model.generate([], "Say.", options)
    assert (json.loads(last.result.text), last.result.finish_reason) == (text, "stop")


def test_a_stop_string_of_the_user_does(model):
    *_, last = model.generate([], "Say.", Options(100, stop=("/s",), json_schema={"const": "x </s>"}))
    assert (last.result.text, last.result.finish_reason) == ('"x <', "stop")


F = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/A"}},
    "required": ["a"],
    "additionalProperties": False,
    "$defs": {"A": {"enum": ["<s>", 5]}},
}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "f", "parameters": F}}),
    Tool.model_validate({"type": "function", "function": {"name": "g.h-1"}}),
]


def called(vocabulary, choice, seed, begin="", schema=None) -> ToolAnswer:
    """Of a model that knows nothing, after what it begins with."""
    file, tokenizer, size, _ = vocabulary
    tools = callable_tools(TOOLS, choice, None)
    grammar = Grammars(file, size, tokenizer.eos_token_ids).of_source(tools.grammar(schema))
    random, answer, given = (
        np.random.default_rng(seed),
        ToolAnswer(tokenizer, (), tools),
        tokenizer.encode(begin, False),
    )
    for _ in range(300):
        logits = random.standard_normal(size).astype(np.float32)
        if given:
            logits[given.pop(0)] = 100
        token = int(grammar.allow(logits).argmax())
        answer.push(token, "stop" if token in tokenizer.eos_token_ids else None)
        if answer.finish_reason is not None:
            return answer
        grammar.push(token)
    answer.push(0, "length")
    return answer


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_follows_its_schema(vocabulary, seed):
    answer = called(vocabulary, "required", seed)
    assert (answer.finish_reason, answer.text) == ("tool_calls", "")
    arguments = json.loads(answer.call.function.arguments)
    assert arguments in ({"f": [{"a": "<s>"}, {"a": 5}], "g.h-1": [{}]}[answer.call.function.name])


def test_an_answer_may_be_a_call_or_a_text(vocabulary):
    answer = called(vocabulary, "auto", 0, "<tool_call>")
    assert (answer.finish_reason, answer.text) == ("tool_calls", "")
    answer = called(vocabulary, "auto", 0, '<tool_call>{"name": "g.')
    assert (answer.call.function.name, answer.call.function.arguments) == ("g.h-1", "{}")
    for begin in ("It is", "a <tool_call>x", "<b>"):
        answer = called(vocabulary, "auto", 0, begin)
        assert answer.call is None
        assert answer.text.strip().startswith(begin)
    answers = [called(vocabulary, "auto", seed, schema={"const": {"x": 1}}) for seed in range(3)]
    assert {answer.text for answer in answers} <= {"", '{"x": 1}'}
    assert all((answer.call is None) == (answer.text != "") for answer in answers)


class PanicException(BaseException):
    """As pyo3's, which is no Exception."""


class _Panicking:
    def __getattr__(self, name):
        if name == "is_error":
            return lambda: False
        raise PanicException("index out of bounds: the len is 3\nbut the index is 5")


def test_a_panic_is_an_error_of_one_request(vocabulary, monkeypatch):
    grammar = JsonGrammar(_Panicking())
    for call in (lambda: grammar.allow(np.zeros(4, np.float32)), lambda: grammar.push(1)):
        with pytest.raises(UserError, match="a JSON schema: llguidance failed: 'index out of bounds") as error:
            call()
        assert "\n" not in str(error.value)
    grammars = Grammars(vocabulary[0], vocabulary[2], vocabulary[1].eos_token_ids)
    monkeypatch.setattr(grammars, "_lib", _Panicking())
    with pytest.raises(UserError, match="llguidance failed"):
        grammars.of_schema({"type": "object"})


def test_what_is_no_panic_passes_through():
    class Interrupted:
        def compute_bitmask(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        JsonGrammar(Interrupted()).allow(np.zeros(4, np.float32))


@pytest.mark.parametrize("multiple", [999_983.0, 1.0000019e7, 999_910, 640_000, 123_456.5, -999_983])
def test_a_multiple_of_many_states_is_refused_at_once(vocabulary, multiple):
    file, tokenizer, size, _ = vocabulary
    grammars = Grammars(file, size, tokenizer.eos_token_ids)
    for schema in ({"type": "number", "multipleOf": multiple}, {"items": [{"anyOf": [{"multipleOf": multiple}]}]}):
        with pytest.raises(UserError, match=r"multipleOf .* is not supported"):
            grammars.of_schema(schema)


@pytest.mark.parametrize("multiple", [True, None, "7", [], float("inf"), float("nan")])
def test_a_multiple_that_is_no_number_is_named(vocabulary, multiple):
    file, tokenizer, size, _ = vocabulary
    with pytest.raises(UserError, match="a JSON schema: "):
        Grammars(file, size, tokenizer.eos_token_ids).of_schema({"type": "integer", "multipleOf": multiple})


@pytest.mark.parametrize("multiple", [1, 7, 0.01, 12, 250, 1500, 5_000_000, 100_000, 1e5, 99_991])
def test_usual_multiples_are_taken(vocabulary, multiple):
    file, tokenizer, size, _ = vocabulary
    Grammars(file, size, tokenizer.eos_token_ids).of_schema({"type": "number", "multipleOf": multiple})
