"""Bodies of POST /v1/chat/completions, up to the prompt and the bytes of each image."""

import json

from runtime.serve.protocol import conversation, ignored_header, image_bytes, parsed
from runtime.text.template import CHATML
from tests.fuzz.json_trees import changed as mutate  # noqa: F401

_PIXEL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}
_NAMED = {"type": "image_url", "image_url": None, "uuid": "page-1"}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_TEXT = {"type": "text", "text": "What is in <image>?"}
_SEEDS = [
    {"messages": [{"role": "user", "content": "Hello"}]},
    {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [_TEXT, _PIXEL, _TEXT, _PIXEL]},
            {"role": "assistant", "content": "A cat.", "name": "x"},
            {"role": "user", "content": [_PIXEL], "tool_calls": []},
        ],
        **{"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["a", "b"], "n": 2},
        **{"logprobs": True, "top_logprobs": 3, "stream": True, "stream_options": {"include_usage": True}},
        **{"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": False, "logit_bias": {}},
    },
    {
        "messages": [
            {"role": "user", "content": [_TEXT, _NAMED]},
            {"role": "assistant", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "3"},
        ],
        **{"tools": [_TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        "mm_processor_kwargs": {"res": 768, "aspect": "pad"},
    },
    {
        "messages": [{"role": "user", "content": [_TEXT]}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
        **{"tools": [], "tool_choice": "none", "reasoning_effort": "none", "user": "u", "max_completion_tokens": 1},
    },
]


def seeds() -> list[bytes]:
    return [json.dumps(seed).encode() for seed in _SEEDS]


def fuzz(content: bytes) -> None:
    chat = parsed(content)
    _ = chat.limit, chat.sampling, chat.choices, chat.response_format and chat.response_format.schema_of
    fields = ignored_header(chat.ignored)
    assert all(value.isascii() and value.isprintable() for value in fields.values())
    prompt, images = conversation(chat.messages, CHATML)
    assert prompt.count("<image>") == len(images)
    for image in images:
        if image.url is not None and not image.is_embeds:
            image_bytes(image.url, 1 << 16)
