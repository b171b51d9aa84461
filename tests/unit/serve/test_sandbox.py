"""A sandbox: jobs run in order, and none can do harm to the next."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.serve.sandbox import Sandbox, _Job

WAIT = 30  # seconds, that a test waits for what must come


def sandbox(count=1, cpu_seconds=1, memory_bytes=512 << 20):
    return Sandbox("data", "tests.support.jobs:work", {"setting": 5}, count, memory_bytes, cpu_seconds)


def run(box, content):
    return asyncio.run(box.run(content))


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_jobs_run_in_one_process_and_return_bytes_of_any_size():
    box = sandbox()
    first, second = run(box, b"echo 1"), run(box, b"echo 1000000")
    assert first == ({"pid": first[0]["pid"], "setting": 5}, b"echo 1")
    assert second == (first[0], b"echo 1000000" * 1_000_000)
    assert asyncio.run(box.run(b"echo 1", {"option": 6})) == (first[0] | {"option": 6}, b"echo 1")


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (b"spin", UserError, "data: takes too much processor time"),
        (b"eat", UserError, "data: takes too much memory"),
        (b"crash", UserError, "data: ended its process by signal 11"),
        (b"refuse", UserError, "not this"),
        (b"exit", RuntimeError, "ends with 3"),
    ],
)
def test_what_a_job_does_is_its_own_error(content, error, said):
    box = sandbox()
    for _ in range(2):
        with pytest.raises(error, match=said):
            run(box, content)
        assert run(box, b"echo 2")[1] == b"echo 2echo 2"


def test_no_file_is_written_to(tmp_path):
    with pytest.raises((UserError, RuntimeError)):
        run(sandbox(), f"write {tmp_path / 'file'}".encode())
    assert not (tmp_path / "file").exists() or not (tmp_path / "file").read_bytes()


def test_who_waits_no_longer_ends_the_job_and_those_that_wait_go_on(tmp_path):
    box, begun = sandbox(cpu_seconds=1000), tmp_path / "begun"

    async def scene():
        pid = (await box.run(b"echo 1"))[0]["pid"]
        spinning = asyncio.create_task(box.run(f"spin {begun}".encode()))
        while not begun.is_symlink():
            await asyncio.sleep(0.01)
        never_begun, next_one = (asyncio.create_task(box.run(b"echo 1")) for _ in range(2))
        await asyncio.sleep(0.05)
        assert not next_one.done()
        never_begun.cancel()
        spinning.cancel()
        head, content = await asyncio.wait_for(next_one, WAIT)
        assert content == b"echo 1"
        assert head["pid"] != pid
        assert not is_running(pid)

    asyncio.run(scene())


def test_processes_that_were_started_before_take_the_jobs():
    box = sandbox(count=2)
    box.start()
    started = {process.pid for process in box._idle}
    assert len(started) == 2
    assert {run(box, b"echo 1")[0]["pid"] for _ in range(3)} <= started
    box.close()


def test_a_process_ends_with_its_sandbox():
    box = sandbox()
    pid = run(box, b"echo 1")[0]["pid"]
    box.close()
    end = time.monotonic() + WAIT
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_running(pid)


def test_what_a_job_prints_is_no_result():
    box = sandbox()
    for content in (b"print 1", b"echo 1", b"print 3"):
        assert run(box, content)[1] == content * int(content[-1:])


def test_a_process_that_somebody_else_ends_costs_no_job(tmp_path):
    box, begun = sandbox(cpu_seconds=1000), tmp_path / "begun"
    pid = run(box, b"echo 1")[0]["pid"]
    os.kill(pid, signal.SIGKILL)  # idle
    head, content = run(box, b"echo 2")
    assert (content, head["pid"] != pid) == (b"echo 2echo 2", True)

    async def scene():
        job = asyncio.create_task(box.run(f"once {begun}".encode()))  # ends the second time
        while not begun.is_symlink():
            await asyncio.sleep(0.01)
        os.kill(head["pid"], signal.SIGKILL)
        return await asyncio.wait_for(job, WAIT)

    assert asyncio.run(scene())[0]["pid"] != head["pid"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_for_the_server_do_not_end_jobs(tmp_path, number):
    box, begun = sandbox(cpu_seconds=1000), tmp_path / "begun"

    async def scene():
        pid = (await box.run(b"echo 1"))[0]["pid"]
        job = asyncio.create_task(box.run(f"wait {begun}".encode()))
        while not begun.is_symlink():
            await asyncio.sleep(0.01)
        os.kill(pid, number)
        begun.unlink()
        assert (await asyncio.wait_for(job, WAIT))[0]["pid"] == pid

    asyncio.run(scene())


def test_a_process_killed_at_the_end_of_its_job_is_not_used_again(monkeypatch):
    box = sandbox()
    run_in = _Job.run_in

    def ended_late(job, process):
        found = run_in(job, process)
        if found[1] == b"echo 1":
            process.kill()  # by `end`, when the result had come
            job.ended = True
        return found

    monkeypatch.setattr(_Job, "run_in", ended_late)
    for _ in range(3):
        run(box, b"echo 1")
        assert not box._idle
        assert run(box, b"echo 2")[1] == b"echo 2echo 2"


def test_processes_that_somebody_else_ends_while_they_wait_cost_no_job():
    box = sandbox(count=3)

    async def scene():
        return [head["pid"] for head, _ in await asyncio.gather(*(box.run(b"echo 1000000") for _ in range(3)))]

    pids = set(asyncio.run(scene())) | {process.pid for process in box._idle}
    assert len(pids) == 3
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until_dead(box)
    assert run(box, b"echo 2")[1] == b"echo 2echo 2"


def wait_until_dead(box):
    end = time.monotonic() + WAIT
    while any(Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "Z" for process in box._idle):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_job_that_was_ended_just_before_it_begins_is_not_begun():
    box = sandbox()
    run(box, b"echo 1")
    job = _Job(b"crash", {})
    job.end()
    assert job.run_in(box._idle[0]) == ({}, b"")
    assert run(box, b"echo 2")[1] == b"echo 2echo 2"
