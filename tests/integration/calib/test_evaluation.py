"""What an encoder or decoder loses, measured against independent computations; and the pages it is measured on."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image

import calib.evaluation
from calib.evaluation import Evaluation, Loss, Score, sqnr_db
from calib.images import (
    FEW_PAGES,
    HELD_OUT,
    LEAST,
    QUESTIONS,
    SQNR_PAGES,
    Page,
    Question,
    asked_pages,
    find_pages,
    split,
)
from export.cli import open_checkpoint
from runtime.backends.ort_decoder import OnnxDecoder
from runtime.backends.select import Backends
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from runtime.image.decode import open_image
from runtime.image.preprocess import preprocess
from runtime.model import Model
from runtime.text.template import first_turn
from tests.integration.calib.test_quantize import sqnr
from train.model import load_model


@pytest.fixture(scope="module")
def bundle(conformance_bundle):
    return open_bundle(conformance_bundle)


def changed(bundle, folder, op: str, *constants: np.ndarray):
    """The encoder's graph with one node more at its end."""
    model = onnx.load(bundle.path("encoder/fp32.onnx"))
    (maker,) = (node for node in model.graph.node if "image_embeds" in node.output)
    maker.output[0] = "before"
    names = [f"constant/{i}" for i in range(len(constants))]
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for v, n in zip(constants, names, strict=True))
    model.graph.node.append(helper.make_node(op, ["before", *names], ["image_embeds"]))
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def test_sqnr_is_that_of_all_arrays_together():
    random = np.random.default_rng(0)
    expected = [random.standard_normal((5, 3)), random.standard_normal((2, 3)) * 10]
    found = [array + random.standard_normal(array.shape) * 0.1 for array in expected]
    assert sqnr_db(found, expected) == pytest.approx(sqnr(np.concatenate(found), np.concatenate(expected)))
    assert sqnr_db(expected, expected) == float("inf")
    assert 19.9 < sqnr_db([np.full(9, 1.1)], [np.ones(9)]) < 20.1


def test_an_encoder_that_changes_nothing_loses_nothing(bundle, dataset):
    evaluation = Evaluation(bundle, find_pages(dataset)[:4], 8)
    loss = evaluation.loss(bundle.path("encoder/fp32.onnx"))
    assert (loss.sqnr_db, loss.differing) == (float("inf"), 0.0)
    assert loss.perplexity == evaluation.perplexity
    assert evaluation.questions == 8


def test_noise_of_a_known_size_has_that_sqnr(bundle, dataset, tmp_path):
    evaluation = Evaluation(bundle, find_pages(dataset)[:3], 3)
    assert evaluation.loss(changed(bundle, tmp_path, "Mul", np.float32(1.01))).sqnr_db == pytest.approx(40, abs=0.01)
    assert evaluation.loss(changed(bundle, tmp_path, "Neg")).differing > 10


def test_next_tokens_and_perplexity_are_those_of_the_pytorch_model(bundle, conformance, dataset):
    """In float32, on the whole sequence at once, without a KV cache."""
    pages = find_pages(dataset)[:3]
    evaluation = Evaluation(bundle, pages, 6)
    model = load_model(open_checkpoint(str(conformance / "checkpoint"))).eval()
    tokenizer = Model(bundle, Backends(encoder="onnx")).tokenizer
    likeliest, log_probs = [], []
    for page in pages:
        pixels = torch.from_numpy(preprocess(open_image(page.file), bundle.image))[None]
        with torch.no_grad():
            embeds = model.image_encoder(pixels)[0]
            for question in page.questions:
                prompt = first_turn(bundle.prompt, question.prompt, 1)
                start = tokenizer.encode_prompt(prompt, [len(embeds)])
                answered = f"{prompt}{'' if prompt.endswith(chr(10)) else ' '}{question.answer}"
                whole = tokenizer.encode_prompt(answered, [len(embeds)])[: len(start) + 16]
                table = model.decoder.get_input_embeddings()
                rows = [embeds[-1 - i] if i < 0 else table.weight[i] for i in whole]
                logits = model.decoder(inputs_embeds=torch.stack(rows)[None]).logits[0].double()
                likeliest += logits[len(start) - 1 :].argmax(-1).tolist()
                scores = logits.log_softmax(-1)
                log_probs += [scores[i - 1, whole[i]].item() for i in range(len(start), len(whole))]
    assert np.concatenate([reading.next for reading in evaluation._readings]).tolist() == likeliest
    assert evaluation.tokens == len(likeliest)
    assert evaluation.perplexity == pytest.approx(math.exp(-np.mean(log_probs)), rel=1e-4)


