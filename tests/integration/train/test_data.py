"""Conversations and images: against the original's rules, against the runtime, and what becomes of broken records."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HubTokenizer

from export.tokenizer.convert import export_tokenizer
from runtime.image.decode import open_image
from runtime.image.preprocess import ImageRule, preprocess
from runtime.text import template as runtime_prompt
from runtime.text.template import TEMPLATES
from runtime.text.tokenizer import Tokenizer as RuntimeTokenizer
from tests.support.commands import run_main
from train.data.conversation import Encoded, encode_conversation, turns_of
from train.data.dataset import Conversation, Conversations, length_of, truncate
from train.data.llava_json import MalformedError, Turn, read_records
from train.data.sampler import Sampler, micro_batches
from train.data.tokenizer import load_tokenizer
from train.errors import RecipeError, TokenizerError
from train.model import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Checkpoint
from train.model.original_tokenizer import OriginalTokenizer
from train.model.tokenizer_files import CheckpointFiles
from train.recipe import Records
from train.types import Skipped

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TALKS = [
    [Turn("<image>\nWhat is the total?", "It is 12.50.")],
    [Turn("<image>\nWho?", "The  buyer"), Turn("And then?", " three\nlines\n\nhere "), Turn("", "An answer.")],
    [Turn("Only text, no picture", "Yes.")],
    [Turn("<image>\n<image>\nCompare.", "They differ."), Turn("Now <image> too", "\n\nWell")],
    [Turn("with {braces} and ▁ and  spaces ", "{}"), Turn("Ünïcödé 東京 🙂", "naïve 🙂")],
]


# How conversations are tokenised


@pytest.fixture(scope="module")
def original(conformance: Path) -> OriginalTokenizer:
    return OriginalTokenizer.load(CheckpointFiles.read(conformance / "checkpoint"))


def original_v1(turns: list[Turn], original: OriginalTokenizer) -> Encoded:
    """LLaVA's preprocess_v1 for the tokenizer above: the whole conversation is tokenised, then the questions are masked
    by the lengths of each round and of its instruction, tokenised on their own."""

    def tokenise(text: str) -> list[int]:
        chunks = [[1, *original.encode(chunk)] for chunk in text.split("<image>")]
        ids = [1, *chunks[0][1:]]
        for chunk in chunks[1:]:
            ids += [IMAGE_TOKEN_INDEX, *chunk[1:]]
        return ids

    text = TEMPLATES["vicuna_v1"].system + " "
    text += "".join(f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in turns)
    ids = tokenise(text)
    labels, at = list(ids), 1
    labels[0] = IGNORE_INDEX
    for number, one in enumerate(text.split("</s>")[:-1]):
        instruction = one.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        length, masked = len(tokenise(one)), len(tokenise(instruction)) - 2
        if number:
            length, masked = length - 1, masked - 1
        labels[at : at + masked] = [IGNORE_INDEX] * masked
        at += length
    return Encoded(ids, labels)


@pytest.mark.parametrize("turns", [TALKS[0], TALKS[2], [Turn("<image>\nWho?", "The buyer"), Turn("And?", "More.")]])
def test_vicuna_is_tokenised_and_masked_as_in_the_original(turns: list[Turn], original, conformance: Path):
    tokenizer = load_tokenizer(conformance / "checkpoint")
    found = encode_conversation(turns, TEMPLATES["vicuna_v1"], tokenizer, None)
    assert found == original_v1(turns, original)
    assert 0 < sum(label != IGNORE_INDEX for label in found.labels) < len(found.labels)


@pytest.mark.parametrize("turns", TALKS)
def test_vicuna_ids_are_the_originals_whatever_the_text(turns: list[Turn], original, conformance: Path):
    tokenizer = load_tokenizer(conformance / "checkpoint")
    found = encode_conversation(turns, TEMPLATES["vicuna_v1"], tokenizer, None)
    assert found.ids == original_v1(turns, original).ids


def test_conformance_prompts(conformance: Path, reference: dict):
    tokenizer = load_tokenizer(conformance / "checkpoint")
    for number, case in enumerate(reference["cases"]):
        with np.load(conformance / f"case{number}.npz") as arrays:
            prompt, learnt = arrays["input_ids"].tolist(), arrays["train_labels"] != IGNORE_INDEX
        record = {"image": "x", "conversations": [{"from": "human", "value": f"<image>\n{case['prompt']}"}]}
        record["conversations"].append({"from": "gpt", "value": "Yes."})
        ids, labels = encode_conversation(turns_of(record), TEMPLATES["vicuna_v1"], tokenizer, None)
        assert ids[: len(prompt)] == prompt
        # The original's first learnt position is the one behind the prompt, and so is ours
        assert int(learnt.argmax()) == len(prompt) == [label != IGNORE_INDEX for label in labels].index(True)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_of_both_modes_is_what_will_be_deployed(legacy: bool, conformance: Path, tmp_path: Path):
    source = conformance / "checkpoint"
    config = json.loads((source / "tokenizer_config.json").read_text()) | {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    section = export_tokenizer(tmp_path, tmp_path / "tokenizer")
    ours, deployed = load_tokenizer(tmp_path), RuntimeTokenizer(tmp_path / section["file"], section)
    texts = ["", " ", "a", " a", "  a  b", "</s>a</s> b", "<s>", "▁x", "naïve 東京 🙂\n\n", "x<unk> y</s></s>"]
    for text in texts:
        assert ours.encode(text) == deployed.encode(text, bos=False), text


def byte_level_tokenizer(folder: Path) -> Path:
    """SmolLM2's kind: byte-level BPE with ChatML's tokens, and a merge of two newlines."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline, space = "Ċ", "Ġ"
    merges = [(newline, newline), (space, "a"), ("t", "h"), ("th", "e"), (space, "the")]
    tokens = [*alphabet, *("".join(merge) for merge in merges)]
    tokenizer = HubTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": len(tokens)}))
    return folder


