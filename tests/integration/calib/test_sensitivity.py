"""Which layers pay for quantisation, and the search for the fewest to spare."""

import json

import numpy as np
import onnx
import pytest
from PIL import Image

from calib.activations import QUANTIZED
from calib.encoder import EncoderOptions, quantize_encoder_bundle
from calib.evaluation import Evaluation, Loss
from calib.images import find_pages
from calib.qdq import Calibrated
from calib.sensitivity import Step, candidate_sets, depthwise_of, groups_of, nodes_of, search, sensitivities
from export.encoder import export_encoder
from runtime.backends.ort_session import open_session
from runtime.bundle.manifest import open_bundle
from runtime.image.decode import open_image
from runtime.image.preprocess import preprocess
from tests.integration.calib.test_quantize import feeds_of, ranges_of, sqnr
from train.model import ConvNeXtEncoder, EncoderConfig, ImageEncoder, build_projector


def test_every_layer_is_in_the_group_that_its_place_in_the_model_says(tmp_path):
    config = EncoderConfig((2, 1, 3, 1, 2), (8, 16, 24, 32, 40), layer_scale=0.5)
    model = ImageEncoder(ConvNeXtEncoder(config), build_projector("mlp2x_gelu", 40, 48)).eval()
    export_encoder(model, tmp_path / "fp32.onnx", "fp32")
    graph = onnx.load(tmp_path / "fp32.onnx").graph
    groups = groups_of(graph)
    kinds = ("depthwise", "MLP in", "MLP out")
    expected = {"stem": 1, "projector": 2}
    expected |= {f"stage {i} {kind}": depth for i, depth in enumerate(config.depths) for kind in kinds}
    expected |= {f"stage {i} downsample": 1 for i in range(1, 5)}
    assert {group.name: len(group.nodes) for group in groups} == expected
    nodes = {node.name: node for node in graph.node}
    assert sorted(n for g in groups for n in g.nodes) == sorted(n for n, x in nodes.items() if x.op_type in QUANTIZED)
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for group in groups:
        for name in group.nodes:
            shape = weights[nodes[name].input[1]]
            if "MLP in" in group.name:
                assert shape[1] == 4 * shape[0]
            elif "MLP out" in group.name:
                assert shape[0] == 4 * shape[1]
            elif "depthwise" in group.name:
                assert shape[1:] == [1, 7, 7]
    assert [weights[nodes[name].input[1]] for name in groups[-1].nodes] == [[40, 48], [48, 48]]


def test_depthwise_groups_are_told(conformance_bundle):
    graph = onnx.load(open_bundle(conformance_bundle).path("encoder/fp32.onnx")).graph
    groups = groups_of(graph)
    assert depthwise_of(graph, groups) == tuple(group.name for group in groups if group.name.endswith("depthwise"))


def test_one_group_alone_is_quantised(conformance_bundle, pictures, tmp_path):
    bundle = open_bundle(conformance_bundle)
    source = bundle.path("encoder/fp32.onnx")
    calibrated = Calibrated(source, "int8", ranges_of(source, feeds_of(bundle, pictures)))
    pages = find_pages(pictures)[16:]
    groups = groups_of(onnx.load(source).graph)
    evaluation = Evaluation(bundle, pages, 4)
    alone = sensitivities(calibrated, groups, evaluation)
    assert list(alone) == [group.name for group in groups]
    chosen = groups[3]
    calibrated.write(tmp_path / "one.onnx", [node for group in groups if group != chosen for node in group.nodes])
    graph = onnx.load(tmp_path / "one.onnx").graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    rounded = {n.name for n in graph.node if n.op_type in QUANTIZED and makers.get(n.input[1]) == "DequantizeLinear"}
    assert rounded == set(chosen.nodes)
    for node in graph.node:  # and nothing else reads a rounded value
        if node.name not in rounded and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert "DequantizeLinear" not in {makers.get(name) for name in node.input}
    assert len([node for node in graph.node if node.op_type == "QuantizeLinear"]) <= len(rounded)
    images = [preprocess(open_image(page.file), bundle.image)[None] for page in pages]
    found, expected = (
        np.concatenate([open_session(file, None).run(None, {"pixel_values": x})[0].ravel() for x in images])
        for file in (tmp_path / "one.onnx", source)
    )
    assert alone[chosen.name].sqnr_db == pytest.approx(sqnr(found, expected), abs=0.2)
    calibrated.write(tmp_path / "all.onnx")
    least = min(loss.sqnr_db for loss in alone.values())
    assert evaluation.loss(tmp_path / "all.onnx").sqnr_db < least + 0.5, "all together is no better than the worst"


def test_sets_grow_by_the_group_that_is_worst_alone(conformance_bundle, pictures, tmp_path):
    bundle = open_bundle(conformance_bundle)
    source = bundle.path("encoder/fp32.onnx")
    calibrated = Calibrated(source, "int8", ranges_of(source, feeds_of(bundle, pictures)))
    groups = groups_of(onnx.load(source).graph)
    names = [group.name for group in groups]
    always = depthwise_of(onnx.load(source).graph, groups)
    worst_first = [names[i] for i in np.random.default_rng(0).permutation(len(names))]
    alone = {name: Loss(float(i), 0.0, None) for i, name in enumerate(worst_first)}
    evaluation = Evaluation(bundle, find_pages(pictures)[16:], 4)
    sets = candidate_sets(calibrated, groups, always, alone, evaluation)
    others = [name for name in worst_first if name not in always]
    assert [set(step.excluded) for step in sets] == [{*always, *others[:count]} for count in range(len(others) + 1)]
    assert all(list(step.excluded) == [name for name in names if name in step.excluded] for step in sets)
    assert sets[-1].sqnr_db == np.inf, "with every group left nothing is rounded"
    calibrated.write(tmp_path / "two.onnx", nodes_of(groups, sets[2].excluded))
    assert evaluation.loss(tmp_path / "two.onnx").sqnr_db == pytest.approx(sets[2].sqnr_db)