def test_answers_side_by_side_are_read_as_one_by_one(bundle, dataset, monkeypatch):
    answers = ["It.", "A long answer, which goes on for a while and is cut.", "stripes", "no", "[0.1,0.1,0.5,0.5]"]
    questions = tuple(Question(f"What {i}?", answer) for i, answer in enumerate(answers))
    pages = [Page(page.file, questions[i:]) for i, page in enumerate(find_pages(dataset)[:2])]
    found = []
    for at_once in (1, 2, 8):
        monkeypatch.setattr("calib.evaluation.AT_ONCE", at_once)
        found.append(Evaluation(bundle, pages, 9)._readings)
    for readings in found[1:]:
        for one, other in zip(readings, found[0], strict=True):
            np.testing.assert_array_equal(one.next, other.next)
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_answers_that_are_not_known_are_the_models_own(bundle, pictures):
    pages = find_pages(pictures)[:2]
    assert pages[0].questions == QUESTIONS
    evaluation = Evaluation(bundle, pages, 4)
    assert evaluation.score is None
    model = Model(bundle, Backends(encoder="onnx"))
    said = []
    for page in pages:
        for question in page.questions:
            *_, last = model.generate([page.file], question.prompt, calib.evaluation.Options(17))
            said += last.result.token_ids[:17]
    found = [len(case.ids) for cases in evaluation._cases for case in cases]
    assert len(found) == 4
    assert np.concatenate([reading.next for reading in evaluation._readings]).tolist() == said


def answered_by(bundle, pages) -> list[Page]:
    """The pages with the float32 model's own answers as the known ones, and a box that it never gives."""
    model, known = Model(bundle, Backends(encoder="onnx")), []
    for page in pages:
        questions = []
        for question in page.questions[:1]:
            *_, last = model.generate([page.file], question.prompt, calib.evaluation.Options(48))
            questions.append(Question(question.prompt, last.result.text))
        known.append(Page(page.file, (*questions, Question("Where?", "[0.1,0.1,0.5,0.5]"))))
    return known


def test_points_of_anls_are_lost_where_answers_are_known(bundle, pictures, tmp_path):
    evaluation = Evaluation(bundle, answered_by(bundle, find_pages(pictures)[:3]), 6)
    assert evaluation.score == Score(1.0, 0.0)
    assert evaluation.answers
    same = evaluation.loss(bundle.path("encoder/fp32.onnx"))
    assert (same.anls, same.grounding, same.budgeted) == (0.0, None, 0.0), "no box is known to float32 either"
    other = evaluation.loss(changed(bundle, tmp_path, "Neg"))
    assert other.anls > 10
    assert other.budgeted == other.anls
    assert evaluation.loss(bundle.path("encoder/fp32.onnx")) == same, "the encoder was put back"


def test_a_model_that_does_not_answer_is_measured_by_next_tokens(bundle, dataset, tmp_path):
    evaluation = Evaluation(bundle, find_pages(dataset)[:3], 6)
    assert evaluation.score.anls < calib.evaluation.LEAST_SCORE
    assert not evaluation.answers
    loss = evaluation.loss(changed(bundle, tmp_path, "Neg"))
    assert loss.anls is None
    assert loss.budgeted == loss.differing


def test_a_decoder_can_be_compared_too(bundle, dataset):
    evaluation = Evaluation(bundle, find_pages(dataset)[:3], 6)
    same = evaluation.loss(decoder=OnnxDecoder(bundle.path(bundle.decoder.file), bundle.decoder))
    assert (same.sqnr_db, same.differing, same.perplexity) == (None, 0.0, evaluation.perplexity)


def pages_of(count: int, questions: int = 2) -> list[Page]:
    return [Page(f"{i}.png", tuple(Question(str(i)) for i in range(questions))) for i in range(count)]


@pytest.fixture
def all_open(monkeypatch):
    monkeypatch.setattr("calib.images.open_image", lambda file: Image.frombytes("L", (8, 1), f"{file:>8}".encode()))


def test_images_are_held_out_where_there_are_enough(all_open):
    pages = pages_of(LEAST + HELD_OUT)
    calibration, held_out = split(pages, 64, 10)
    assert (len(calibration), len(held_out)) == (LEAST, HELD_OUT)
    assert not {page.file for page in calibration} & {page.file for page in held_out}
    calibration, held_out = split(pages[1:], 64, 10)
    assert (len(calibration), held_out) == (LEAST + HELD_OUT - 1, [])


def test_what_calibrates_does_not_depend_on_how_much_is_asked(all_open):
    pages = pages_of(400, questions=5)
    few, many = split(pages, 64, 100), split(pages, 64, 1000)
    assert few[0] == many[0]
    assert [len(held_out) for _, held_out in (few, many)] == [20, 200]


def test_a_dataset_names_its_images_and_questions(pictures, tmp_path):
    turns = ["<image>\nWhat?", "It.", "Where?", "[0.1,0.2,0.3,0.4]"]
    conversations = [{"from": role, "value": v} for role, v in zip(["human", "gpt"] * 2, turns, strict=True)]
    records = [{"id": str(i), "image": f"{i:02}.png", "conversations": conversations} for i in range(17)]
    records += [{"id": "text"}, {"id": "again", "image": "03.png", "conversations": conversations[:2]}]
    records += [{"id": "two", "image": ["17.png", "18.png"], "conversations": conversations}]
    for text in (json.dumps(records), "\n".join(map(json.dumps, records))):
        (tmp_path / "data.json").write_text(text)
        pages = find_pages(tmp_path / "data.json")
        assert [page.file.name for page in pages] == [f"{i:02}.png" for i in range(19)]
        assert pages[0].questions == (Question("What?", "It."), Question("Where?", "[0.1,0.2,0.3,0.4]"))
        assert len(pages[3].questions) == 3
        assert pages[17].questions == QUESTIONS, "what is asked about several images is no question about one"


