"""Bundles whose files are links, as the Hub's cache (symbolic) and `cp -al` (hard) leave them, and graphs whose weights
lie elsewhere."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from export.graphs.load import load_graph, read_weights
from export.tensorrt.build import Options
from export.tensorrt.source import engine_graph, source_of
from runtime.bundle.manifest import open_bundle
from runtime.bundle.verify import MANIFEST, file_sha256
from runtime.errors import UserError
from tests.support.bundles import CHECKPOINT
from tests.support.commands import assert_one_line_error, run_main


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A bundle whose graphs have all their weights in files beside them."""
    out = tmp_path_factory.mktemp("plain") / "bundle"
    with mock.patch("export.encoder.INLINE_BYTES", 0):
        done = run_main("export.bundle", "--checkpoint", CHECKPOINT, "--out", out, "--portable-decoder")
    assert done.returncode == 0, done.stderr
    assert len(list(out.rglob("*.onnx.data"))) == 4
    return out


@pytest.fixture(scope="module", params=["symbolic", "hard"])
def linked(request, plain, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    out = folder / "snapshots" / "4d7a2146"
    (folder / "blobs").mkdir()
    for number, file in enumerate(sorted(file for file in plain.rglob("*") if file.is_file())):
        blob, link = folder / "blobs" / str(number), out / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        if request.param == "hard":
            os.link(blob, link)
        else:
            link.symlink_to(os.path.relpath(blob, link.parent))
    return out


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    for number in range(16):
        Image.fromarray(random.integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def printed(*command: object) -> str:
    done = run_main(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_runtime_answers_from_links(plain, linked, pages):
    asked = ("--image", pages / "0.png", "--prompt", "What is it?", "--max-new-tokens", 4, "--json")
    found, expected = (json.loads(printed("runtime.infer", "--bundle", bundle, *asked)) for bundle in (linked, plain))
    assert found["token_ids"] == expected["token_ids"]


def tensors(folder: Path) -> dict[str, bytes]:
    """Values of all graphs of a bundle, by file and name."""
    return {
        f"{file.name}/{tensor.name}": tensor.raw_data
        for file in folder.rglob("*.onnx")
        for tensor in load_graph(file).graph.initializer
    }


@pytest.mark.parametrize(
    "options",
    [("encoder", "int8"), ("decoder", "int8"), ("decoder", "int4"), ("decoder", "int4", "--method", "gptq")],
    ids=" ".join,
)
def test_linked_bundles_are_quantized_as_others(options, plain, linked, pages, tmp_path):
    part, precision, *others = options
    for bundle, out in ((linked, "linked"), (plain, "plain")):
        arguments = ["--bundle", bundle, "--data", pages, "--part", part, "--precision", precision, "--questions", 4]
        printed("calib.quantize", *arguments, *others, "--out", tmp_path / out)
    assert tensors(tmp_path / "linked") == tensors(tmp_path / "plain")
    assert not any(file.is_symlink() for file in (tmp_path / "linked").rglob("*"))
    open_bundle(tmp_path / "linked")


def test_linked_bundles_are_compared_with_their_checkpoint(linked, pages):
    arguments = ("--checkpoint", CHECKPOINT, "--image", pages / "0.png", "--max-new-tokens", 4)
    assert "identical" in printed("export.parity", "--bundle", linked, *arguments)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_engines_are_built_from_links(part, plain, linked):
    options = Options(part=part, precision="fp16", target="sm89")
    found, expected = (engine_graph(source_of(open_bundle(bundle), options), options) for bundle in (linked, plain))
    assert found == expected
    assert all(tensor.raw_data for tensor in found[0].graph.initializer if np.prod(tensor.dims) > 64)


# Where weights lie


@pytest.fixture
def graph(tmp_path) -> Path:
    """One matrix, in a file beside the graph."""
    folder = tmp_path / "graphs" / "decoder"
    folder.mkdir(parents=True)
    values = numpy_helper.from_array(np.arange(600, dtype=np.float32).reshape(20, 30), "matrix")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "one", [], [], [values]))
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    return folder / "m.onnx"


def point(graph: Path, **entries: str) -> None:
    """Let the matrix lie elsewhere."""
    model = onnx.load(graph, load_external_data=False)
    (tensor,) = model.graph.initializer
    kept = {entry.key: entry.value for entry in tensor.external_data} | entries
    tensor.ClearField("external_data")
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    graph.write_bytes(model.SerializeToString())


def test_weights_are_read_through_one_link_alone(graph):
    data = graph.with_name("m.onnx.data")
    data.rename(graph.parents[2] / "elsewhere")
    data.symlink_to(graph.parents[2] / "elsewhere")
    (tensor,) = load_graph(graph).graph.initializer
    assert np.array_equal(numpy_helper.to_array(tensor), np.arange(600).reshape(20, 30))
    assert tensor.data_location == onnx.TensorProto.DEFAULT


@pytest.mark.parametrize("place", ["../m.onnx.data", "../../secret", "x/../../secret", "/secret", "", "absolute"])
def test_weights_outside_the_folder_are_refused_though_they_exist(place, graph, tmp_path):
    for file in (tmp_path / "secret", tmp_path / "graphs" / "secret", tmp_path / "graphs" / "m.onnx.data"):
        file.write_bytes(bytes(2400))
    (graph.parent / "x").mkdir()
    point(graph, location=str(tmp_path / "secret") if place == "absolute" else place)
    with pytest.raises(UserError, match=r"m\.onnx: weights of 'matrix' lie in .*, outside the graph's folder"):
        load_graph(graph)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"location": "none"}, "No such file"),
        ({"location": "a\0b"}, "null byte"),
        ({"location": "."}, "directory"),
        ({"offset": "-1"}, "m.onnx.data"),
        ({"offset": "four"}, "four"),
        ({"offset": "8"}, "truncated"),
        ({"length": "4000"}, "truncated"),
        ({"offset": str(1 << 70)}, "m.onnx.data"),
    ],
)
def test_weights_that_cannot_be_read_are_named(entries, told, graph):
    point(graph, **entries)
    with pytest.raises(UserError, match=told) as error:
        load_graph(graph)
    assert "matrix" in str(error.value)