@pytest.mark.parametrize(
    ("template", "system"),
    [("vicuna_v1", None), ("vicuna_v1", "Be brief."), ("chatml", None), ("chatml", "Be {brief}.")],
)
@pytest.mark.parametrize("turns", TALKS)
def test_a_training_prompt_is_the_runtimes(
    template: str, system: str | None, turns: list[Turn], conformance: Path, tmp_path: Path
):
    """Every answer is learnt behind exactly the ids that the runtime would have there."""
    checkpoint = conformance / "checkpoint" if template == "vicuna_v1" else byte_level_tokenizer(tmp_path)
    section = export_tokenizer(checkpoint, tmp_path / "tokenizer")
    deployed = RuntimeTokenizer(tmp_path / section["file"], section)
    theirs = runtime_prompt.TEMPLATES[template]
    ids, labels = encode_conversation(turns, TEMPLATES[template], load_tokenizer(checkpoint), system)
    starts = [i for i in range(1, len(ids)) if labels[i] != IGNORE_INDEX == labels[i - 1]]
    assert len(starts) == len(turns)

    first = turns[0].question
    text = runtime_prompt.first_turn(theirs, first, first.count("<image>"), system)
    assert collapse(deployed.encode_prompt(text, [3] * first.count("<image>"))) == ids[: starts[0]]
    for turn, before, start in zip(turns[1:], starts[:-1], starts[1:], strict=True):
        end = next(i for i in range(before, len(ids)) if labels[i] == IGNORE_INDEX)  # behind the last answer's end
        text = runtime_prompt.next_turn(theirs, turn.question, turn.question.count("<image>"))
        continued = deployed.encode_prompt(text, [3] * turn.question.count("<image>"), continued=True)
        assert collapse(continued) == ids[end - 1 : start]


def collapse(ids: list[int]) -> list[int]:
    """The runtime's rows of image embeds, three an image, as one placeholder each."""
    return [IMAGE_TOKEN_INDEX if i < 0 else i for i in ids if i >= 0 or -i % 3 == 1]


def test_an_answer_that_begins_with_a_newline_does_not_change_its_prompt(tmp_path: Path):
    """As one text, ChatML's newline and the answer's would be one token."""
    tokenizer = load_tokenizer(byte_level_tokenizer(tmp_path))
    assert len(tokenizer.encode("\n\n")) == 1
    plain = encode_conversation([Turn("a", "b")], TEMPLATES["chatml"], tokenizer, None)
    newline = encode_conversation([Turn("a", "\nb")], TEMPLATES["chatml"], tokenizer, None)
    start = next(i for i, label in enumerate(plain.labels) if label != IGNORE_INDEX)
    assert newline.ids[:start] == plain.ids[:start]
    assert newline.labels[start] == tokenizer.encode("\n")[0]


