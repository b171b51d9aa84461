"""The page in a real browser: Debian's Chromium, driven by Playwright."""

import base64
import io
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import runtime
from tests.support.served import WAIT, Served, picture, slow_down, wait_for

CHROMIUM = shutil.which("chromium")
BOXED = "It is at [0.25,0.125,0.75,0.5]."


@pytest.fixture(scope="module")
def served(conformance_bundle):
    server = Served(runtime.load(conformance_bundle))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert "CI" not in os.environ, "no chromium on PATH"
        pytest.skip("no chromium on PATH: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, served):
    """Loaded, with what it asked for and what went wrong in it."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(WAIT * 1000)
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
    page.goto(served.url)
    expect(page.locator("#model")).to_have_text(served.client().models.list().data[0].id)
    yield page
    assert page.wrong == []
    outside = [request.url for request in page.asked if not request.url.startswith((served.url, "data:", "blob:"))]
    assert outside == []
    page.close()


def ask(page, text, tokens=8):
    page.get_by_label("At most").fill(str(tokens))
    page.get_by_label("Question").fill(text)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    return page.locator("#log .assistant").last.inner_text().removeprefix("Answer: ")


def bodies(page):
    return [json.loads(request.post_data) for request in page.asked if request.post_data]


def test_the_example_is_asked_about_and_the_conversation_goes_on(page, served):
    page.get_by_role("button", name="Example document").click()
    expect(page.get_by_role("img", name="example.png")).to_be_visible()
    first = ask(page, "What is the total?")
    messages = bodies(page)[0]["messages"]
    answer = served.client().chat.completions.create(
        model=bodies(page)[0]["model"], messages=messages, temperature=0, max_tokens=8
    )
    assert first == answer.choices[0].message.content.strip("\n")
    expect(page.locator("#first")).to_contain_text("ms")
    expect(page.locator("#rate")).to_contain_text("tokens/s")
    expect(page.locator("#count")).to_have_text(f"{answer.usage.completion_tokens} tokens")
    ask(page, "And the date?")
    second = bodies(page)[1]["messages"]
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert [len(message["content"]) for message in (second[0], second[2])] == [2, 1], "the image goes once"
    page.get_by_role("button", name="New conversation").click()
    ask(page, "Again?")
    assert len(bodies(page)[2]["messages"]) == 1
    assert len(bodies(page)[2]["messages"][0]["content"]) == 2


def give(page, event, target):
    """Drop or paste a PNG as a person would."""
    page.evaluate(
        """([event, target, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "mine.png", { type: "image/png" }));
            const given = event === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
            document.querySelector(target).dispatchEvent(given);
        }""",
        [event, target, list(picture())],
    )


@pytest.mark.parametrize(("event", "target"), [("drop", "#drop"), ("paste", "#question")])
def test_images_are_dropped_and_pasted(page, event, target):
    give(page, event, target)
    expect(page.get_by_role("img", name="mine.png")).to_be_visible()
    expect(page.get_by_label("Question")).to_be_focused()
    assert page.locator("#picture").evaluate("one => [one.width, one.height]") == [128, 96]
    page.get_by_role("button", name="Remove image").click()
    expect(page.locator("#picture")).to_be_hidden()


def test_a_file_that_is_no_image_is_told(page):
    page.get_by_label("Choose an image").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"}
    )
    expect(page.locator("#log .error")).to_contain_text("a.png is no image")


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def left_half_opaque(side):
    """Noise of which the right half is transparent; PNG cannot compress it."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 4), np.uint8)
    pixels[:, : side // 2] = (200, 10, 20, 255)
    pixels[:, side // 2 :, 3] = 0
    return Image.fromarray(pixels)


SVG = b"""<svg xmlns="http://www.w3.org/2000/svg" width="200" height="100">
<rect width="100" height="100" fill="rgb(200,10,20)"/></svg>"""


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("large.png", lambda: encoded(left_half_opaque(2200), "PNG", compress_level=0)),
        ("small.avif", lambda: encoded(left_half_opaque(200), "AVIF", quality=100)),
        ("an avif.png", lambda: encoded(left_half_opaque(200), "AVIF", quality=100)),
        ("drawing.svg", lambda: SVG),
        ("wide.png", lambda: encoded(left_half_opaque(200).resize((7100, 7100), 0).quantize(4), "PNG")),
    ],
)
def test_what_the_server_would_refuse_is_drawn_on_white(page, name, make):
    kind = "image/svg+xml" if name.endswith("svg") else f"image/{name[-3:]}"
    page.get_by_label("Choose an image").set_input_files({"name": name, "mimeType": kind, "buffer": make()})
    expect(page.get_by_role("img", name=name)).to_be_visible()
    ask(page, "What is this?")
    expect(page.locator("#log .error")).to_have_count(0)
    url = bodies(page)[0]["messages"][0]["content"][1]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.format in ("PNG", "JPEG")
    assert max(sent.size) <= 3072
    pixels = np.asarray(sent.convert("RGB")).astype(int)
    middle = pixels.shape[1] // 2
    assert np.abs(pixels[:, : middle - 4] - (200, 10, 20)).max() <= 8
    assert np.abs(pixels[:, middle + 4 :] - 255).max() <= 4


