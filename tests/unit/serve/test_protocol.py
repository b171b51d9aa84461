"""Bodies of requests: what is read, what is refused, and the prompt that a conversation becomes."""

import base64
import json
import urllib.parse
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from runtime.serve.protocol import (
    HARMLESS,
    NOT_OFFERED,
    ApiError,
    ChatRequest,
    _percent_decoded,
    conversation,
    ignored_header,
    image_bytes,
    parsed,
)
from runtime.text.template import CHATML, MARKED_IMAGE_LINE, VICUNA_V1, ToolTemplate, first_turn, next_turn
from runtime.types import Sampling

USER = {"role": "user", "content": "What is this?"}
ANSWER = {"role": "assistant", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "description": "Of <image>.", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "high"}}


def messages(*given):
    return ChatRequest.model_validate({"messages": list(given)}).messages


def test_a_flood_is_one_error():
    for wrong in ([0] * 100_000, [USER] * 100_000, [USER | {"content": [0] * 100_000}]):
        with pytest.raises(ValidationError) as error:
            ChatRequest.model_validate({"messages": wrong})
        assert error.value.error_count() <= 2  # a content is a text or a list


def test_nothing_is_wanted_where_nothing_is_said():
    chat = ChatRequest.model_validate({"messages": [USER]})
    assert (chat.limit, chat.stop, chat.choices, chat.sampling) == (None, [], 1, Sampling(temperature=1.0))


def test_fields_of_other_servers_work():
    body = {"messages": [USER], "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    expected = Sampling(0.5, 7, 0.9, 1.2, min_p=0.1)
    assert ChatRequest.model_validate(body).sampling == expected
    assert ChatRequest.model_validate(body | {"top_k": -1}).sampling.top_k == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("logit_bias", {"50": 1}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content", "content": "x"}),
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("guided_choice", ["a"]),
        ("guided_grammar", "root ::= 'a'"),
        ("structured_outputs", {"choice": ["a"]}),
        ("min_tokens", 3),
        ("stop_token_ids", [2]),
        ("bad_words", ["a"]),
        ("best_of", 2),
        ("use_beam_search", True),
        ("length_penalty", 0.5),
        ("include_stop_str_in_output", True),
        ("skip_special_tokens", False),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
        ("echo", True),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"a": 1}),
        ("truncate_prompt_tokens", 5),
        ("logits_processors", ["x"]),
        ("reasoning_effort", "high"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field, value):
    with pytest.raises(ApiError, match=f"^{field} is not offered") as error:
        parsed(json.dumps({"messages": [USER], field: value}).encode())
    assert (error.value.status, error.value.param) == (400, field)


@pytest.mark.parametrize("field", ["function_call", "audio"])
def test_what_is_not_offered_in_messages_is_refused_by_name(field):
    with pytest.raises(ApiError) as error:
        parsed(json.dumps({"messages": [USER, ANSWER | {field: {"id": "x"}}]}).encode())
    assert error.value.param == f"messages.1.{field}"


def test_what_asks_for_nothing_passes():
    for field, values in NOT_OFFERED.items():
        for value in (None, *values):
            assert parsed(json.dumps({"messages": [USER | {field: value}], field: value}).encode()).ignored == []
    harmless = dict.fromkeys(HARMLESS, "x") | {"metadata": {"a": "b"}, "store": True}
    assert parsed(json.dumps({"messages": [USER | {"name": "me"}], **harmless}).encode()).ignored == []


def test_what_is_ignored_is_named():
    finest = {"type": "image_url", "image_url": {"url": "data:", "detail": "finest"}}
    body = {"messages": [USER, {"role": "user", "content": [IMAGE, finest], "mood": "good"}], "temprature": 0.3}
    ignored = parsed(json.dumps(body).encode()).ignored
    assert ignored == ["temprature", "messages.1.mood", "messages.1.content.1.image_url.detail"]
    chosen = body | {"mm_processor_kwargs": {"res": 64}}
    assert parsed(json.dumps(chosen).encode()).ignored[2:] == [
        "messages.1.content.0.image_url.detail",
        "messages.1.content.1.image_url.detail",
    ]
    assert ignored_header(ignored) == {"x-ignored-fields": ", ".join(ignored)}
    assert ignored_header([]) == {}