def test_chatml_learns_the_answer_and_its_end_only(tmp_path: Path):
    tokenizer = load_tokenizer(byte_level_tokenizer(tmp_path))
    ids, labels = encode_conversation(TALKS[1], TEMPLATES["chatml"], tokenizer, "S")
    text = "<|im_start|>system\nS<|im_end|>\n"
    for question, answer in TALKS[1]:
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    before, after = text.split("<image>")
    assert ids == [*tokenizer.encode(before), IMAGE_TOKEN_INDEX, *tokenizer.encode(after)]
    expected = [token for turn in TALKS[1] for token in tokenizer.encode(turn.answer + "<|im_end|>")]
    assert [label for label in labels if label != IGNORE_INDEX] == expected


def test_plain_is_an_image_and_its_caption(conformance: Path, original):
    """LLaVA's preprocess_plain: of the question only the image stays, and the caption with its newline is learnt."""
    tokenizer = load_tokenizer(conformance / "checkpoint")
    turns = [Turn("<image>\nDescribe it.", "A red box.")]
    ids, labels = encode_conversation(turns, TEMPLATES["plain"], tokenizer, None)
    caption = original.encode("A red box.\n")
    assert (ids, labels) == ([1, IMAGE_TOKEN_INDEX, *caption], [IGNORE_INDEX, IGNORE_INDEX, *caption])
    for wrong in (TALKS[1], TALKS[2]):
        with pytest.raises(MalformedError, match="for captions"):
            encode_conversation(wrong, TEMPLATES["plain"], tokenizer, None)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"no tokenizer.model and no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer.json: cannot be read"):
        load_tokenizer(tmp_path)


# What a record holds


def says(*messages: str, image: object = None, roles: str = "hg") -> dict:
    names = {"h": "human", "g": "gpt", "s": "system", "u": "user", "a": "assistant"}
    talk = [{"from": names[roles[i % len(roles)]], "value": value} for i, value in enumerate(messages)]
    return {"id": "7", "conversations": talk} | ({} if image is None else {"image": image})


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        (says("Where is it? <image>", " There ", image="a.png"), [Turn("<image>\nWhere is it?", " There ")]),
        (says("<image>", "x", image=["a.png"]), [Turn("<image>", "x")]),
        (says("A <image> b <image>", "x", image=["a", "b"]), [Turn("A <image> b <image>", "x")]),
        (says("hello, I am a bot", " q ", "a", roles="ghg"), [Turn(" q ", "a")]),
        (says("q", "a"), [Turn("q", "a")]),
    ],
)
def test_turns_are_the_originals(record: dict, turns: list[Turn]):
    assert turns_of(record) == turns


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no 'conversations'"),
        ({"conversations": []}, "no 'conversations'"),
        ({"conversations": [{"from": "human"}]}, "a message has no text"),
        ({"conversations": ["hello"]}, "a message has no text"),
        (says("q"), "roles are human; expected"),
        (says("q", "a", "q"), "roles are human, gpt, human"),
        (says("q", "q", roles="h"), "roles are human, human"),
        (says("a", roles="g"), "roles are none"),
        (says("Answer in French.", "q", "a", roles="shg"), "roles are system, human, gpt; expected human and gpt"),
        (says("q", "a", roles="ua"), "roles are user, assistant; expected human and gpt"),
        (says("q", " "), "an empty answer"),
        (says("q", "a <image>", image="a.png"), "<image> in an answer"),
        (says("<image> q", "a"), r"1 <image> placeholder\(s\) for 0 image"),
        (says("q", "a", image="a.png"), r"0 <image> placeholder\(s\) for 1 image"),
        (says("<image> q", "a", image=["a.png", "b.png"]), r"1 <image> placeholder\(s\) for 2 image"),
        (says("<image> q", "a", image=5), "'image' is 5"),
    ],
)
def test_a_malformed_record_says_why(record: dict, reason: str):
    with pytest.raises(MalformedError, match=reason):
        turns_of(record)


def test_lengths_are_characters_and_their_sign_the_modality():
    assert length_of(says("<image> one two", "three four", image="a.png")) == 25
    assert length_of(says("one two", "three")) == -12
    assert length_of(says("", "")) == -1
    assert length_of("nonsense") == 1


# Datasets


@pytest.fixture
def rule() -> ImageRule:
    return ImageRule(MEAN, STD, "pad", 128, 64, 16)