def seal(bundle: Path) -> None:
    """Let the manifest fit the files."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        entry |= {"sha256": file_sha256(bundle / name), "size": (bundle / name).stat().st_size}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_values_in_the_graph_itself_stay(graph):
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "inside")
    before = tensor.SerializeToString()
    read_weights(tensor, graph)
    assert tensor.SerializeToString() == before


@pytest.mark.parametrize(
    "command",
    [
        ("runtime.infer", "--prompt", "Hello"),
        ("calib.quantize", "--part", "decoder", "--precision", "int8", "--questions", 4),
        ("export.engine", "--part", "decoder", "--capability"),
    ],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("place", ["../../secret", "absolute"])
def test_a_bundle_whose_weights_lie_outside_is_refused(command, place, plain, pages, tmp_path):
    """With a manifest whose hashes fit: a bundle may come from anybody."""
    bundle = tmp_path / "bundle"
    shutil.copytree(plain, bundle)
    shutil.copyfile(plain / "decoder/model.onnx.data", tmp_path / "secret")
    for name in ("decoder/model.onnx", "decoder/portable.onnx"):
        model = onnx.load(bundle / name, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = str(tmp_path / "secret") if place == "absolute" else place
        (bundle / name).write_bytes(model.SerializeToString())
    seal(bundle)
    arguments = {"calib.quantize": ["--data", pages, "--out", tmp_path / "out"]}
    done = run_main(command[0], "--bundle", bundle, *command[1:], *arguments.get(command[0], []))
    assert_one_line_error(done)
    assert not (tmp_path / "out").exists()
