"""A model of the released width answers as the demo model does, within its memory."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.memory import GIB, Ran
from runtime.backends.memory_plan import Costs
from runtime.bundle.manifest import open_bundle
from runtime.serve.settings import Settings
from runtime.types import Options
from tests.support.released import run_command
from tests.support.served import Served, asked, picture

ANSWER_BYTES = 3 * GIB // 2  # beside weights and KV cache
SIDE, TOKENS = 512, 64  # of an image: pixels, visual tokens
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "integer"}, "paid": {"type": "boolean"}},
    "required": ["total", "paid"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(exported: tuple[Path, Ran], tmp_path_factory: pytest.TempPathFactory):
    """Of smaller images, which are encoded sooner."""
    folder = tmp_path_factory.mktemp("small") / "bundle"
    folder.mkdir()
    for entry in exported[0].iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / "manifest.json").unlink()
    manifest = json.loads((exported[0] / "manifest.json").read_text())
    manifest["image"]["resolution"] = SIDE
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return Settings.of(bundle=str(folder), max_batch=3).load()


@pytest.fixture(scope="module")
def served(model):
    server = Served(model, slots=3)
    yield server
    server.close()


def ask(served: Served, text: str, *images: bytes, **options):
    client = served.client()
    return client.chat.completions.create(
        model=served.model.bundle.name, messages=asked(text, *images), temperature=0, **options
    )


def test_an_answer_at_1536_stays_within_its_memory(exported: tuple[Path, Ran], tmp_path: Path):
    folder, _ = exported
    bundle = open_bundle(folder)
    Image.new("RGB", (1536, 1536), (20, 120, 220)).save(tmp_path / "page.png")
    arguments = ["--bundle", folder, "--image", tmp_path / "page.png", "--prompt", "What is it?", "--json"]
    ran = run_command("runtime.infer", *arguments, "--max-new-tokens", 8)
    answer = json.loads(ran.output.splitlines()[-1])
    assert answer["visual_tokens"] == 576 and len(answer["token_ids"]) <= 8
    costs = Costs.of(bundle)
    positions = answer["prompt_tokens"] + 8
    own = ran.peak.own - positions * costs.positions[answer["decoder"]["kv_precision"]]
    assert own < ANSWER_BYTES, str(ran)  # what is mapped is no copy


def test_a_chat_keeps_its_positions(model):
    conversation = model.chat(Options(max_new_tokens=4))
    *_, first = conversation.ask("What is two and two?")
    *_, second = conversation.ask("And three?")
    *_, alone = model.generate([], "And three?", Options(max_new_tokens=4))
    assert second.result.prompt_tokens < alone.result.prompt_tokens < first.result.prompt_tokens + 20


def test_batched_answers_are_the_lone_ones(served):
    questions = ["What is the total?", "Who wrote it?", "When was it, and where?"]
    alone = [ask(served, text, max_tokens=8, logprobs=True) for text in questions]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda text: ask(served, text, max_tokens=8, logprobs=True), questions))
    for lone, batched in zip(alone, together, strict=True):
        assert batched.choices[0].message.content == lone.choices[0].message.content
        assert batched.usage.completion_tokens == lone.usage.completion_tokens


def test_a_second_question_takes_over_the_image_and_follows_a_schema(served):
    page = picture(0, (200, 200))
    first = ask(served, "What is it?", page, max_tokens=2)
    assert first.usage.prompt_tokens > TOKENS
    schema = {"type": "json_schema", "json_schema": {"name": "bill", "schema": SCHEMA, "strict": True}}
    second = ask(served, "What is the total?", page, max_tokens=60, response_format=schema)
    assert second.usage.prompt_tokens_details.cached_tokens > TOKENS
    choice = second.choices[0]
    if choice.finish_reason == "stop":
        assert json.loads(choice.message.content).keys() == {"total", "paid"}
    else:  # random weights may write digits without end
        assert choice.message.content.lstrip().startswith("{")