def test_a_record_that_cannot_be_used_is_named_and_passed_over(tmp_path, capsys):
    said = {"from": "human", "value": "What?\u2028"}, {"from": "gpt", "value": ""}
    records = [{"id": str(i), "image": f"{i:02}.png", "conversations": said} for i in range(16)]
    odd = [
        {"image": [None], "conversations": said},
        {"image": "a.png", "conversations": [{"from": "human", "value": None}, said[1]]},
        {"image": "b.png", "conversations": [{"from": "system", "value": "Be brief."}, *said]},
        {"image": "c.png", "conversations": [{"from": "human"}, said[1]]},
        "no record",
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in [*records, *odd]]
    (tmp_path / "data.json").write_text("\n".join(lines) + "\n  \n")
    pages = find_pages(tmp_path / "data.json")
    assert [page.file.name for page in pages] == [f"{i:02}.png" for i in range(16)]
    assert pages[0].questions == (Question("What?", None),), "an empty answer is not known"
    shown = capsys.readouterr().err
    assert all(f"record {i} of" in shown for i in range(16, 21))


def test_questions_are_dealt_over_all_pages(bundle, pictures):
    files = [page.file for page in find_pages(pictures)[:3]]
    pages = [
        Page(file, tuple(Question(f"What {i}?") for i in range(n))) for file, n in zip(files, (1, 4, 2), strict=True)
    ]
    for limit, expected in ((7, 7), (100, 7), (5, 5), (2, 2)):
        evaluation = Evaluation(bundle, pages, limit)
        assert evaluation.questions == expected
    first = Evaluation(bundle, pages, 4)
    assert [[case.question.prompt for case in cases] for cases in first._cases] == [
        ["What 0?"],
        ["What 0?", "What 1?"],
        ["What 0?"],
    ]


def test_a_question_that_does_not_fit_the_context_is_passed_over(bundle, pictures, capsys):
    file = find_pages(pictures)[0].file
    long = Question("what " * bundle.decoder.context_length, "It.")
    evaluation = Evaluation(bundle, [Page(file, (Question("What?", "It."), long))], 2)
    assert evaluation.questions == 1
    assert file.name in capsys.readouterr().err
    with pytest.raises(UserError, match="fits the model's context"):
        Evaluation(bundle, [Page(file, (long,))], 1)


def test_grounding_counts_where_it_is_all_that_is_known(bundle, pictures, monkeypatch):
    pages = [Page(page.file, (Question("Where?", "[0.1,0.1,0.5,0.5]"),)) for page in find_pages(pictures)[:2]]
    monkeypatch.setattr("calib.evaluation.iou", lambda said, wanted: 1.0)
    monkeypatch.setattr("calib.evaluation.read_boxes", lambda text: [(0, 0, 1, 1)])
    evaluation = Evaluation(bundle, pages, 2)
    assert evaluation.score == Score(None, 1.0)
    assert evaluation.answers
    loss = evaluation.loss(bundle.path("encoder/fp32.onnx"))
    assert (loss.anls, loss.grounding) == (None, 0.0)
    assert loss.budgeted == loss.differing


def test_a_picture_that_does_not_open_is_named_and_passed_over(pictures, tmp_path, capsys):
    for file in pictures.glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "05.png").write_bytes(b"no picture")
    calibration, _ = split(find_pages(tmp_path), 20, 10)
    assert len(calibration) == 19
    assert "05.png" in capsys.readouterr().err
    for i in range(4):
        (tmp_path / f"{i:02}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="15 of 20 images can be opened"):
        split(find_pages(tmp_path), 20, 10)


def test_without_questions_image_embeddings_alone_are_compared(bundle, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("calib.evaluation.Model", None)  # no decoder is opened
    evaluation = Evaluation(bundle, *asked_pages(find_pages(pictures), 0))
    loss = evaluation.loss(changed(bundle, tmp_path, "Mul", np.float32(1.01)))
    assert loss == Loss(pytest.approx(40, abs=0.01), None, None)
    about = evaluation.about()
    assert (about["images"], about["questions"], about["next_tokens"]) == (SQNR_PAGES, 0, 0)


def test_how_much_is_asked():
    many, few = pages_of(400, questions=5), pages_of(400)
    assert [len(asked_pages(many, count)[0]) for count in (0, 100, None)] == [SQNR_PAGES, 20, FEW_PAGES]
    assert [len(asked_pages(few, count)[0]) for count in (0, 100, None)] == [SQNR_PAGES, 50, FEW_PAGES]
    assert [asked_pages(few, count)[1] for count in (0, 100, None)] == [0, 100, 200]
