"""Bodies of requests: what is read, what is refused, and the prompt that a conversation becomes."""

import base64

import pytest
from pydantic import ValidationError

from runtime.serve.protocol import ApiError, ChatRequest, conversation, image_bytes
from runtime.text.template import CHATML, VICUNA_V1, first_turn

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
    assert (chat.limit, chat.stops, chat.choices) == (None, (), 1)


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
    prompt, urls = conversation(given, VICUNA_V1)
    assert prompt == "Be brief. USER: <image>\nWhat is this? ASSISTANT: A page.</s>USER: And its date? ASSISTANT:"
    assert urls == [IMAGE["image_url"]["url"]]
    prompt, _ = conversation(given, CHATML)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA page.<|im_end|>\n<|im_start|>user\nAnd its date?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_empty_system_text_is_none_and_not_the_template_s():
    prompt, _ = conversation(messages({"role": "system", "content": ""}, USER), VICUNA_V1)
    assert prompt == first_turn(VICUNA_V1, USER["content"], 0, "") != first_turn(VICUNA_V1, USER["content"], 0)


def test_messages_that_follow_one_another_are_one_and_images_come_first():
    given = messages(USER, {"role": "user", "content": [IMAGE, {"type": "text", "text": "Say."}, IMAGE]})
    prompt, urls = conversation(given, VICUNA_V1)
    assert prompt.endswith("USER: <image>\n<image>\nWhat is this?\nSay. ASSISTANT:")
    assert len(urls) == 2


def test_a_placeholder_in_a_text_is_no_image():
    prompt, _ = conversation(messages({"role": "user", "content": "The tag <image> is old."}), VICUNA_V1)
    assert "<image>" not in prompt
    assert "The tag <image > is old." in prompt


@pytest.mark.parametrize(
    "given",
    [
        [{"role": "system", "content": "x"}],
        [USER, {"role": "assistant", "content": "x"}],
        [{"role": "assistant", "content": "x"}, USER],
        [USER, {"role": "assistant", "content": [IMAGE]}, USER],
        [{"role": "system", "content": [IMAGE]}, USER],
    ],
)
def test_what_is_no_conversation_is_refused(given):
    with pytest.raises(ApiError) as error:
        conversation(messages(*given), VICUNA_V1)
    assert (error.value.status, error.value.param) == (400, "messages")


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
