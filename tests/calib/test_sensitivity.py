"""Which layers pay for quantisation, and the search for the fewest to spare."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from calib.images import LEAST, find_images, open_images, pixel_values
from calib.qdq import QUANTISED, calibrate, quantise
from calib.quantize import HELD_OUT, Options, quantise_bundle, split
from calib.sensitivity import Evaluation, Group, Loss, groups_of, search, sensitivities, sqnr_db
from export.encoder import export_encoder
from runtime.bundle import open_bundle
from runtime.encoder import OnnxEncoder
from tests.calib.test_quantize import pictures, sqnr  # noqa: F401
from train.model import ConvNeXtEncoder, EncoderConfig, ImageEncoder, build_projector


@pytest.fixture(scope="module")
def source(conformance_bundle):
    return open_bundle(conformance_bundle).path("encoder/fp32.onnx")


@pytest.fixture(scope="module")
def calibrated(conformance_bundle, source, pictures):  # noqa: F811
    """(ranges, 4 images to evaluate on)."""
    bundle = open_bundle(conformance_bundle)
    feeds = list(pixel_values(open_images(find_images(pictures, 20)), bundle.image))
    return calibrate(source, feeds[:16], "minmax")[0], feeds[16:]


def test_sqnr_is_that_of_all_arrays_together():
    random = np.random.default_rng(0)
    expected = [random.standard_normal((5, 3)), random.standard_normal((2, 3)) * 10]
    found = [array + random.standard_normal(array.shape) * 0.1 for array in expected]
    assert sqnr_db(found, expected) == pytest.approx(sqnr(np.concatenate(found), np.concatenate(expected)))
    assert sqnr_db(expected, expected) == float("inf")
    assert 19.9 < sqnr_db([np.full(9, 1.1)], [np.ones(9)]) < 20.1


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


def test_one_group_alone_is_quantised(conformance_bundle, source, calibrated, tmp_path):
    ranges, feeds = calibrated
    groups = groups_of(onnx.load(source).graph)
    evaluation = Evaluation(open_bundle(conformance_bundle), source, feeds)
    noise = sensitivities(source, ranges, "int8", groups, evaluation)
    assert list(noise) == [group.name for group in groups]
    chosen = groups[3]
    others = [node for group in groups if group != chosen for node in group.nodes]
    quantise(source, tmp_path / "one.onnx", ranges, "int8", others)
    graph = onnx.load(tmp_path / "one.onnx").graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    rounded = {n.name for n in graph.node if n.op_type in QUANTISED and makers.get(n.input[1]) == "DequantizeLinear"}
    assert rounded == set(chosen.nodes)
    for node in graph.node:  # and nothing else reads a rounded value
        if node.name not in rounded and node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert "DequantizeLinear" not in {makers.get(name) for name in node.input}
    assert len([node for node in graph.node if node.op_type == "QuantizeLinear"]) <= len(rounded)
    found, expected = (
        np.concatenate(
            [onnxruntime.InferenceSession(file).run(None, {"pixel_values": x})[0].reshape(-1, 1) for x in feeds]
        )
        for file in (tmp_path / "one.onnx", source)
    )
    assert noise[chosen.name] == pytest.approx(sqnr(found, expected), abs=0.2)
    quantise(source, tmp_path / "all.onnx", ranges, "int8")
    assert evaluation.sqnr_db(tmp_path / "all.onnx") < min(noise.values()) + 0.5, (
        "all together is no better than the worst"
    )


def test_an_encoder_that_changes_nothing_loses_nothing(conformance_bundle, source, calibrated, tmp_path):
    _, feeds = calibrated
    evaluation = Evaluation(open_bundle(conformance_bundle), source, feeds)
    assert evaluation.loss(source) == Loss(float("inf"), 0.0)
    model = onnx.load(source)  # an encoder that says the opposite
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(onnx.helper.make_node("Neg", ["before"], ["image_embeds"]))
    onnx.save(model, tmp_path / "off.onnx")
    loss = evaluation.loss(tmp_path / "off.onnx")
    assert loss.differing > 10
    encoder, off = (OnnxEncoder(file, 64) for file in (source, tmp_path / "off.onnx"))
    images = [pixels[0] for pixels in feeds]
    assert loss.sqnr_db == pytest.approx(sqnr(off(images), encoder(images)), abs=1e-3)


class Priced:
    """An evaluation where each group costs what it costs, whatever is quantised with it."""

    def __init__(self, prices: dict[str, float], groups, monkeypatch):
        self._prices, self._groups, self._spared = prices, groups, ()
        monkeypatch.setattr("calib.sensitivity.quantise", lambda *arguments: setattr(self, "_spared", arguments[-1]))

    def loss(self, file) -> Loss:
        cost = sum(self._prices[g.name] for g in self._groups if not set(g.nodes) <= set(self._spared))
        return Loss(0.0, cost)


@pytest.mark.parametrize(
    ("budget", "left"),
    [(100, ()), (10, ()), (6, ("b",)), (5, ("b",)), (3, ("b", "d")), (2, ("b", "d")), (0, ("b", "d", "a")), (-1, None)],
)
def test_the_fewest_groups_that_meet_the_budget_are_left(monkeypatch, budget, left):
    """Costs in % are 2, 5, 0, 3; by SQNR the third looks worst, though it costs nothing."""
    groups = [Group(name, (f"{name}1", f"{name}2")) for name in "abcd"]
    noise = {"a": 40.0, "b": 20.0, "c": 10.0, "d": 30.0}
    steps = search(
        None, None, "int8", groups, noise, Priced({"a": 2, "b": 5, "c": 0, "d": 3}, groups, monkeypatch), budget
    )
    if left is None:
        assert set(steps[-1].left) == {"a", "b", "c", "d"}, "nothing is enough: everything is left"
    else:
        assert steps[-1].left == left
        assert steps[-1].loss.differing <= budget
    assert steps[0].left == ()


def test_images_are_held_out_where_there_are_enough():
    calibration, evaluation = split(list(range(LEAST + HELD_OUT)))
    assert (len(calibration), len(evaluation)) == (LEAST, HELD_OUT)
    assert not set(calibration) & set(evaluation)
    assert split(list(range(LEAST + HELD_OUT - 1))) == (list(range(LEAST + HELD_OUT - 1)), [])


def test_the_report_says_what_was_measured(conformance_bundle, tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(LEAST + HELD_OUT):
        Image.fromarray(np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((40, 50, 1))).astype(np.uint8)).save(
            folder / f"{i:02}.png"
        )
    out = tmp_path / "int8"
    _, step = quantise_bundle(open_bundle(conformance_bundle), out, folder, Options(budget=0.5))
    report = json.loads((out / "calib" / "report.json").read_text())
    assert report["held_out"] is True
    assert (report["calibration_images"], report["evaluation_images"]) == (LEAST, HELD_OUT)
    assert report["left_in_higher_precision"] == list(step.left)
    assert report["loss"]["differing"] == round(step.loss.differing, 2)
    assert len(report["sqnr_db_alone"]) == len(groups_of(onnx.load(out / "encoder" / "fp32.onnx").graph))
    assert step.loss.differing <= 0.5 or len(step.left) == len(report["sqnr_db_alone"])
    markdown = (out / "calib" / "report.md").read_text()
    assert all(name in markdown for name in report["sqnr_db_alone"])
    assert Image.open(out / "calib" / "sensitivity.png").size[0] > 500
    bundle = open_bundle(out)
    graph = onnx.load(bundle.path("encoder/int8.onnx")).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    spared = {n.name for n in graph.node if n.op_type in QUANTISED and makers.get(n.input[1]) != "DequantizeLinear"}
    groups = {group.name: group.nodes for group in groups_of(onnx.load(bundle.path("encoder/fp32.onnx")).graph)}
    assert spared == {node for name in step.left for node in groups[name]}