def dataset_of(records: list, folder: Path, rule: ImageRule, checkpoint: Path, max_length: int = 512) -> Conversations:
    file = folder / "records.json"
    file.write_text(json.dumps(records))
    sources = (Records(str(file), str(folder)),)
    return Conversations(sources, TEMPLATES["vicuna_v1"], None, load_tokenizer(checkpoint), rule, max_length)


def test_records_are_read_when_asked_for(conformance: Path, tmp_path: Path, rule: ImageRule):
    Image.new("RGB", (200, 100), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).convert("RGB").save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:600])
    records = [
        says("<image>\nColour?", "Red.", image="red.png"),
        says("<image>\nColour?", "Red.", image="missing.png"),
        says("<image>\nColour?", "Red.", image="broken.jpg"),
        says("<image>\nColour?", "Red.", image="cut.jpg"),
        says("Colour?", "Which?"),
        "nonsense",
        says("lone \ud800", "surrogate"),
    ]
    items = list(dataset_of(records, tmp_path, rule, conformance / "checkpoint"))
    assert [isinstance(item, Conversation) for item in items] == [True, False, False, False, True, False, False]
    red = items[0]
    assert red.images[0].shape == (3, 128, 128)
    assert red.positions == len(red.input_ids) - 1 + 4
    assert items[4].images == []
    reasons = [item.reason for item in items if isinstance(item, Skipped)]
    assert "missing.png: No such file" in reasons[0]
    assert "broken.jpg: truncated or corrupt image" in reasons[1]
    assert "cut.jpg: truncated or corrupt image" in reasons[2]
    assert reasons[3:] == ["not a JSON object", "a lone surrogate, which no encoding can represent"]
    assert items[1].name == f"{tmp_path / 'records.json'}[1] (id 7)"


def test_json_lines_and_several_files_are_one_dataset(conformance: Path, tmp_path: Path, rule: ImageRule):
    (tmp_path / "a.json").write_text(json.dumps([says("a", "1"), says("b", "2")]))
    (tmp_path / "b.jsonl").write_text(json.dumps(says("c", "3")) + "\n\n" + json.dumps("broken") + "\n")
    sources = (Records(str(tmp_path / "a.json")), Records(str(tmp_path / "b.jsonl")))
    tokenizer = load_tokenizer(conformance / "checkpoint")
    data = Conversations(sources, TEMPLATES["vicuna_v1"], None, tokenizer, rule, 512)
    assert (len(data), data.counts) == (4, [2, 2])
    expected = [
        encode_conversation([Turn(q, a)], TEMPLATES["vicuna_v1"], tokenizer, None).ids for q, a in ("a1", "b2", "c3")
    ]
    assert [data[i].input_ids.tolist() for i in range(3)] == expected
    assert data[3].name == f"{tmp_path / 'b.jsonl'}[1]"


