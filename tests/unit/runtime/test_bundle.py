"""The bundle's format: what is refused, and with which words."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.bundle import verify as bundles
from runtime.bundle.manifest import open_bundle
from runtime.bundle.verify import MANIFEST, PARTIAL
from runtime.errors import UserError
from tests.support.fake_bundle import write_fake_bundle


@pytest.fixture
def bundle(tmp_path):
    return write_fake_bundle(tmp_path / "bundle")


def edit(bundle, change):
    manifest = json.loads((bundle / MANIFEST).read_text())
    change(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_manifest_accounts_for_every_file(bundle):
    manifest = json.loads((bundle / MANIFEST).read_text())
    found = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    assert found == {*manifest["files"], MANIFEST}
    assert manifest["format"] == 1
    opened = open_bundle(bundle)
    assert (opened.encoder.stride, opened.encoder.precision, opened.decoder.layers) == (64, "fp32", 3)
    assert opened.image.resolution == 256


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["..", "/", "a\0b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed(draw, value):
    """The JSON value with one thing in it replaced or left out."""
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        what = draw(st.sampled_from(["inside", "inside", "inside", "gone", "another"]))
        if what == "inside":
            return {**value, key: draw(changed(value[key]))}
        if what == "gone":
            return {other: kept for other, kept in value.items() if other != key}
    if isinstance(value, list) and value and draw(st.booleans()):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], draw(changed(value[place])), *value[place + 1 :]]
    return draw(JSON)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_manifest_opens_or_is_refused_as_the_users(bundle, data):
    """Nothing but a UserError leaves, whatever some places of the manifest hold; what opens has the right types."""
    intact = json.loads((bundle / MANIFEST).read_text())
    manifest = intact
    for _ in range(data.draw(st.integers(1, 3))):
        manifest = data.draw(changed(manifest))
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    try:
        opened = open_bundle(bundle)
        assert all(
            type(value) is int for value in (opened.decoder.layers, opened.encoder.stride, opened.image.multiple)
        )
    except UserError:
        pass
    finally:
        (bundle / MANIFEST).write_text(json.dumps(intact))


@pytest.mark.parametrize("file", ["encoder/fp32.onnx", "decoder/model.onnx.data", "tokenizer/tokenizer.json"])
def test_missing_file_is_named(bundle, file):
    (bundle / file).unlink()
    with pytest.raises(UserError, match=f"{file}.*missing"):
        open_bundle(bundle)


@pytest.mark.parametrize("file", ["encoder/fp32.onnx", "decoder/model.onnx.data", "tokenizer/tokenizer.json"])
def test_one_flipped_bit_is_seen_even_after_the_bundle_was_opened(bundle, file):
    open_bundle(bundle)
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}.*altered.*sha256"):
        open_bundle(bundle)


def test_another_size_is_seen(bundle):
    with (bundle / "decoder/model.onnx").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match=r"model\.onnx.*altered.*bytes"):
        open_bundle(bundle)


def test_hashes_are_taken_once(bundle, monkeypatch):
    taken = []
    original = bundles.file_sha256
    monkeypatch.setattr(bundles, "file_sha256", lambda file: taken.append(file) or original(file))
    open_bundle(bundle)
    assert len(taken) == len(json.loads((bundle / MANIFEST).read_text())["files"])
    open_bundle(bundle)
    assert len(taken) == len(set(taken))
    os.utime(bundle / "encoder/fp32.onnx")
    open_bundle(bundle)
    assert taken[-1] == bundle / "encoder/fp32.onnx"
    assert taken.count(taken[-1]) == 2


def test_a_cache_that_cannot_be_written_or_read_is_let_be(bundle, tmp_path, monkeypatch):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert open_bundle(bundle).name == "fake"
    cache = tmp_path / "cache"
    (cache / "convllava-deploy").mkdir(parents=True)
    (cache / "convllava-deploy" / "sha256.json").write_text("not json")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert open_bundle(bundle).name == "fake"


@pytest.mark.parametrize("format_", [0, 2, "1", None])
def test_another_format_is_refused(bundle, format_):
    edit(bundle, lambda manifest: manifest.update(format=format_))
    with pytest.raises(UserError, match="format"):
        open_bundle(bundle)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3"])
def test_a_number_that_counts_nothing_is_named(bundle, value):
    edit(bundle, lambda manifest: manifest["decoder"].update(layers=value))
    with pytest.raises(UserError, match=f"needs 'layers' as a number above 0, found {value!r}"):
        open_bundle(bundle)


def test_a_path_that_is_none_and_a_manifest_too_deep_are_damage(bundle):
    edit(bundle, lambda manifest: manifest["files"].update({"a\x00b": {"sha256": "", "size": 0}}))
    with pytest.raises(UserError, match="missing from the bundle"):
        open_bundle(bundle)
    (bundle / MANIFEST).write_text("[" * 200_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        open_bundle(bundle)


@pytest.mark.parametrize("section", ["image", "prompt", "tokenizer", "encoder", "decoder", "files"])
def test_missing_section_is_named(bundle, section):
    edit(bundle, lambda manifest: manifest.pop(section))
    with pytest.raises(UserError, match=section):
        open_bundle(bundle)


@pytest.mark.parametrize(("section", "key"), [("encoder", "stride"), ("decoder", "layers"), ("image", "mean")])
def test_missing_and_unknown_keys_are_named(bundle, section, key):
    edit(bundle, lambda manifest: manifest[section].update(surprise=1))
    with pytest.raises(UserError, match="surprise"):
        open_bundle(bundle)
    edit(bundle, lambda manifest: (manifest[section].pop("surprise"), manifest[section].pop(key)))
    with pytest.raises(UserError, match=key):
        open_bundle(bundle)


def test_files_outside_the_bundle_are_refused(bundle):
    edit(bundle, lambda manifest: manifest["files"].update({"../secret": {"sha256": "0", "size": 1}}))
    with pytest.raises(UserError, match="outside"):
        open_bundle(bundle)


def test_a_graph_the_manifest_does_not_account_for_is_refused(bundle):
    edit(bundle, lambda manifest: manifest["files"].pop("encoder/fp32.onnx"))
    with pytest.raises(UserError, match=r"encoder/fp32\.onnx"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("encoder", "stride", "64"),
        ("encoder", "stride", 32),
        ("encoder", "file", []),
        ("decoder", "layers", "3"),
        ("decoder", "kv_dtype", "banana"),
        ("tokenizer", "file", "../x"),
        ("tokenizer", "file", None),
        ("files", "encoder/fp32.onnx", 5),
        ("files", "/etc/passwd", {"sha256": "0", "size": 1}),
    ],
)
def test_values_of_no_use_are_named(bundle, section, key, value):
    edit(bundle, lambda manifest: manifest[section].update({key: value}))
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_bundle(bundle)


def test_a_bundle_of_links_opens(bundle, tmp_path):
    """As a download cache lays one out."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in bundle.rglob("*") if file.is_file())):
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(number))
        link.symlink_to(blobs / str(number))
    assert open_bundle(snapshot).name == "fake"


def test_no_home_is_no_obstacle(bundle, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user has none
    monkeypatch.chdir(tmp_path)
    assert open_bundle(bundle).name == "fake"
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"name": 1}'])
def test_damaged_manifest_is_refused(bundle, content):
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_bundle(bundle)


def test_unfinished_folders_are_refused(bundle):
    left_over = bundle.rename(bundle.with_name(f"bundle{PARTIAL}abc"))
    with pytest.raises(UserError, match="not a finished bundle"):
        open_bundle(left_over)


@pytest.mark.parametrize("checked", [None, "none", {"encoder/fp32.onnx": 1e-6, "decoder/model.onnx": 0}])
def test_what_the_export_compared_is_known(bundle, checked):
    if checked is not None:
        edit(bundle, lambda manifest: manifest.update(checked=checked))
    assert open_bundle(bundle).checked == checked


@pytest.mark.parametrize("checked", ["full", True, 3, [], {"encoder/fp32.onnx": "small"}, {"encoder/fp32.onnx": True}])
def test_anything_else_for_what_was_compared_is_damage(bundle, checked):
    edit(bundle, lambda manifest: manifest.update(checked=checked))
    with pytest.raises(UserError, match="checked"):
        open_bundle(bundle)
