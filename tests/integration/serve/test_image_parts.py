"""Images that are named once and images as embeddings, in vLLM's content parts."""

import base64
import io

import numpy as np
import openai
import pytest

import runtime
from runtime.serve.named_images import NamedImages
from tests.support.served import Served, asked, picture


@pytest.fixture(scope="module")
def model(conformance_bundle):
    return runtime.load(conformance_bundle)


@pytest.fixture(scope="module")
def served(model):
    server = Served(model, api_keys=("one", "two"), takes_embeds=True)
    yield server
    server.close()


def create(server, parts, key="one", **options):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *parts]}]
    options = {"temperature": 0, "max_tokens": 8} | options
    return server.client(key).chat.completions.create(model=server.model.bundle.name, messages=messages, **options)


def sent(image, **more):
    return {**asked("", image)[0]["content"][1], **more}


def named(uuid, kind="image_url"):
    return {"type": kind, kind: None, "uuid": uuid}


def test_an_image_sent_once_is_named_afterwards(served, model):
    page = picture(21)
    plain = create(served, [sent(page)])
    first = create(served, [sent(page, uuid="page 1")])
    again = create(served, [named("page 1")])
    without = create(served, [{"type": "image_url", "uuid": "page 1"}])
    assert {answer.choices[0].message.content for answer in (plain, first, again, without)} == {
        plain.choices[0].message.content
    }
    assert again.usage.prompt_tokens == plain.usage.prompt_tokens
    model.cache._entries.clear()  # its embeddings are gone
    assert create(served, [named("page 1")]).choices[0].message.content == plain.choices[0].message.content


def test_a_name_may_stand_for_another_image_later(served):
    pages = [picture(22), picture(23)]
    expected = [create(served, [sent(page)], logprobs=True).choices[0].logprobs.content[0].logprob for page in pages]
    assert expected[0] != expected[1]
    for page, logprob in zip(pages, expected, strict=True):
        create(served, [sent(page, uuid="changing")])
        found = create(served, [named("changing")], logprobs=True).choices[0].logprobs.content[0].logprob
        assert found == pytest.approx(logprob, abs=1e-4)


@pytest.mark.parametrize(("uuid", "key", "kind"), [
    ("never sent", "one", "image_url"),
    ("mine", "two", "image_url"),
    ("mine", "one", "image_embeds"),
    ("broken", "one", "image_url"),
])  # fmt: skip
def test_an_unknown_name_is_told_so(served, uuid, key, kind):
    create(served, [sent(picture(24), uuid="mine")])
    with pytest.raises(openai.BadRequestError):
        create(served, [sent(b"no image", uuid="broken")])
    with pytest.raises(openai.NotFoundError, match=f"no image is known by the uuid '{uuid}'") as error:
        create(served, [sent(picture(24)), named(uuid, kind)], key=key)
    body = error.value.body
    assert (body["code"], body["param"]) == ("unknown_image_uuid", f"messages.0.content.2.{kind}")


def test_names_are_forgotten_where_there_is_no_room(served, monkeypatch):
    monkeypatch.setattr(served.service, "_named", NamedImages(max_count=1))
    for uuid in ("a", "b"):
        create(served, [sent(picture(25), uuid=uuid)])
    with pytest.raises(openai.NotFoundError):
        create(served, [named("a")])
    assert create(served, [named("b")]).choices[0].message.content


def test_a_part_without_an_image_and_a_name_is_refused(served):
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content\.1\.image_url: expected an image"):
        create(served, [{"type": "image_url", "image_url": None}])


def embeds(array, **more):
    file = io.BytesIO()
    np.save(file, array)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(file.getvalue()).decode(), **more}


def test_embeddings_stand_for_an_image(served, model):
    """Those that the encoder computes give the answer that the image gives."""
    page = picture(26)
    expected = create(served, [sent(page)])
    computed = np.asarray(next(reversed(model.cache._entries.values())), np.float32)
    found = create(served, [embeds(computed, uuid="computed")])
    assert found.choices[0].message.content == expected.choices[0].message.content
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
    again = create(served, [named("computed", "image_embeds")])
    assert again.choices[0].message.content == expected.choices[0].message.content
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 2
    shorter = create(served, [embeds(computed[:3])])
    assert shorter.usage.prompt_tokens == expected.usage.prompt_tokens - len(computed) + 3


def test_embeddings_of_another_shape_are_refused(served, model):
    hidden = model.bundle.encoder.hidden_size
    with pytest.raises(openai.BadRequestError, match=rf"\[4, {hidden + 1}\], expected \[tokens, {hidden}\]") as error:
        create(served, [embeds(np.zeros((4, hidden + 1), np.float32))])
    assert error.value.body["param"] == "messages.0.content.1.image_embeds"


def test_embeddings_are_refused_unless_the_server_takes_them(model):
    server = Served(model)
    with pytest.raises(openai.BadRequestError, match="--enable-mm-embeds"):
        create(server, [embeds(np.zeros((4, model.bundle.encoder.hidden_size), np.float32))])
    server.close()
