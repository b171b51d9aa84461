"""Two replicas on Ray Serve: the same API, conversations return to their images, a replica may die."""

import json
import os
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
from pydantic import ValidationError

from tests.support.served import WAIT, asked, free_port, picture, wait_for

os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # two busy cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ray = pytest.importorskip("ray", reason="no ray: pip install '.[serve]'")
from ray import serve  # noqa: E402

from runtime.serve import ray_app  # noqa: E402
from runtime.serve.protocol import ApiError  # noqa: E402

LONG = {"extra_body": {"ignore_eos": True}}
NAME = "SERVE_REPLICA::default#Replica#"


@pytest.fixture(scope="module")
def url(conformance_bundle):
    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings = {"bundle": str(conformance_bundle), "replicas": "2", "threads": "1", "max_batch": "4"}
    serve.run(ray_app.build(settings))
    yield f"http://127.0.0.1:{port}/v1"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=WAIT)


def create(client, messages, **options):
    name = client.models.list().data[0].id
    return client.chat.completions.create(model=name, messages=messages, temperature=0, **options)


def replicas():
    return [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["name"].startswith(NAME)]


def test_answers_stream_or_come_whole(client):
    assert len(replicas()) == 2
    messages = asked("What is this?", picture())
    whole = create(client, messages, max_tokens=8)
    pieces = list(create(client, messages, max_tokens=8, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens == 8


@pytest.mark.parametrize("stream", [False, True])
def test_ignored_fields_are_named_through_the_ingress(client, stream):
    body = {"model": client.models.list().data[0].id, "messages": asked("What?"), "max_tokens": 2, "stream": stream}
    answer = client.chat.completions.with_raw_response.create(**body, extra_body={"mood": 1})
    assert answer.headers["x-ignored-fields"] == "mood"


def test_errors_pass_through_the_ingress(client):
    with pytest.raises(openai.BadRequestError, match="not an image"):
        create(client, asked("What?", b"no image"))
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.chat.completions.create(model="other", messages=asked("What?"))
    name = client.models.list().data[0].id
    assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("other")


def test_the_ingress_checks_hosts_and_streams_past_proxies(url):
    for method, headers, status in (
        ("GET", {}, 200),
        ("HEAD", {}, 200),
        ("GET", {"Host": "evil.test"}, 421),
        ("GET", {"Origin": "https://evil.test"}, 403),
        ("GET", {"Content-Encoding": "gzip"}, 415),
    ):
        request = urllib.request.Request(f"{url}/models", headers=headers, method=method)
        try:
            found = urllib.request.urlopen(request, timeout=WAIT).status
        except urllib.error.HTTPError as error:
            found = error.code
        assert found == status, (method, headers)
    body = json.dumps({"messages": asked("What?"), "max_tokens": 1, "stream": True}).encode()
    with urllib.request.urlopen(f"{url}/chat/completions", body, timeout=WAIT) as answer:
        assert (answer.headers["Cache-Control"], answer.headers["X-Accel-Buffering"]) == ("no-cache", "no")


def test_a_conversation_returns_to_the_replica_that_has_its_image(client):
    images = [picture(seed) for seed in range(10, 16)]
    for image in images:
        create(client, asked("What is this?", image), max_tokens=2)
    for image in images:
        again = create(client, asked("What is its date?", image), max_tokens=2)
        assert again.usage.prompt_tokens_details.cached_tokens >= 4, "its visual tokens are there"


def test_a_replica_that_dies_loses_no_request_that_had_not_begun(client):
    answers, failed = [], []

    def ask(seed):
        try:
            answer = create(client, asked("What is this?", picture(seed)), max_tokens=2000, **LONG)
            answers.append(answer.usage.completion_tokens)
        except openai.APIError as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(20, 32)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    ray.kill(ray.get_actor(replicas()[0], namespace="serve"))
    assert len(answers) < 6, "it died at work"
    for thread in threads:
        thread.join(WAIT)
    assert failed == []
    assert answers == [2000] * 12
    wait_for(lambda: len(replicas()) == 2)


def test_streams_of_several_choices(client):
    pieces = list(create(client, asked("What is this?"), max_tokens=4, stream=True, n=2))
    assert {piece.choices[0].index for piece in pieces} == {0, 1}


def test_a_full_application_is_429(conformance_bundle, url):
    """One replica that takes two requests, and one more waits at the ingress."""
    settings = {"bundle": str(conformance_bundle), "threads": "1", "max_batch": "1", "max_queue": "1"}
    serve.run(ray_app.build(settings), name="small", route_prefix="/small")
    small = openai.OpenAI(base_url=url.replace("/v1", "/small/v1"), api_key="none", max_retries=0, timeout=WAIT)
    found = []

    def ask():
        try:
            found.append(create(small, asked("What is this?"), max_tokens=2000, **LONG).usage.completion_tokens)
        except openai.RateLimitError as error:
            found.append(int(error.response.headers["retry-after"]))

    create(small, asked("What is this?"), max_tokens=1)
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)  # one is at the replica before the next one comes
    for thread in threads:
        thread.join(WAIT)
    serve.delete("small")
    assert set(found) == {2, 2000}, "tokens, or seconds to wait"
    assert found.count(2000) >= 3
    assert len(found) == 6


def test_a_crash_is_told_from_other_errors():
    assert ray_app.is_of_crash({"body": ApiError(500, "crashed", code="crash").body})
    assert not ray_app.is_of_crash({"body": ApiError(400, "wrong").body})
    assert not ray_app.is_of_crash({"status": 200, "stream": False})


def test_settings_are_checked():
    settings = ray_app.Settings.model_validate({"max_output": "7", "timeout": "2.5", "batch_invariant": "false"})
    assert (settings.limits.output_tokens, settings.limits.seconds, settings.batch_invariant) == (7, 2.5, False)
    with pytest.raises(ValidationError, match=r"'https://a\.test' is no host"):
        ray_app.build({"allow_remote_images": "b.test:8443,https://a.test"})
    large = ray_app.Settings(max_image_bytes=60_000_000).limits
    assert large.body_bytes > 80_000_000 > ray_app.Settings().limits.body_bytes == 64 << 20
    for wrong in ({"replica_count": "2"}, {"max_batch": "0"}, {"timeout": "nan"}, {"threads": "-1"}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ray_app.build(wrong)


def test_the_key_of_a_conversation_is_its_first_image():
    def key(messages):
        return ray_app.image_key(json.dumps({"messages": messages}).encode())

    first = asked("What is this?", picture())
    assert key(first) == key([*first, {"role": "assistant", "content": "A"}, *asked("And this?", picture(1))])
    assert key(first) != key(asked("What is this?", picture(1)))
    sent, named = {"type": "image_url", "image_url": {"url": "data:"}, "uuid": "a"}, {"type": "image_url", "uuid": "a"}
    assert key([{"role": "user", "content": [sent]}]) == key([{"role": "user", "content": [named]}]) != ""
    url = first[0]["content"][1]["image_url"]["url"]
    given = [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
    assert ray_app.image_key(json.dumps({"input": given}).encode()) == key(first)
    assert ray_app.image_key(b'{"input": "x"}') == ""
    assert key(asked("What?")) == ray_app.image_key(b"{") == ray_app.image_key(b'{"messages": 5}') == ""
