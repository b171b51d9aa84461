"""Bodies of requests: what is read, what is refused, and the prompt that a conversation becomes."""

import base64
import json
from dataclasses import replace

import pytest
from pydantic import ValidationError

from runtime.serve.protocol import ApiError, ChatRequest, conversation, image_bytes, parsed
from runtime.text.template import CHATML, MARKED_IMAGE_LINE, VICUNA_V1, first_turn, next_turn

USER = {"role": "user", "content": "What is this?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}}


def messages(*given):
    return ChatRequest.model_validate({"messages": list(given)}).messages


def test_a_flood_is_one_error():
    for wrong in ([0] * 100_000, [USER] * 100_000, [USER | {"content": [0] * 100_000}]):
        with pytest.raises(ValidationError) as error:
            ChatRequest.model_validate({"messages": wrong})
        assert error.value.error_count() <= 2  # a content is a text or a list


def test_unknown_fields_are_ignored_and_what_asks_for_nothing_is_taken():
    body = {
        "messages": [USER],
        "store": True,
        "metadata": {"a": "b"},
        "frequency_penalty": 0,
        "tools": [],
        "user": "me",
    }
    chat = ChatRequest.model_validate(body)
    assert (chat.limit, chat.stop, chat.choices) == (None, [], 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("n", 0),
        ("n", 9),
        ("max_tokens", 0),
        ("max_completion_tokens", 1.5),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", ""),
        ("top_logprobs", 21),
        ("top_logprobs", 2),  # without logprobs
        ("stream", "yes"),
        ("frequency_penalty", 0.5),
        ("presence_penalty", 1),
        ("logit_bias", {"50": 1}),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "xml"}),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "input_audio"}]}]),
    ],
)
def test_what_cannot_be_done_is_refused(field, value):
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": [USER]} | {field: value})


def test_the_later_name_of_the_limit_counts():
    assert ChatRequest.model_validate({"messages": [USER], "max_tokens": 5}).limit == 5
    assert ChatRequest.model_validate({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 7}).limit == 7


def test_a_conversation_is_rendered_as_in_training():
    """By hand, for both ways to begin an answer."""
    given = messages(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]},
        {"role": "assistant", "content": "A page."},
        {"role": "user", "content": "And its date?"},
    )
    prompt, images = conversation(given, VICUNA_V1)
    assert prompt == "Be brief. USER: <image>\nWhat is this? ASSISTANT: A page.</s>USER: And its date? ASSISTANT:"
    assert images == [(IMAGE["image_url"]["url"], "messages.1.content.1.image_url")]
    prompt, _ = conversation(given, CHATML)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA page.<|im_end|>\n<|im_start|>user\nAnd its date?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_empty_system_text_is_none_and_not_the_template_s():
    prompt, _ = conversation(messages({"role": "system", "content": ""}, USER), VICUNA_V1)
    assert prompt == first_turn(VICUNA_V1, USER["content"], 0, "") != first_turn(VICUNA_V1, USER["content"], 0)


def said(layout: str) -> list[dict]:
    """Parts of a message: a letter is a text, * an image."""
    return [IMAGE if kind == "*" else {"type": "text", "text": kind} for kind in layout]


@pytest.mark.parametrize("template", [VICUNA_V1, CHATML, replace(VICUNA_V1, image_format=MARKED_IMAGE_LINE)])
@pytest.mark.parametrize(
    ("layout", "prompt"),
    [
        ("a*b*c", "a\n<image>\nb\n<image>\nc"),
        ("*a*", "<image>\na\n<image>"),
        ("a**", "a\n<image>\n<image>"),
        ("**ab", "<image>\n<image>\na\nb"),
        ("**a*", "<image>\n<image>\na\n<image>"),
        ("**", "<image>\n<image>\n"),
        ("a*b", "<image>\na\nb"),  # as in training: train.data.conversation
        ("ab*", "<image>\na\nb"),
        ("*", "<image>\n"),
    ],
)
def test_images_stay_between_their_texts(template, layout, prompt):
    """As `first_turn` has them where a prompt has placeholders, in every turn."""
    parts, count = said(layout), layout.count("*")
    found, images = conversation(messages({"role": "user", "content": parts}), template)
    assert found == first_turn(template, prompt, count)
    assert [path for _, path in images] == [
        f"messages.0.content.{index}.image_url" for index, kind in enumerate(layout) if kind == "*"
    ]
    later = messages(USER, {"role": "assistant", "content": "A"}, {"role": "user", "content": parts})
    assert conversation(later, template)[0].endswith(next_turn(template, prompt, count))
    for cut in range(1, len(parts)):
        merged = ({"role": "user", "content": parts[:cut]}, {"role": "user", "content": parts[cut:]})
        assert conversation(messages(*merged), template)[0] == found, "messages of one role are one"


