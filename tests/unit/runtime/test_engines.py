"""Engines are believed only as far as their reports and hashes go: each thing wrong with one has its own message."""

import json

import pytest

from runtime.bundle.engines import FORMAT, choose_engine, find_engines, report_file
from runtime.bundle.manifest import open_bundle
from runtime.errors import UserError
from tests.support.fake_bundle import put_engine, write_fake_bundle

VERSIONS = {"rtx": "1.7.1.116"}


def ada() -> str:
    return "sm89"


def no_gpu() -> str:
    raise UserError("no NVIDIA GPU here")


@pytest.fixture
def bundle(tmp_path):
    return open_bundle(write_fake_bundle(tmp_path / "bundle"))


def choose(bundle, gpu=ada, precision="fp16", versions=VERSIONS):
    return choose_engine(bundle, "encoder", precision, gpu, versions)


def test_the_one_for_gpu_and_precision_is_chosen(bundle):
    for name in ("rtx-sm80-fp16", "rtx-sm89-fp16", "rtx-sm89-int8", "rtx-sm120-fp16", "tensorrt-sm89-fp16"):
        put_engine(bundle, name, name.encode())
    assert choose(bundle).file.name == "rtx-sm89-fp16.engine"
    assert choose(bundle, precision="int8").file.name == "rtx-sm89-int8.engine"
    assert choose(bundle, gpu=lambda: "sm120").file.name == "rtx-sm120-fp16.engine"
    assert choose(bundle, versions={"tensorrt": "1.7.1.116"}).file.name == "tensorrt-sm89-fp16.engine"


def test_none_fitting_says_what_is_there_and_what_builds_one(bundle):
    put_engine(bundle, "rtx-sm80-fp16")
    put_engine(bundle, "rtx-sm89-int8")
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
    file = put_engine(bundle)
    file.write_bytes(content)
    with pytest.raises(UserError, match=said):
        choose(bundle)


def test_another_version(bundle):
    put_engine(bundle, version="1.6.0.10")
    with pytest.raises(UserError, match=r"built by tensorrt_rtx 1\.6\.0\.10, another version than .* 1\.7\.1\.116"):
        choose(bundle)
    with pytest.raises(UserError, match=r"not installed: pip install '\.\[rtx\]'"):
        choose(bundle, versions={})


@pytest.mark.parametrize(
    ("built", "installed", "good"),
    [("1.7.1.116", "1.9.0.2", True), ("1.7.1.116", "1.7.0.90", False), ("1.7.1.116", "2.0.0.1", False)],
)
def test_a_version_compatible_engine_runs_on_later_versions_of_its_major_one(bundle, built, installed, good):
    put_engine(bundle, version=built, version_compatible=True)
    if good:
        assert choose(bundle, versions={"rtx": installed}).report["version"] == built
    else:
        with pytest.raises(UserError, match="another version"):
            choose(bundle, versions={"rtx": installed})


def test_another_onnx_file(bundle):
    put_engine(bundle, onnx={"file": "encoder/fp32.onnx", "sha256": {"encoder/fp32.onnx": "0" * 64}})
    with pytest.raises(UserError, match=r"built from another encoder/fp32\.onnx than this bundle's"):
        choose(bundle)
    put_engine(bundle, onnx={"file": "encoder/int8.onnx", "sha256": {"encoder/int8.onnx": "0" * 64}})
    with pytest.raises(UserError, match=r"built from another encoder/int8\.onnx"):
        choose(bundle)


def test_a_damaged_engine_of_another_gpu_is_nobodys_concern(bundle):
    put_engine(bundle)
    put_engine(bundle, "rtx-sm120-fp16").write_bytes(b"")
    assert choose(bundle).file.name == "rtx-sm89-fp16.engine"


def test_without_a_gpu_what_is_wrong_with_an_engine_comes_first(bundle):
    file = put_engine(bundle)
    with pytest.raises(UserError, match=r"need an NVIDIA GPU, no NVIDIA GPU here; there: rtx-sm89-fp16\.engine"):
        choose(bundle, gpu=no_gpu)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="truncated"):
        choose(bundle, gpu=no_gpu)


def test_an_engine_without_a_report_is_none(bundle):
    report_file(put_engine(bundle)).unlink()
    assert find_engines(bundle, "encoder") == []
    with pytest.raises(UserError, match="there: none"):
        choose(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"format": FORMAT + 1})])
def test_a_report_that_is_none(bundle, text):
    report_file(put_engine(bundle)).write_text(text)
    with pytest.raises(UserError, match=r"rtx-sm89-fp16\.engine\.json"):
        choose(bundle)


def test_a_good_engine_of_another_flavour_is_not_hidden_by_a_damaged_one(bundle):
    put_engine(bundle).write_bytes(b"")
    put_engine(bundle, "tensorrt-sm89-fp16")
    assert choose(bundle, versions={"tensorrt": "1.7.1.116"}).file.name == "tensorrt-sm89-fp16.engine"
    with pytest.raises(UserError, match="truncated"):
        choose(bundle, versions={"rtx": "1.7.1.116"})
