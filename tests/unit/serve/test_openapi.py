"""The description of the API."""

import json

import jsonschema
import pytest

from runtime.serve.openapi import document

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}


def referenced(node):
    """Every $ref."""
    if isinstance(node, dict):
        yield from ([node["$ref"]] if "$ref" in node else [])
        for value in node.values():
            yield from referenced(value)
    elif isinstance(node, list):
        for value in node:
            yield from referenced(value)


def validator(name, found=None):
    found = found or document("1", has_keys=False)
    return jsonschema.Draft202012Validator(found | {"$ref": f"#/components/schemas/{name}"})


def test_all_schemas_are_whole():
    found = json.loads(json.dumps(document("1", has_keys=True)))
    schemas = found["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert {name.rpartition("/")[2] for name in referenced(found)} <= schemas.keys()
    for path in found["paths"].values():
        for operation in path.values():
            assert operation["responses"].keys() >= {"200", "default"}


@pytest.mark.parametrize("has_keys", [True, False])
def test_keys_are_wanted_under_v1(has_keys):
    found = document("1", has_keys)
    for path, (operation,) in ((path, methods.values()) for path, methods in found["paths"].items()):
        assert bool(operation.get("security")) == (has_keys and path.startswith("/v1/"))
    assert ("securitySchemes" in found["components"]) == has_keys


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [IMAGE]}]},
        {"stop": "a"},
        {"stop": ["a", "b"]},
        {"stop": None, "temperature": 0, "max_tokens": 1, "stream": True},
        {"mm_processor_kwargs": {"res": 64}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
        {"mood": "good"},
    ],
)
def test_requests_fit_their_schema(change):
    validator("ChatRequest").validate({"messages": [{"role": "user", "content": "What?"}]} | change)


@pytest.mark.parametrize("wrong", [{"messages": []}, {"messages": [{"role": "user", "content": 5}]}, {"stop": 5}])
def test_other_requests_do_not(wrong):
    assert not validator("ChatRequest").is_valid({"messages": [{"role": "user", "content": "What?"}]} | wrong)
