"""Engines are believed only as far as their reports and hashes go: each thing wrong with one has its own message."""

import json
import shutil

import pytest

from runtime.bundle.engines import FORMAT, choose_engine, engine_folder, find_engines, report_file, write_report
from runtime.bundle.manifest import open_bundle
from runtime.bundle.verify import file_sha256
from runtime.errors import UserError
from tests.integration.runtime.test_infer import infer
from tests.support.commands import assert_one_line_error

VERSIONS = {"rtx": "1.7.1.116"}


def ada() -> str:
    return "sm89"


def no_gpu() -> str:
    raise UserError("no NVIDIA GPU here")


@pytest.fixture
def bundle(conformance_bundle, tmp_path):
    return open_bundle(shutil.copytree(conformance_bundle, tmp_path / "bundle"))


def put(bundle, name: str = "rtx-sm89-fp16", content: bytes = b"an engine", **changes):
    """An engine file with a report that fits it."""
    flavour, target, precision = name.split("-")
    file = engine_folder(bundle.folder, "encoder") / f"{name}.engine"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    source = "encoder/fp32.onnx"
    report = {
        "format": FORMAT, "flavour": flavour, "version": "1.7.1.116", "version_compatible": False, "target": target,
        "precision": precision, "profiles": [{}], "engine": {"size": len(content), "sha256": file_sha256(file)},
        "onnx": {"file": source, "sha256": {source: bundle.sha256(source)}},
    }  # fmt: skip
    write_report(file, report | changes)
    return file


def choose(bundle, gpu=ada, precision="fp16", versions=VERSIONS):
    return choose_engine(bundle, "encoder", precision, gpu, versions)


def test_the_one_for_gpu_and_precision_is_chosen(bundle):
    for name in ("rtx-sm80-fp16", "rtx-sm89-fp16", "rtx-sm89-int8", "rtx-sm120-fp16", "tensorrt-sm89-fp16"):
        put(bundle, name, name.encode())
    assert choose(bundle).file.name == "rtx-sm89-fp16.engine"
    assert choose(bundle, precision="int8").file.name == "rtx-sm89-int8.engine"
    assert choose(bundle, gpu=lambda: "sm120").file.name == "rtx-sm120-fp16.engine"
    assert choose(bundle, versions={"tensorrt": "1.7.1.116"}).file.name == "tensorrt-sm89-fp16.engine"


def test_none_fitting_says_what_is_there_and_what_builds_one(bundle):
    put(bundle, "rtx-sm80-fp16")
    put(bundle, "rtx-sm89-int8")
    with pytest.raises(UserError) as error:
        choose(bundle)
    for said in ("rtx-sm80-fp16.engine", "rtx-sm89-int8.engine", "the GPU: sm89", "--precision fp16 --flavour rtx"):
        assert said in str(error.value)
    assert f"python -m export.engine --bundle {bundle.folder} --part encoder" in str(error.value)
    assert "--target sm89" in str(error.value)
    with pytest.raises(UserError, match="--flavour tensorrt --target current"):  # it builds for no other
        choose(bundle, versions={"tensorrt": "1.0"})


@pytest.mark.parametrize(("content", "said"), [(b"an eng", "truncated"), (b"another:)", "altered"), (b"", "truncated")])
def test_a_file_that_is_not_the_reports(bundle, content, said):
    file = put(bundle)
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        choose(bundle)


def test_another_version(bundle):
    put(bundle, version="1.6.0.10")
    with pytest.raises(UserError, match=r"built by tensorrt_rtx 1\.6\.0\.10, another version than .* 1\.7\.1\.116"):
        choose(bundle)
    with pytest.raises(UserError, match=r"not installed: pip install '\.\[rtx\]'"):
        choose(bundle, versions={})


@pytest.mark.parametrize(
    ("built", "installed", "good"),
    [("1.7.1.116", "1.9.0.2", True), ("1.7.1.116", "1.7.0.90", False), ("1.7.1.116", "2.0.0.1", False)],
)
def test_a_version_compatible_engine_runs_on_later_versions_of_its_major_one(bundle, built, installed, good):
    put(bundle, version=built, version_compatible=True)
    if good:
        assert choose(bundle, versions={"rtx": installed}).report["version"] == built
    else:
        with pytest.raises(UserError, match="another version"):
            choose(bundle, versions={"rtx": installed})


def test_another_onnx_file(bundle):
    put(bundle, onnx={"file": "encoder/fp32.onnx", "sha256": {"encoder/fp32.onnx": "0" * 64}})
    with pytest.raises(UserError, match=r"built from another encoder/fp32\.onnx than this bundle's"):
        choose(bundle)
    put(bundle, onnx={"file": "encoder/int8.onnx", "sha256": {"encoder/int8.onnx": "0" * 64}})
    with pytest.raises(UserError, match=r"built from another encoder/int8\.onnx"):
        choose(bundle)


def test_a_damaged_engine_of_another_gpu_is_nobodys_concern(bundle):
    put(bundle)
    put(bundle, "rtx-sm120-fp16").write_bytes(b"")
    assert choose(bundle).file.name == "rtx-sm89-fp16.engine"


def test_without_a_gpu_what_is_wrong_with_an_engine_comes_first(bundle):
    file = put(bundle)
    with pytest.raises(UserError, match=r"need an NVIDIA GPU, no NVIDIA GPU here; there: rtx-sm89-fp16\.engine"):
        choose(bundle, gpu=no_gpu)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="truncated"):
        choose(bundle, gpu=no_gpu)


def test_an_engine_without_a_report_is_none(bundle):
    report_file(put(bundle)).unlink()
    assert find_engines(bundle, "encoder") == []
    with pytest.raises(UserError, match="there: none"):
        choose(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"format": FORMAT + 1})])
def test_a_report_that_is_none(bundle, text):
    report_file(put(bundle)).write_text(text)
    with pytest.raises(UserError, match=r"rtx-sm89-fp16\.engine\.json"):
        choose(bundle)


def test_the_command_line_refuses_before_tensorrt_is_asked(bundle):
    """There is no GPU here, and the file is no engine: whoever asked TensorRT would hear of that."""
    file = put(bundle)
    file.write_bytes(b"an")
    arguments = ("--prompt", "What?", "--encoder", "tensorrt")
    assert_one_line_error(infer(bundle.folder, *arguments), "truncated", file)
    put(bundle, version="0.1")
    assert_one_line_error(infer(bundle.folder, *arguments), "another version", "0.1", "1.7.1.116")
    put(bundle, onnx={"file": "encoder/fp32.onnx", "sha256": {"encoder/fp32.onnx": "0" * 64}})
    assert_one_line_error(infer(bundle.folder, *arguments), "another encoder/fp32.onnx")
    put(bundle)
    assert_one_line_error(infer(bundle.folder, *arguments), "need an NVIDIA GPU", "rtx-sm89-fp16.engine")


def test_a_good_engine_of_another_flavour_is_not_hidden_by_a_damaged_one(bundle):
    put(bundle).write_bytes(b"")
    put(bundle, "tensorrt-sm89-fp16")
    assert choose(bundle, versions={"tensorrt": "1.7.1.116"}).file.name == "tensorrt-sm89-fp16.engine"
    with pytest.raises(UserError, match="truncated"):
        choose(bundle, versions={"rtx": "1.7.1.116"})