def test_what_the_server_takes_is_sent_as_it_is(page):
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP"):
        content = encoded(Image.new("RGB", (64, 48), (200, 10, 20)), form)
        file = {"name": f"a.{form}", "mimeType": f"image/{form.lower()}", "buffer": content}
        page.get_by_label("Choose an image").set_input_files(file)
        expect(page.get_by_role("img", name=f"a.{form}")).to_be_visible()
        ask(page, "What is this?", 2)
        url = bodies(page)[-1]["messages"][0]["content"][1]["image_url"]["url"]
        assert base64.b64decode(url.partition(",")[2]) == content


def test_boxes_of_an_answer_are_drawn_on_the_image(page):
    events = [{"choices": [{"delta": {"content": text}}]} for text in (BOXED[:12], BOXED[12:])]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    white = io.BytesIO()
    Image.new("RGB", (200, 160), "white").save(white, "PNG")
    page.get_by_label("Choose an image").set_input_files(
        {"name": "white.png", "mimeType": "image/png", "buffer": white.getvalue()}
    )
    assert ask(page, "Where is it?") == BOXED
    expect(page.get_by_role("img", name="white.png, 1 box(es) marked")).to_be_visible()
    colours = page.locator("#picture").evaluate(
        "one => [[50, 40], [150, 80], [100, 20], [100, 50], [20, 20]].map(([x, y]) => "
        "Array.from(one.getContext('2d').getImageData(x, y, 1, 1).data.slice(0, 3)))"
    )
    orange = [232, 113, 10]
    assert colours == [orange, orange, orange, [255, 255, 255], [255, 255, 255]]


def test_it_works_by_keyboard_and_an_answer_can_be_stopped(page, served, monkeypatch):
    slow_down(monkeypatch, served.scheduler)
    names = []
    for _ in range(8):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id"))
    order = ["file", "example", "question", "send", "clear", "tokens"]
    assert [name for name in names if name in order][:6] == order

    def endless(route):
        route.continue_(post_data=json.dumps(json.loads(route.request.post_data) | {"ignore_eos": True}))

    page.route("**/v1/chat/completions", endless)
    page.get_by_label("At most").fill("3000")
    page.get_by_label("Question").fill("What is this?")
    page.get_by_label("Question").press("Shift+Enter")
    assert bodies(page) == []
    page.get_by_label("Question").press("Enter")
    expect(page.locator("#count")).to_contain_text("tokens")
    assert served.scheduler.running == 1
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    wait_for(lambda: served.scheduler.running == 0)
    assert int(page.locator("#count").inner_text().split()[0]) < 3000


def test_an_image_that_comes_during_an_answer_begins_anew(page, served):
    """What was asked before it does not count as asked about it."""
    page.get_by_label("At most").fill("8")
    page.get_by_label("Question").fill("What is this?")
    page.get_by_label("Question").press("Enter")
    give(page, "drop", "#drop")
    expect(page.get_by_role("img", name="mine.png")).to_be_visible()
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    ask(page, "And what is this?")
    messages = bodies(page)[-1]["messages"]
    assert len(messages) == 1
    assert [part["type"] for part in messages[0]["content"]] == ["text", "image_url"]


def test_errors_of_the_server_are_told(page):
    page.get_by_label("Question").fill("word " * 20000)
    page.get_by_label("Question").press("Enter")
    expect(page.locator("#log .error")).to_contain_text("context")
    page.wrong.clear()  # the browser itself notes the status 400


def test_a_key_is_asked_for(browser, conformance_bundle):
    server = Served(runtime.load(conformance_bundle), api_keys=("secret",))
    page = browser.new_page()
    page.goto(server.url)
    expect(page.locator("#model")).to_contain_text("API key")
    page.get_by_label("API key").fill("secret")
    ask(page, "What is this?", 3)
    expect(page.locator("#model")).to_have_text(server.client("secret").models.list().data[0].id)
    page.close()
    server.close()