def test_the_header_of_ignored_fields_is_short_and_plain():
    header = ignored_header(["a\r\nset-cookie: x", "é", "n" * 10_000, *map(str, range(1000))])["x-ignored-fields"]
    assert header.startswith("a??set-cookie??x, ?, nnn")
    assert header.isascii()
    assert len(header) < 1000


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
        ("top_k", -2),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("repetition_penalty", 0),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "xml"}),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "function", "content": "x"}]),
        ("tools", [{"type": "web_search"}]),
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
    assert images == [(IMAGE["image_url"]["url"], "messages.1.content.1.image_url", "high", None, False)]
    prompt, _ = conversation(given, CHATML)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA page.<|im_end|>\n<|im_start|>user\nAnd its date?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_images_may_be_named_or_be_embeddings():
    parts = [
        IMAGE | {"uuid": "a"},
        {"type": "image_url", "image_url": None, "uuid": "a"},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "image_embeds", "uuid": "b"},
    ]
    prompt, images = conversation(messages({"role": "user", "content": parts}), VICUNA_V1)
    assert prompt.count("<image>") == 4
    path = "messages.0.content.{}.{}".format
    assert images == [
        (IMAGE["image_url"]["url"], path(0, "image_url"), "high", "a", False),
        (None, path(1, "image_url"), None, "a", False),
        ("AAAA", path(2, "image_embeds"), None, None, True),
        (None, path(3, "image_embeds"), None, "b", True),
    ]


def test_calls_and_what_they_return_are_part_of_the_conversation():
    """By hand."""
    given = messages(
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "7 <image>"},
    )
    prompt, _ = conversation(given, VICUNA_V1)
    assert prompt == (
        f"{VICUNA_V1.system} USER: What is this? ASSISTANT: "
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call></s>'
        "USER: <tool_response>7 <image ></tool_response> ASSISTANT:"
    )
    own = ToolTemplate("{tools}!", "[{call}]", "({result})")
    prompt, _ = conversation(given, replace(CHATML, tools=own), own.told(["<image>"]))
    assert prompt == (
        "<|im_start|>system\nYou are a helpful assistant.<image >!<|im_end|>\n"
        "<|im_start|>user\nWhat is this?<|im_end|>\n"
        '<|im_start|>assistant\n[{"name": "f", "arguments": {"a": 1}}]<|im_end|>\n'
        "<|im_start|>user\n(7 <image >)<|im_end|>\n<|im_start|>assistant\n"
    )


def test_several_calls_at_once_are_ignored_by_name_where_there_are_tools():
    body = {"messages": [USER], "parallel_tool_calls": True}
    assert parsed(json.dumps(body).encode()).ignored == []
    assert parsed(json.dumps(body | {"tools": [TOOL]}).encode()).ignored == ["parallel_tool_calls"]


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
    assert [image.path for image in images] == [
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


def test_a_conversation_may_begin_and_end_with_the_assistant():
    empty = {"role": "user", "content": ""}
    for found, same in (
        ([ANSWER, USER], [empty, ANSWER, USER]),
        ([USER, ANSWER], [USER, ANSWER, empty]),
        ([ANSWER], [empty, ANSWER, empty]),
        ([USER, ANSWER, {"role": "system", "content": "y"}], [{"role": "system", "content": "y"}, USER, ANSWER, empty]),
    ):
        assert conversation(messages(*found), CHATML) == conversation(messages(*same), CHATML)
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
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": None}]}]}, "{}.0.image_url"),
        ({"messages": [USER | {"content": [{"type": "image_embeds"}]}]}, "{}.0.image_embeds"),
        ({"messages": [USER | {"content": [{"type": "image_url", "uuid": ""}]}]}, "{}.0.uuid"),
        ({"messages": [USER | {"content": [{"type": "image_url", "uuid": "x" * 257}]}]}, "{}.0.uuid"),
        ({"messages": [USER | {"content": [{"type": "input_audio"}]}]}, "{}.0.type"),
        ({"messages": [USER | {"content": [{"text": "a"}]}]}, "{}.0.type"),
        ({"messages": [USER | {"content": ["a"]}]}, "{}.0"),
        ({"messages": [USER | {"content": 5}]}, "{}"),
        ({"messages": [USER, {"role": "function", "content": "a"}]}, "messages.1.role"),
        ({"messages": [USER, USER | {"tool_calls": [CALL]}]}, "messages.1.tool_calls"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{"id": "x"}]}]}, "messages.1.tool_calls.0.function"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"messages": [USER, {"content": "a"}]}, "messages.1.role"),
        ({"messages": [5]}, "messages.0"),
        ({"mm_processor_kwargs": {"size": 5}}, "mm_processor_kwargs.size"),
        ({"mm_processor_kwargs": {"res": "large"}}, "mm_processor_kwargs.res"),
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


KEYS = [
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "url",
    "detail",
    "uuid",
    "tool_calls",
    "schema",
    "json_schema",
    "name",
]
WORDS = [
    "user",
    "assistant",
    "system",
    "tool",
    "text",
    "image_url",
    "image_embeds",
    "data:image/png;base64,AA",
    "<image>",
    "\ud800",
    "",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [*ChatRequest.model_fields, *NOT_OFFERED, "mood"]
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
    optional={
        "content": st.lists(st.sampled_from([IMAGE, *said("ab")])) | JSON,
        "tool_calls": st.lists(st.just(CALL)) | JSON,
    },
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), st.lists(MESSAGE, min_size=1, max_size=4) | JSON)
def test_whatever_is_sent_is_taken_or_an_error_of_the_request(body, sent):
    """And the prompt has as many placeholders as images."""
    try:
        chat = parsed(json.dumps({"messages": sent} | body).encode())
        prompt, images = conversation(chat.messages, CHATML)
    except ApiError as error:
        assert error.status == 400
        assert "\n" not in str(error)
        assert len(str(error)) < 500
        return
    assert prompt.count("<image>") == len(images)
    assert chat.sampling.top_k >= 0
    ignored_header(chat.ignored)


