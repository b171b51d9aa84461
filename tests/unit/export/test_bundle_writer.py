"""A bundle is written whole or not at all, whichever change of the file system fails or is the process's last."""

import contextlib
import errno
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from export.bundle_writer import move_graph, new_bundle
from runtime.bundle.manifest import open_bundle
from runtime.bundle.verify import MANIFEST, PARTIAL
from runtime.errors import UserError
from tests.support.fake_bundle import write_fake_bundle

CHANGES = {"os.rename", "os.mkdir", "os.chmod", "os.remove", "os.rmdir"}  # audit events
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DONE, NOT_REACHED, FAILED, KILLED = range(4)


def kill() -> None:
    os._exit(KILLED)


def fail() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def outcome(work: Callable[[], object], index: int, fault: Callable[[], None]) -> int:
    """Run `work` in a forked process, with a fault in place of its change of the file system of that index."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    counter, reached, fsync = itertools.count(), False, os.fsync

    def change() -> None:
        nonlocal reached
        if next(counter) == index:
            reached = True
            fault()

    def on_event(event: str, args: tuple) -> None:
        if event in CHANGES or (event == "open" and args[2] & WRITING):
            change()

    status = FAILED
    try:
        sys.addaudithook(on_event)
        os.fsync = lambda file: (change(), fsync(file))
        work()
        status = DONE if reached else NOT_REACHED
    finally:
        os._exit(status)


def outcomes(work: Callable[[], object], fault: Callable[[], None]) -> Iterator[int]:
    """One for each change that `work` makes."""
    return itertools.takewhile(
        lambda status: status != NOT_REACHED, (outcome(work, index, fault) for index in itertools.count())
    )


@pytest.mark.parametrize("fault", [kill, fail])
def test_a_new_bundle_is_whole_or_absent(tmp_path, fault):
    out, statuses = tmp_path / "bundle", []
    for status in outcomes(lambda: write_fake_bundle(out), fault):
        statuses.append(status)
        for folder in tmp_path.iterdir():
            if folder == out:
                assert open_bundle(out).name == "fake"
                out.rename(tmp_path / f"{len(statuses)}{PARTIAL}")
            else:
                with pytest.raises(UserError):
                    open_bundle(folder)
    assert len(statuses) > 20, "four files, their folders, the manifest, modes and a rename"
    assert (KILLED if fault is kill else FAILED) in statuses


@pytest.mark.parametrize("fault", [kill, fail])
def test_a_bundle_that_is_replaced_stays_until_the_new_one_is_there(tmp_path, fault):
    out, names = tmp_path / "bundle", []
    write_fake_bundle(out, "old")
    for status in outcomes(lambda: write_fake_bundle(out, "new"), fault):
        if status == KILLED and not out.exists():  # between two renames
            (replaced,) = tmp_path.glob(f"bundle{PARTIAL}*/replaced")
            replaced.rename(out)
            assert open_bundle(out).name == "old"
            continue
        names.append(open_bundle(out).name)
        assert (names[-1] == "new") >= (status == DONE)
        if names[-1] == "new":
            write_fake_bundle(out, "old")
    assert names.count("old") > 20
    assert "new" in names, "after the rename only the old one's removal can fail"


@pytest.mark.parametrize("fault", [kill, fail])
def test_remembered_hashes_are_whole_or_absent(tmp_path, private_cache, fault):
    bundle, count = write_fake_bundle(tmp_path / "bundle"), 0
    cache = private_cache / "convllava-deploy" / "sha256.json"
    cache.unlink(missing_ok=True)
    for status in outcomes(lambda: open_bundle(bundle), fault):
        count += 1
        assert status == (KILLED if fault is kill else DONE), "a cache that cannot be written is no error"
        if cache.exists():
            assert len(json.loads(cache.read_text())) >= 4
            cache.unlink()
        assert open_bundle(bundle).name == "fake"
        cache.unlink()
    assert count >= 2, "a file and a rename"


def test_a_failing_writer_leaves_nothing_and_keeps_the_old_bundle(tmp_path):
    bundle = write_fake_bundle(tmp_path / "bundle")
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(RuntimeError, match="on purpose"), new_bundle(bundle) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("on purpose")
    assert (bundle / MANIFEST).read_bytes() == before
    assert os.listdir(tmp_path) == ["bundle"]


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked process that ends with it, and return its process ID."""
    if pid := os.fork():
        return pid
    try:
        work()
    finally:
        os._exit(0)


def fill_and_wait(out: Path, ready: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), new_bundle(out) as folder:
        (folder / "half").write_text("x")
        os.write(ready, b"x")
        signal.pause()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_what_an_ended_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path, number):
    out = tmp_path / "bundle"
    ready, started = os.pipe()
    pid = in_child(lambda: fill_and_wait(out, started))
    assert os.read(ready, 1) == b"x"
    (living,) = tmp_path.iterdir()
    write_fake_bundle(out, "first")
    assert (living / "half").read_text() == "x"
    os.kill(pid, number)
    os.waitpid(pid, 0)
    assert living.exists() == (number == signal.SIGKILL)
    with pytest.raises(UserError):
        open_bundle(living)
    write_fake_bundle(out, "second")
    assert os.listdir(tmp_path) == ["bundle"]
    assert open_bundle(out).name == "second"


def test_a_bundle_that_a_killed_export_had_moved_away_comes_back(tmp_path):
    out = write_fake_bundle(tmp_path / "bundle")
    (tmp_path / f"bundle{PARTIAL}x").mkdir()
    out.rename(tmp_path / f"bundle{PARTIAL}x" / "replaced")
    with pytest.raises(RuntimeError), new_bundle(out):
        raise RuntimeError("the next export fails")
    assert open_bundle(out).name == "fake"
    assert os.listdir(tmp_path) == ["bundle"]


def test_other_peoples_folders_stay(tmp_path):
    others = [tmp_path / name for name in ("bundle", "bundle-2.partial-x", ".partial-x", "[b]undle.partial-x")]
    for folder in others[1:]:
        folder.mkdir()
    write_fake_bundle(others[0])
    write_fake_bundle(tmp_path / "[b]undle")
    assert sorted(tmp_path.iterdir()) == sorted([*others[:-1], tmp_path / "[b]undle"])


@pytest.mark.parametrize("fault", [kill, fail])
def test_a_graph_never_lies_beside_the_weights_of_another(tmp_path, fault):
    names, out = ("a.onnx", "a.onnx.data"), tmp_path / "out"
    for status in outcomes(lambda: replace_graph(tmp_path / "new", out), fault):
        versions = {name: (out / name).read_text() for name in names if (out / name).exists()}
        assert versions.keys() <= {"a.onnx.data"} or len(set(versions.values())) == 1, versions
        assert status != DONE or set(versions.values()) == {"new"}


def replace_graph(partial: Path, out: Path) -> None:
    for folder, version in ((out, "old"), (partial, "new")):
        folder.mkdir(exist_ok=True)
        for name in ("a.onnx.data", "a.onnx"):
            (folder / name).write_text(version)
    move_graph(partial, out, "a.onnx")


def test_something_that_is_no_bundle_is_not_replaced(tmp_path):
    thesis = tmp_path / "mine" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for place in (thesis, thesis.parent):
        with pytest.raises(UserError, match="no bundle"), new_bundle(Path(place)):
            pass
    assert thesis.read_text() == "years of work"
