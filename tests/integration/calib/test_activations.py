"""Histograms of what a graph's layers take, the ranges that follow, and the file that they are kept in."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from calib.activations import BINS, METHODS, Activations, Histogram, activations_of
from runtime.errors import UserError


def feeds(count=5, seed=0):
    random = np.random.default_rng(seed)
    sizes = [(64, 64), (128, 64), (64, 128)]
    return [(f"{i}.png", random.normal(0, i + 1, (1, 3, *sizes[i % 3])).astype(np.float32)) for i in range(count)]


def collected(source, images, file=None) -> Activations:
    activations = Activations(source, file)
    activations.collect(images)
    return activations


def test_a_histogram_counts_as_numpy_does():
    random = np.random.default_rng(0)
    arrays = [random.normal(0, scale, 4000).astype(np.float32) for scale in (0.01, 3, 0.5, 40, 1)]
    histogram = Histogram()
    for array in arrays:
        histogram.add(array)
    values = np.abs(np.concatenate(arrays))
    edges = histogram.width * np.arange(BINS + 1)
    np.testing.assert_array_equal(histogram.counts, np.histogram(values, edges)[0])
    assert histogram.counts.sum() == values.size
    assert histogram.largest == values.max()
    assert np.log2(histogram.width) % 1 == 0
    assert histogram.counts[BINS // 2 :].any(), "at least half of the bins serve"


def test_the_order_of_images_does_not_matter(tiny_encoder):
    one, other = collected(tiny_encoder, feeds()), collected(tiny_encoder, feeds()[::-1])
    for method in METHODS:
        assert one.ranges(method) == other.ranges(method)


def test_minmax_is_the_largest_magnitude_inside_the_graph(tiny_encoder):
    model = onnx.load(tiny_encoder)
    names = activations_of(model.graph)
    inner = [name for name in names if name != "pixel_values"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found, warnings = collected(tiny_encoder, feeds()).ranges("minmax")
    assert warnings == []
    assert list(found) == names
    values = [dict(zip(inner, session.run(inner, {"pixel_values": x}), strict=True)) for _, x in feeds()]
    for name in inner:
        assert found[name] == pytest.approx(max(np.abs(value[name]).max() for value in values), rel=1e-6)
    assert found["pixel_values"] == max(np.abs(x).max() for _, x in feeds())


def test_only_what_is_quantised_is_looked_at(tiny_encoder):
    graph = onnx.load(tiny_encoder).graph
    readers = [node for node in graph.node if node.op_type in ("Conv", "MatMul")]
    assert set(activations_of(graph)) == {node.input[0] for node in readers}


def test_mse_is_the_least_squared_error_of_all_thresholds():
    random = np.random.default_rng(1)
    values = np.concatenate([random.normal(0, 1, 20000), [30.0]]).astype(np.float32)  # one outlier
    histogram = Histogram()
    histogram.add(values)

    def error(threshold: float) -> float:
        step = threshold / 127
        return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values.astype(np.float64)).sum())

    found = histogram.threshold("mse")
    assert error(found) <= 1.02 * min(error(30 * share) for share in np.linspace(0.1, 1, 91))
    assert found < 30


def test_mse_of_fp8_keeps_what_int8_would_clip():
    """Floating point has as many levels for small values as for large ones."""
    values = np.concatenate([np.random.default_rng(1).normal(0, 1, 200_000), [12.0]]).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    assert histogram.threshold("mse", "fp8") > 1.5 * histogram.threshold("mse", "int8")


def test_what_the_graph_gives_must_be_finite_too(tiny_encoder, tmp_path):
    model = onnx.load(tiny_encoder)
    (last,) = (node for node in model.graph.node if "image_embeds" in node.output)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name in last.input)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) * np.float32(np.nan), bias.name))
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(UserError, match="image_embeds is not finite"):
        collected(tmp_path / "broken.onnx", feeds())


def test_percentile_leaves_that_share_outside():
    values = np.random.default_rng(2).normal(0, 1, 200_000).astype(np.float32)
    histogram = Histogram()
    histogram.add(values)
    assert histogram.threshold("percentile") == pytest.approx(np.percentile(np.abs(values), 99.99), rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_constant_activations_are_warned_of(tiny_encoder, method):
    images = [(name, np.zeros_like(x)) for name, x in feeds()]
    ranges, warnings = collected(tiny_encoder, images).ranges(method)
    assert any("pixel_values is zero" in warning for warning in warnings)
    assert ranges["pixel_values"] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_named_with_the_tensor(tiny_encoder, value):
    images = feeds()
    images[3][1][0, 1, 5, 5] = value
    with pytest.raises(UserError, match=r"pixel_values is not finite on 3\.png"):
        collected(tiny_encoder, images)


def test_a_layer_that_is_not_finite_is_named(tiny_encoder, tmp_path):
    model = onnx.load(tiny_encoder)
    names = activations_of(model.graph)
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == first.input[1])
    broken = numpy_helper.to_array(weight).copy()
    broken.flat[0] = np.inf
    weight.CopyFrom(numpy_helper.from_array(broken, weight.name))
    onnx.save(model, tmp_path / "broken.onnx")
    with pytest.raises(UserError, match=f"{names[1]} is not finite on 0.png"):
        collected(tmp_path / "broken.onnx", feeds())


def test_what_was_interrupted_goes_on(tiny_encoder, tmp_path):
    file = tmp_path / "ranges.npz"

    def stopped():
        yield from feeds()[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(tiny_encoder, stopped(), file)
    seen = []

    def again():
        for name, pixels in feeds():
            seen.append(name)
            yield name, pixels

    resumed = Activations(tiny_encoder, file)
    added = []
    add = resumed._add
    resumed._add = lambda name, values: (added.append(name), add(name, values))
    resumed.collect(again())
    assert list(dict.fromkeys(added)) == ["3.png", "4.png"], "the first three are not run again"
    for method in METHODS:
        assert resumed.ranges(method) == collected(tiny_encoder, feeds()).ranges(method)
    assert [path.name for path in tmp_path.iterdir()] == ["ranges.npz"]


def test_ranges_of_another_model_or_other_images_are_refused(tiny_encoder, tmp_path):
    file = tmp_path / "ranges.npz"
    collected(tiny_encoder, feeds(), file)
    model = onnx.load(tiny_encoder)
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="of another model"):
        Activations(tmp_path / "other.onnx", file)
    with pytest.raises(UserError, match="of other images"):
        collected(tiny_encoder, feeds(seed=1), file)
    with pytest.raises(UserError, match="of other images"):
        collected(tiny_encoder, feeds(3), file)
    for content in (b"no archive", file.read_bytes()[:100]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as ranges"):
            Activations(tiny_encoder, file)