def test_a_dataset_may_have_a_resolution_of_its_own(conformance, tmp_path: Path, rule: ImageRule):
    Image.effect_noise((200, 100), 50).convert("RGB").save(tmp_path / "noise.png")
    records = tmp_path / "records.json"
    records.write_text(json.dumps([says("<image>\nWhat?", "Noise.", image="noise.png")]))
    sources = tuple(Records(str(records), str(tmp_path), resolution=side) for side in (None, 192))
    data = Conversations(sources, TEMPLATES["vicuna_v1"], None, load_tokenizer(conformance / "checkpoint"), rule, 512)
    plain, larger = data[0], data[1]
    assert plain.images[0].shape == (3, rule.resolution, rule.resolution)
    assert larger.images[0].shape == (3, 192, 192)
    assert larger.positions - plain.positions == 9 - (rule.resolution // 64) ** 2
    theirs = preprocess(open_image(tmp_path / "noise.png"), replace(rule, resolution=192))
    assert np.array_equal(larger.images[0], theirs)


def test_records_in_lines_are_known_by_what_is_in_the_file(tmp_path):
    """As LLaVA's files are named, and after an empty line."""
    records = [{"id": str(number), "conversations": []} for number in range(3)]
    (tmp_path / "lines.json").write_text("\n" + "\n".join(map(json.dumps, records)))
    (tmp_path / "list.json").write_text("\n " + json.dumps(records, indent=1))
    assert list(read_records(tmp_path / "lines.json")) == list(read_records(tmp_path / "list.json")) == records


def test_a_line_that_is_no_json_is_skipped_alone(conformance, tmp_path, rule):
    whole = json.dumps(says("What?", "Text."))
    (tmp_path / "a.jsonl").write_text(f"{whole}\n{whole[:20]}\n{whole}\n")
    tokenizer = load_tokenizer(conformance / "checkpoint")
    data = Conversations((Records(str(tmp_path / "a.jsonl")),), TEMPLATES["vicuna_v1"], None, tokenizer, rule, 512)
    assert len(data) == 3
    assert data[1] == Skipped(f"{tmp_path / 'a.jsonl'}[1]", "not a JSON object")
    assert torch.equal(data[0].input_ids, data[2].input_ids)


def with_added_token(source: Path, folder: Path, kind: str) -> tuple[Path, int]:
    """A checkpoint with a token [PAD] behind the vocabulary: its folder, and the token's id."""
    if kind == "byte_level":
        file = byte_level_tokenizer(folder) / "tokenizer.json"
        tokenizer = HubTokenizer.from_file(str(file))
        rows = tokenizer.get_vocab_size()
        tokenizer.add_tokens([AddedToken("[PAD]")])
        tokenizer.save(str(file))
        return file.parent, rows
    shutil.copytree(source, folder / "checkpoint")
    file = folder / "checkpoint" / "tokenizer_config.json"
    rows = Checkpoint.open(source).llama_config.vocab_size
    added = {"added_tokens_decoder": {str(rows): {"content": "[PAD]", "special": True}}}
    file.write_text(json.dumps(json.loads(file.read_text()) | added))
    return folder / "checkpoint", rows


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("where", ["question", "answer", "system"])
def test_a_token_without_an_embedding_is_named_before_training(kind, where, conformance, tmp_path, rule):
    checkpoint, rows = with_added_token(conformance / "checkpoint", tmp_path, kind)
    texts = {"question": "Why?", "answer": "So."}
    records = [
        "nonsense",
        says("<image>", "no image"),
        says("Plain.", "Text."),
        says(*(texts | {where: "a [PAD]"}).values()),
    ]
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records[: 4 if where in texts else 3]))
    tokenizer, sources = load_tokenizer(checkpoint), (Records(str(file)),)
    system = "See [PAD]." if where == "system" else None

    def data(rows: int | None, records: tuple = sources) -> Conversations:
        return Conversations(records, TEMPLATES["vicuna_v1"], system, tokenizer, rule, 512, rows)

    with pytest.raises(RecipeError) as error:
        data(rows)
    assert str(error.value) == (
        f"data: {file}[{3 if where in texts else 2}] (id 7): token '[PAD]' has id {rows}, the model's embedding has "
        f"{rows} rows; take it out of the text"
    )
    assert max(data(rows + 1)[3 if where in texts else 2].input_ids) == rows
    file.write_text(json.dumps(records[:3]))
    if where in texts:
        assert len(data(rows)) == 3


def test_training_ends_before_it_begins_where_a_token_has_no_embedding(conformance, tmp_path):
    checkpoint, rows = with_added_token(conformance / "checkpoint", tmp_path, "sentencepiece")
    (tmp_path / "records.jsonl").write_text(json.dumps(says("Plain [PAD].", "Text.")))
    recipe = {"out": str(tmp_path / "run"), "checkpoint": str(checkpoint), "train": ["projector"], "steps": 1}
    recipe |= {"learning_rate": 1e-3, "global_batch": 1, "micro_batch": 1, "workers": 2}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"data": [{"records": str(tmp_path / "records.jsonl")}]}))
    done = run_main("train", tmp_path / "recipe.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"records.jsonl[0] (id 7): token '[PAD]' has id {rows}" in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{\n}", "neither a list"),
        ("a.json", "[", "neither a list"),
        ("a.jsonl", "{\n{}", "neither a list"),
        ("a.json", "[]", "no records in it"),
        ("none.json", None, "No such file"),
    ],
)
def test_files_that_hold_no_records_are_refused(
    name: str, content: str | None, message: str, conformance, tmp_path, rule
):
    if content is not None:
        (tmp_path / name).write_text(content)
    tokenizer = load_tokenizer(conformance / "checkpoint")
    with pytest.raises(RecipeError, match=message):
        Conversations((Records(str(tmp_path / name)),), TEMPLATES["vicuna_v1"], None, tokenizer, rule, 512)


def test_a_list_of_nothing_has_no_records(tmp_path):
    (tmp_path / "none.json").write_text("[]")
    assert list(read_records(tmp_path / "none.json")) == []


