"""Rendered prompts against the conformance data, LLaVA's conversation templates and SmolLM2's chat template; stop
strings against cutting the whole text."""

import json
import random
from dataclasses import asdict, replace

import jinja2
import pytest

from runtime.errors import UserError
from runtime.text.stop import StopStrings
from runtime.text.template import (
    CHATML,
    MARKED_IMAGE_LINE,
    PLAIN,
    TEMPLATES,
    VICUNA_V1,
    PromptTemplate,
    ToolTemplate,
    first_turn,
    next_turn,
)

# HuggingFaceTB/SmolLM2-135M-Instruct, tokenizer_config.json (Apache 2.0)
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)


SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def smollm2(*messages: tuple[str, str]) -> str:
    """As transformers' apply_chat_template(add_generation_prompt=True)."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    listed = [{"role": role, "content": content} for role, content in messages]
    return environment.from_string(SMOLLM2_TEMPLATE).render(messages=listed, add_generation_prompt=True)


def test_vicuna_like_the_original(conformance):
    for case in json.loads((conformance / "reference.json").read_text())["cases"]:
        assert first_turn(VICUNA_V1, case["prompt"], images=1) == case["conversation"]


def test_vicuna_follow_up():
    assert next_turn(VICUNA_V1, "And now?") == "</s>USER: And now? ASSISTANT:"
    assert next_turn(VICUNA_V1, "And this?", images=1) == "</s>USER: <image>\nAnd this? ASSISTANT:"


def test_plain_is_nothing_but_the_prompt():
    assert first_turn(PLAIN, "A caption of this:", images=1) == "<image>\nA caption of this:\n"
    assert next_turn(PLAIN, "more") == "\nmore\n"
    assert PLAIN.stop == ("\n",)


def test_chatml_like_smollm2():
    template = replace(CHATML, system=SMOLLM2_SYSTEM)
    assert first_turn(template, "Hi there.", images=0) == smollm2(("user", "Hi there."))
    first = first_turn(template, "Hi.", images=0, system="Be brief.")
    assert first == smollm2(("system", "Be brief."), ("user", "Hi."))
    conversation = first + "Hello!" + next_turn(template, "Bye.")
    expected = [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello!"), ("user", "Bye.")]
    assert conversation == smollm2(*expected)


def test_system_text_can_be_replaced_or_emptied():
    assert first_turn(VICUNA_V1, "Hi", images=0, system="Be brief.") == "Be brief. USER: Hi ASSISTANT:"
    assert first_turn(VICUNA_V1, "Hi", images=0, system="") == " USER: Hi ASSISTANT:"


def test_one_placeholder_for_each_image_in_front():
    assert first_turn(PLAIN, "Compare.", images=3) == "<image>\n<image>\n<image>\nCompare.\n"
    marked = replace(PLAIN, image_format=MARKED_IMAGE_LINE)
    assert first_turn(marked, "Look.", images=1) == "<im_start><image><im_end>\nLook.\n"


def test_placeholders_of_the_prompt_stay_where_they_are():
    assert first_turn(PLAIN, "Is <image> like <image>?", images=2) == "Is <image> like <image>?\n"
    assert next_turn(PLAIN, "or <image>?", images=1) == "\nor <image>?\n"


@pytest.mark.parametrize(("prompt", "images"), [("<image>", 0), ("<image>", 2), ("<image><image> a", 1)])
def test_placeholders_of_the_prompt_must_match_images(prompt, images):
    for render in (first_turn, next_turn):
        with pytest.raises(UserError, match=f"{prompt.count('<image>')} <image> .* {images} image"):
            render(VICUNA_V1, prompt, images)


def test_braces_in_texts_mean_nothing():
    text = first_turn(VICUNA_V1, "{prompt} {system} {0} {", images=0, system="{prompt} {system} }")
    assert text == "{prompt} {system} } USER: {prompt} {system} {0} { ASSISTANT:"


# Manifest

TOOLS = ToolTemplate("{tools}", "<call>{call}", "{result}")


@pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), replace(CHATML, image_format=MARKED_IMAGE_LINE, tools=TOOLS)]
)
def test_manifest_holds_the_whole_template(template):
    section = json.loads(json.dumps(template.to_dict()))
    assert PromptTemplate.from_dict(section) == template


@pytest.mark.parametrize("key", VICUNA_V1.to_dict())
def test_manifest_lacks_a_key_or_has_the_wrong_type(key):
    section = VICUNA_V1.to_dict()
    with pytest.raises(UserError, match=f"'{key}' is 1;"):
        PromptTemplate.from_dict({**section, key: 1})
    del section[key]
    with pytest.raises(UserError, match=f"lacks key '{key}'"):
        PromptTemplate.from_dict(section)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("system_format", "no place"),
        ("turn_format", "{prompt} {prompt}"),
        ("image_format", "<img>"),
        ("stop", ["a", ""]),
        ("stop", "</s>"),
    ],
)
def test_manifest_with_a_useless_value(key, value):
    with pytest.raises(UserError, match=f"'{key}' is "):
        PromptTemplate.from_dict({**VICUNA_V1.to_dict(), key: value})


@pytest.mark.parametrize("change", [
    {"system_format": "no place"},
    {"call_format": "{call} <call>"},
    {"call_format": "<call>{call}{call}"},
    {"result_format": 1},
    {"colour": "red"},
])  # fmt: skip
def test_manifest_with_useless_tools(change):
    section = {**VICUNA_V1.to_dict(), "tools": asdict(TOOLS) | change}
    with pytest.raises(UserError, match=f"'tools' .*{next(iter(change))}"):
        PromptTemplate.from_dict(section)
    for tools in (None, "x", {}):
        with pytest.raises(UserError, match="'tools' has \\[\\]; expected"):
            PromptTemplate.from_dict(section | {"tools": tools})


def test_manifest_with_an_unknown_key():
    with pytest.raises(UserError, match="unknown key 'colour'"):
        PromptTemplate.from_dict({**VICUNA_V1.to_dict(), "colour": "red"})


# Stop strings


def run(stop: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    """Texts emitted, the flushed one last, and whether it stopped."""
    stops, stopped, texts = StopStrings(stop), False, []
    for piece in pieces:
        text, stopped = stops.push(piece)
        texts.append(text)
    return [*texts, stops.flush()], stopped


def test_text_is_held_only_while_it_may_be_a_stop_string():
    assert run(("</s>",), ["a<", "/", "b</s", "x"]) == (["a", "", "</b", "</sx", ""], False)
    assert run(("</s>",), ["a</", "s"]) == (["a", "", "</s"], False)


def test_nothing_comes_after_a_stop_string():
    assert run(("</s>",), ["a <", "/s", "> b", "c"]) == (["a ", "", "", "", ""], True)
    assert run(("\n",), ["one\ntwo\n", "three"]) == (["one", "", ""], True)


def test_first_complete_stop_string_wins():
    assert run(("abc", "b"), ["xabc"]) == (["xa", ""], True)
    assert run(("bc", "abc"), ["xabc"]) == (["x", ""], True)
    assert run((), ["a", "b"]) == (["a", "b", ""], False)


def test_cut_does_not_depend_on_the_pieces():
    rng = random.Random(0)
    for _ in range(3000):
        stop = tuple({"".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))})
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ends = [end for end in range(1, len(text) + 1) if text[:end].endswith(stop)]
        longest = max((len(s) for s in stop if ends and text[: ends[0]].endswith(s)), default=0)
        expected = text[: ends[0] - longest] if ends else text
        texts, stopped = run(stop, pieces)
        assert ("".join(texts), stopped) == (expected, bool(ends)), (stop, pieces)