def test_what_was_found_is_said():
    with pytest.raises(ApiError, match="found 'function'"):
        parsed(json.dumps({"messages": [{"role": "function", "content": "a"}]}).encode())
    with pytest.raises(ApiError, match="expected 'text', 'image_url' or 'image_embeds', found 'input_audio'"):
        parsed(json.dumps({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}).encode())


def test_data_urls_are_decoded_within_a_limit():
    content = bytes(range(100))
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    assert image_bytes(url, 100) == content
    with pytest.raises(ApiError) as error:
        image_bytes(url, 99)
    assert error.value.status == 413


CONTENT = bytes(range(256)) * 3  # all letters of base64, two characters of padding short of nothing
ENCODED = base64.b64encode(CONTENT[:-1]).decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + ENCODED,
        "DATA:Image/PNG;Base64," + ENCODED,
        "data:image/png;charset=utf-8;base64," + ENCODED,
        "data:image/svg+xml;name=a b;base64," + ENCODED,
        "data:image/png; base64 ," + ENCODED,
        " data:image/png;base64," + ENCODED + " \n",
        "data:image/png;base64," + "\r\n".join(ENCODED[at : at + 76] for at in range(0, len(ENCODED), 76)),
        "data:image/png;base64," + " \t\f".join(ENCODED),
        "data:image/png;base64," + base64.urlsafe_b64encode(CONTENT[:-1]).decode(),
        "data:image/png;base64," + ENCODED.rstrip("="),
        "data:image/png;base64," + ENCODED.rstrip("=").replace("+", "-"),
        "data:image/png;base64," + urllib.parse.quote(ENCODED, safe=""),
        "data:image/png;base64," + "".join(f"%{ord(one):02x}" for one in ENCODED),
        "data:image/png;base64," + ENCODED.replace("=", "%3D%0A"),
        "data:image/png;base64," + ENCODED + "#fragment",
    ],
    ids=range(15),
)
def test_data_urls_are_read_as_browsers_read_them(url):
    assert "=" in ENCODED
    assert image_bytes(url, len(CONTENT)) == CONTENT[:-1]


@given(st.text("%aF0G=+/ ", max_size=12))
def test_escapes_are_those_of_urllib(text):
    assert _percent_decoded(text.encode()) == urllib.parse.unquote_to_bytes(text)


@given(st.binary(max_size=40), st.sampled_from([0, 1, 2, 3, 57]))
def test_data_urls_of_all_lengths(content, length):
    content = content[:length] or content
    for encoded in (base64.b64encode(content), base64.urlsafe_b64encode(content).rstrip(b"=")):
        assert image_bytes(f"data:image/png;base64,{encoded.decode()}", 40) == content


def test_spaces_do_not_count_for_the_size():
    encoded = base64.b64encode(bytes(100)).decode()
    assert image_bytes("data:image/png;base64," + "\n".join(encoded), 100) == bytes(100)
    with pytest.raises(ApiError) as error:
        image_bytes("data:image/png;base64," + "\n".join(encoded), 99)
    assert error.value.status == 413


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,A",
        "data:image/png;base64,A*==",
        "data:image/png;base64,AA=",
        "data:image/png;base64,AA===",
        "data:image/png;base64,A=A=",
        "data:image/png;base64,AA==AAAA",
        "data:image/png;base64,AAAA%",
        "data:image/png;base64,AAAA%2",
        "data:image/png;base64,AAAA%zz",
        "data:image/png;base64,AAA\u00e9",
        "data:image/png,AAAA",
        "data:;base64,AAAA",
        "data:x",
        "data:image/png" + ";a" * 1_000_000 + ",AAAA",
    ],
    ids=range(14),
)
def test_other_data_urls_are_refused(url):
    with pytest.raises(ApiError) as error:
        image_bytes(url, 100)
    assert error.value.code == "invalid_image_url"


def test_a_key_with_line_breaks_is_refused_on_one_line():
    body = {"messages": [{"role": "user", "content": "Hi"}], "mm_processor_kwargs": {"a\nb\r": 1}}
    with pytest.raises(ApiError) as refused:
        parsed(json.dumps(body).encode())
    assert len(str(refused.value).splitlines()) == 1 and refused.value.param == "mm_processor_kwargs.a?b?"