def test_a_long_conversation_is_cut_at_its_end_but_not_in_an_image():
    ids = [1, 5, IMAGE_TOKEN_INDEX, 6, 7, 8, 9]
    labels = [IGNORE_INDEX] * 4 + [7, 8, 9]
    whole = Encoded(ids, labels)
    assert truncate(whole, [4], 10) == (whole, 10)
    assert truncate(whole, [4], 9) == (Encoded(ids[:-1], labels[:-1]), 9)
    assert truncate(whole, [4], 8) == (Encoded(ids[:-2], labels[:-2]), 8)
    with pytest.raises(MalformedError, match=r"no answer within max_length \(7 positions\)"):
        truncate(whole, [4], 7)
    for length in (2, 3, 5):
        with pytest.raises(MalformedError, match="an image does not fit into max_length"):
            truncate(whole, [4], length)


# Batches


def mixed_sampler(**options) -> Sampler:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 50, 67) * np.where(np.arange(67) % 3, 1, -1)
    return Sampler(lengths, [(67, 1.0)], **({"global_batch": 8, "seed": 3} | options))


def test_an_epoch_has_every_record_once_and_batches_of_one_modality():
    sampler = mixed_sampler()
    batches = sampler.epoch(0)
    assert len(batches) == sampler.steps_in_epoch == 9
    assert sorted(np.concatenate(batches)) == list(range(67))
    signs = [set(np.sign(sampler._lengths[batch])) for batch in batches]
    whole = signs[: 44 // 8 + 23 // 8]  # 44 with an image, 23 without: the rest of both ends the epoch
    assert all(len(sign) == 1 for sign in whole)
    assert {-1} in whole and {1} in whole
    assert [len(batch) for batch in batches] == [8] * 8 + [3]


def test_the_plan_depends_on_seed_and_epoch_alone():
    plan = [batch.tolist() for batch in mixed_sampler().epoch(2)]
    assert plan == [batch.tolist() for batch in mixed_sampler().epoch(2)]
    assert plan != [batch.tolist() for batch in mixed_sampler().epoch(1)]
    assert plan != [batch.tolist() for batch in mixed_sampler(seed=4).epoch(2)]


def test_batches_are_sorted_by_length_so_that_micro_batches_pad_little():
    sampler = mixed_sampler()
    batch = sampler.epoch(0)[0]
    lengths = np.abs(sampler._lengths[batch])
    assert (np.diff(lengths) <= 0).all() and lengths[0] > lengths[-1]
    parts = [micro_batches(batch, 2, 2, rank, 2) for rank in (0, 1)]
    assert [part.tolist() for part in (parts[0][0], parts[1][0], parts[0][1], parts[1][1])] == batch.reshape(
        4, 2
    ).tolist()


def test_a_short_batch_leaves_micro_batches_empty():
    batch = np.array([4, 2, 9])
    assert [part.tolist() for part in micro_batches(batch, 2, 2, 0, 2)] == [[4, 2], []]
    assert [part.tolist() for part in micro_batches(batch, 2, 2, 1, 2)] == [[9], []]


def test_datasets_are_mixed_by_weight():
    lengths = np.ones(30, np.int64)
    sampler = Sampler(lengths, [(10, 2.5), (10, 1.0), (10, 0.3)], 4, 0)
    assert sampler.steps_in_epoch == 38 // 4 + 1
    first, second = (np.bincount(np.concatenate(sampler.epoch(n)), minlength=30) for n in (0, 1))
    for counts in (first, second):
        assert (counts[:10].sum(), counts[10:20].sum(), counts[20:].sum()) == (25, 10, 3)
        assert counts[:10].min() == 2 and counts[:10].max() == 3
        assert set(counts[10:20]) == {1}
    assert first.tolist() != second.tolist()


def test_a_weight_that_leaves_nothing_of_a_dataset_is_refused():
    with pytest.raises(ValueError, match=r"weight 0\.04 leaves none of the 10 records of dataset 2"):
        Sampler(np.ones(20, np.int64), [(10, 1.0), (10, 0.04)], 4, 0)


def test_tensors_are_what_the_model_takes(conformance: Path, tmp_path: Path, rule: ImageRule):
    item = dataset_of([says("a", "b")], tmp_path, rule, conformance / "checkpoint")[0]
    assert item.input_ids.dtype == item.labels.dtype == torch.int64