def test_a_placeholder_within_a_prompt_has_its_marks():
    marked = replace(VICUNA_V1, image_format=MARKED_IMAGE_LINE)
    found, _ = conversation(messages({"role": "user", "content": said("a*b*")}), marked)
    image = "<im_start><image><im_end>"
    assert found.endswith(f"USER: a\n{image}\nb\n{image} ASSISTANT:")


def test_a_placeholder_in_a_text_is_no_image():
    prompt, _ = conversation(messages({"role": "user", "content": "The tag <image> is old."}), VICUNA_V1)
    assert "<image>" not in prompt
    assert "The tag <image > is old." in prompt
    parts = [IMAGE, {"type": "text", "text": "a <image>"}, IMAGE]
    prompt, images = conversation(messages({"role": "user", "content": parts}), VICUNA_V1)
    assert "USER: <image>\na <image >\n<image> ASSISTANT:" in prompt
    assert len(images) == 2


ANSWER = {"role": "assistant", "content": "x"}


def test_a_conversation_may_begin_and_end_with_the_assistant():
    empty = {"role": "user", "content": ""}
    for given, same in (
        ([ANSWER, USER], [empty, ANSWER, USER]),
        ([USER, ANSWER], [USER, ANSWER, empty]),
        ([ANSWER], [empty, ANSWER, empty]),
        ([USER, ANSWER, {"role": "system", "content": "y"}], [{"role": "system", "content": "y"}, USER, ANSWER, empty]),
    ):
        assert conversation(messages(*given), CHATML) == conversation(messages(*same), CHATML)
    prompt, _ = conversation(messages(USER, ANSWER), CHATML)
    assert prompt.endswith("assistant\nx<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("content", ["", None, [], [{"type": "text", "text": ""}]])
def test_an_empty_content_is_an_empty_text(content):
    prompt, _ = conversation(messages({"role": "user", "content": content}), VICUNA_V1)
    assert prompt == first_turn(VICUNA_V1, "", 0)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ([{"role": "system", "content": "x"}, {"role": "developer", "content": "x"}], "messages"),
        ([USER, ANSWER | {"content": said("a*")}, USER], "messages.1.content.1.image_url"),
        ([{"role": "system", "content": [IMAGE]}, USER], "messages.0.content.0.image_url"),
    ],
)
def test_what_is_no_conversation_is_refused(given, param):
    with pytest.raises(ApiError, match=param) as error:
        conversation(messages(*given), VICUNA_V1)
    assert (error.value.status, error.value.param) == (400, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [USER | {"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}, "{}.1.image_url"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": "data:"}]}]}, "{}.0.image_url"),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]}, "{}.0.image_url.url"),
        ({"messages": [USER | {"content": [{"type": "text", "text": 5}]}]}, "{}.0.text"),
        ({"messages": [USER | {"content": [{"type": "input_audio"}]}]}, "{}.0.type"),
        ({"messages": [USER | {"content": [{"text": "a"}]}]}, "{}.0.type"),
        ({"messages": [USER | {"content": ["a"]}]}, "{}.0"),
        ({"messages": [USER | {"content": 5}]}, "{}"),
        ({"messages": [USER, {"role": "tool", "content": "a"}]}, "messages.1.role"),
        ({"messages": [USER, {"content": "a"}]}, "messages.1.role"),
        ({"messages": [5]}, "messages.0"),
        ({"stop": [None]}, "stop.0"),
        ({"stop": 5}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
    ],
)
def test_errors_name_the_part_that_is_wrong(change, param):
    param = param.replace("{}", "messages.0.content")
    with pytest.raises(ApiError) as error:
        parsed(json.dumps({"messages": [USER]} | change).encode())
    assert (error.value.status, error.value.param) == (400, param)
    assert str(error.value).startswith(f"{param}: ")
    assert "Value error" not in str(error.value)


def test_what_was_found_is_said():
    with pytest.raises(ApiError, match="found 'function'"):
        parsed(json.dumps({"messages": [{"role": "function", "content": "a"}]}).encode())
    with pytest.raises(ApiError, match="expected 'text' or 'image_url', found 'input_audio'"):
        parsed(json.dumps({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}).encode())


def test_data_urls_are_decoded_within_a_limit():
    content = bytes(range(100))
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    assert image_bytes(url, 100) == content
    with pytest.raises(ApiError) as error:
        image_bytes(url, 99)
    assert error.value.status == 413


@pytest.mark.parametrize(
    "url",
    ["data:image/png;base64,A", "data:image/png;base64,A*==", "data:image/png,AAAA", "data:;base64,AAAA", "data:x"],
)
def test_other_data_urls_are_refused(url):
    with pytest.raises(ApiError) as error:
        image_bytes(url, 100)
    assert error.value.code == "invalid_image_url"