def sets_of(decibels: list[float]) -> list[Step]:
    """As many sets, each of one group more."""
    return [Step(tuple("abcdefghijklm"[:count]), sqnr_db) for count, sqnr_db in enumerate(decibels)]


def percent(anls: float) -> Loss:
    return Loss(0.0, 99.0, None, anls=anls)


@pytest.mark.parametrize(
    ("first", "whole", "budget", "asked"),
    [
        (1.0, [0.9, 0.5, 0.3, 0.1, 0.0], 1, [0]),  # the first set holds
        (1.9, [2.0, 1.0, 0.5, 0.2, 0.0], 1, [1, 0]),  # 5.6 dB more, and what lies below that
        (4.0, [4.0, 2.0, 1.0, 0.5, 0.0], 1, [2, 1]),
        (0.5, [4.0, 2.0, 1.0, 0.5, 0.0], 1, [0, 2, 1]),  # few questions said too little
        (15.0, [4.0, 2.0, 1.0, 0.5, 0.0], 1, [4, 1, 2]),  # or too much
        (3.0, [4.0, 3.5, 3.0, 2.5, 0.0], 1, [2, 4, 3]),  # further than the error's magnitude says
        (2.0, [2.0, 1.0, 0.5, 0.2, 0.0], 0, [4, 1, 2, 3]),
        (-1.0, [0.6, -0.2, 0.1, 0.0, 0.0], 0.5, [0, 1]),
    ],
)
def test_the_smallest_set_that_holds_on_all_questions_is_taken(first, whole, budget, asked):
    """Sets 6.1 dB apart, and everything; whole: what each costs on all questions, points of ANLS."""
    sets = sets_of([20.0, 26.1, 32.2, 38.3, np.inf])
    calls = []

    def loss_of(left) -> Loss:
        calls.append(len(left))
        return percent(whole[len(left)])

    rounds = search(sets, loss_of, percent(first), budget)
    assert calls == asked
    assert sorted(len(step.excluded) for step in rounds) == sorted(asked)
    assert all(step.loss.anls == whole[len(step.excluded)] for step in rounds)
    assert rounds[-1].excluded == sets[min(i for i in asked if whole[i] <= budget)].excluded


def test_a_budget_that_nothing_meets_takes_what_loses_least():
    sets = sets_of([20.0, 26.0, 32.0, np.inf])
    rounds = search(sets, lambda left: percent(7 - len(left)), percent(7), 1)
    assert [len(step.excluded) for step in rounds] == [3]
    assert rounds[-1].loss.budgeted == 4
    sets = sets_of([20 + 0.5 * count for count in range(12)])
    rounds = search(sets, lambda left: percent(1.05 - 0.001 * len(left)), percent(1), 1)
    assert [len(step.excluded) for step in rounds] == [0, 1, 2, 3], "and there is an end to it"


def test_the_report_says_what_was_measured(conformance_bundle, pictures, tmp_path):
    random = np.random.default_rng(1)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(30):
        pixels = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((40, 50, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    out = tmp_path / "int8"
    outcome = quantize_encoder_bundle(
        open_bundle(conformance_bundle), out, folder, EncoderOptions(budget=0.5, questions=8)
    )
    report = json.loads((out / "calib" / "encoder-int8.json").read_text())
    assert report["held_out"] is True
    assert report["budget_of"] == "% of next tokens that differ"
    assert (report["calibration_images"], report["questions"]) == (18, 24)
    assert report["left_in_higher_precision"] == list(outcome.excluded)
    assert report["loss"]["differing"] == round(outcome.loss.differing, 2)
    assert report["loss"]["anls"] is None
    bundle = open_bundle(out)
    graph = onnx.load(bundle.path("encoder/fp32.onnx")).graph
    groups = {group.name: group.nodes for group in groups_of(graph)}
    assert [row["group"] for row in report["alone"]] == list(groups)
    assert set(depthwise_of(graph, groups_of(graph))) <= set(outcome.excluded)
    within = [step for step in report["rounds"] if step["differing"] <= 0.5]
    assert within, "leaving every group loses nothing"
    assert len(outcome.excluded) == min(len(step["left"]) for step in within)
    assert set(map(tuple, (step["left"] for step in report["rounds"]))) <= {tuple(s["left"]) for s in report["sets"]}
    assert report["sets"][-1] == {"left": list(groups), "sqnr_db": None}
    markdown = (out / "calib" / "encoder-int8.md").read_text()
    assert all(name in markdown for name in groups)
    assert Image.open(out / "calib" / "encoder-int8.png").size[0] > 500
    quantised = onnx.load(bundle.path("encoder/int8.onnx")).graph
    makers = {name: node.op_type for node in quantised.node for name in node.output}
    spared = {n.name for n in quantised.node if n.op_type in QUANTIZED and makers.get(n.input[1]) != "DequantizeLinear"}
    assert spared == {node for name in outcome.excluded for node in groups[name]}
