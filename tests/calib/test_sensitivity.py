"""Which layers pay for quantisation, and the search for the fewest to spare."""

import json
from functools import partial

import numpy as np
import onnx
import pytest
from PIL import Image

from calib.activations import QUANTISED
from calib.evaluation import Evaluation, Loss
from calib.images import find_pages
from calib.qdq import Calibrated
from calib.quantize import Options, quantise_bundle
from calib.sensitivity import Group, depthwise_of, groups_of, search, sensitivities, settle
from export.encoder import export_encoder
from runtime.bundle import open_bundle
from runtime.image import open_image, preprocess
from runtime.session import open_session
from tests.calib.test_quantize import feeds_of, ranges_of, sqnr
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
    assert sorted(n for g in groups for n in g.nodes) == sorted(n for n, x in nodes.items() if x.op_type in QUANTISED)
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
    rounded = {n.name for n in graph.node if n.op_type in QUANTISED and makers.get(n.input[1]) == "DequantizeLinear"}
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


class Priced:
    """An evaluation where each group costs what it costs, whatever is quantised with it; and what writes for it."""

    def __init__(self, prices: dict[str, float], groups):
        self._prices, self._groups, self._spared = prices, groups, ()

    def write(self, target, spared) -> None:
        self._spared = spared

    def loss(self, file) -> Loss:
        cost = sum(self._prices[g.name] for g in self._groups if not set(g.nodes) <= set(self._spared))
        return Loss(0.0, 99.0, None, anls=cost)


@pytest.mark.parametrize(
    ("budget", "always", "left"),
    [
        (100, (), ()),
        (10, (), ()),
        (6, (), ("b",)),
        (5, (), ("b",)),
        (3, (), ("b", "d")),
        (2, (), ("b", "d")),
        (0, (), ("a", "b", "d")),
        (-1, (), None),
        (8, ("a",), ("a",)),
        (5, ("a",), ("a", "b")),
        (4, ("c",), ("b", "c", "d")),
    ],
)
def test_the_fewest_groups_that_meet_the_budget_are_left(budget, always, left):
    """Costs in points of ANLS are 2, 5, 0, 3; by SQNR the third looks worst, though it costs nothing."""
    groups = [Group(name, (f"{name}1", f"{name}2")) for name in "abcd"]
    alone = {"a": 40.0, "b": 20.0, "c": 10.0, "d": 30.0}
    priced = Priced({"a": 2, "b": 5, "c": 0, "d": 3}, groups)
    alone = {name: Loss(sqnr, 0.0, None) for name, sqnr in alone.items()}
    steps = search(priced, groups, always, alone, priced, budget)
    if left is None:
        assert set(steps[-1].left) == {"a", "b", "c", "d"}, "nothing is enough: everything is left"
    else:
        assert steps[-1].left == left
        assert steps[-1].loss.budgeted <= budget
    assert steps[0].left == always


def test_a_budget_holds_on_more_questions_than_the_search_asked():
    """Which show twice the loss. Costs as above; 6 points allow 5 on few questions, but not 10 on all."""
    groups = [Group(name, (f"{name}1", f"{name}2")) for name in "abcd"]
    alone = {name: Loss(sqnr, 0.0, None) for name, sqnr in {"a": 40.0, "b": 20.0, "c": 10.0, "d": 30.0}.items()}
    priced, known = Priced({"a": 2, "b": 5, "c": 0, "d": 3}, groups), {}
    asked = []

    def doubled(step) -> Loss:
        asked.append(step.left)
        return Loss(0.0, 99.0, None, anls=2 * step.loss.anls)

    find = partial(search, priced, groups, (), alone, priced, known=known)
    steps, loss = settle(find, doubled, 6)
    assert (steps[-1].left, loss.budgeted) == (("b", "d"), 4)
    assert asked == [("b",), ("b", "d")], "every result is asked about once"
    assert len(known) < len(steps), "no set is measured twice"
    steps, loss = settle(find, lambda step: Loss(0.0, 99.0, None, anls=7), 6)
    assert loss.budgeted == 7, "what cannot be met is said"


def test_the_report_says_what_was_measured(conformance_bundle, pictures, tmp_path):
    random = np.random.default_rng(1)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(30):
        pixels = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((40, 50, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    out = tmp_path / "int8"
    outcome = quantise_bundle(open_bundle(conformance_bundle), out, folder, Options(budget=0.5, questions=8))
    report = json.loads((out / "calib" / "encoder-int8.json").read_text())
    assert report["held_out"] is True
    assert report["budget_of"] == "% of next tokens that differ"
    assert (report["calibration_images"], report["questions"]) == (18, 24)
    assert report["left_in_higher_precision"] == list(outcome.left)
    assert report["loss"]["differing"] == round(outcome.loss.differing, 2)
    assert report["loss"]["anls"] is None
    bundle = open_bundle(out)
    graph = onnx.load(bundle.path("encoder/fp32.onnx")).graph
    groups = {group.name: group.nodes for group in groups_of(graph)}
    assert [row["group"] for row in report["alone"]] == list(groups)
    assert set(depthwise_of(graph, groups_of(graph))) <= set(outcome.left)
    within = [step for step in report["steps"] if step["differing"] <= 0.5]
    assert within, "leaving every group loses nothing"
    assert len(outcome.left) == min(len(step["left"]) for step in within)
    markdown = (out / "calib" / "encoder-int8.md").read_text()
    assert all(name in markdown for name in groups)
    assert Image.open(out / "calib" / "encoder-int8.png").size[0] > 500
    quantised = onnx.load(bundle.path("encoder/int8.onnx")).graph
    makers = {name: node.op_type for node in quantised.node for name in node.output}
    spared = {n.name for n in quantised.node if n.op_type in QUANTISED and makers.get(n.input[1]) != "DequantizeLinear"}
    assert spared == {node for name in outcome.left for node in groups[name]}
