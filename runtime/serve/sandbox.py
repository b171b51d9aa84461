"""Work on what clients send, in processes that have limits and can be ended.

Threads cannot be stopped, and what a decoder written in C does to a process cannot be undone. A `Sandbox` has a few
processes (`runtime.serve.sandbox_worker`) that are started when they are needed, run one job at a time with limits of
memory and processor time, and are killed with the job that they run where nobody waits for it any more. A job and its
result are a line of JSON and bytes: nothing that comes from such a process is executed.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import runtime
from runtime.errors import UserError

WAYS_TO_END: dict[int, str] = {
    signal.SIGXCPU: "takes too much processor time",
    signal.SIGKILL: "takes too much memory",
    signal.SIGABRT: "takes too much memory",
}


def send(pipe: IO[bytes], head: dict[str, Any], content: bytes) -> None:
    """Write a message: a line of JSON, then bytes."""
    pipe.write(json.dumps(head | {"bytes": len(content)}).encode() + b"\n")
    pipe.write(content)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """A message that `send` wrote; None where the pipe ends before it does."""
    if not (line := pipe.readline()).endswith(b"\n"):
        return None
    head = json.loads(line)
    size = head.pop("bytes")
    content = pipe.read(size)
    return (head, content) if len(content) == size else None


class Sandbox:
    """Processes of one kind."""

    def __init__(self, what: str, job: str, settings: dict[str, Any], count: int, memory_bytes: int, cpu_seconds: int):
        """
        Args:
            what: they work on, for messages.
            job: what they do, `module:function`; see those of `sandbox_worker`.
            settings: for all jobs, JSON.
            count: how many run at once; other jobs wait, first come, first served.
            memory_bytes: private memory that a job may take beside what its process has from the start.
            cpu_seconds: processor time of one job.
        """
        self._command = [sys.executable, "-P", "-m", "runtime.serve.sandbox_worker"]
        self._command += [job, json.dumps(settings), str(memory_bytes), str(cpu_seconds)]
        self.count, self._what = count, what
        self._threads = ThreadPoolExecutor(count, job)  # each waits for a process
        self._idle: deque[subprocess.Popen[bytes]] = deque()

    def start(self) -> None:
        """Start its processes before there are jobs."""
        for _ in range(self.count):
            self._idle.append(self._started())

    async def run(self, content: bytes, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], bytes]:
        """Run one job; whoever is cancelled while waiting for it ends it.

        Args:
            content: to work on.
            options: of this job, JSON.

        Returns:
            What the job returned.

        Raises:
            UserError: of the job; it has reached a limit, or its process has died on it.
        """
        job = _Job(content, options or {})
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, job)
        finally:
            job.end()

    def close(self) -> None:
        """End its processes, once none has a job."""
        self._threads.shutdown()
        for process in self._idle:
            process.kill()
            process.wait()

    def _run(self, job: "_Job") -> tuple[dict[str, Any], bytes]:
        if job.ended:
            return {}, b""  # nobody waits for it
        found = self._tried(job)
        if found == -signal.SIGKILL and not job.ended:  # by somebody else, or for memory that there may be by now
            found = self._tried(job)
        if not isinstance(found, int):
            return found
        if found > 0:
            raise RuntimeError(f"a sandbox's process ends with {found}")
        raise UserError(f"{self._what}: {WAYS_TO_END.get(-found, f'ended its process by signal {-found}')}")

    def _tried(self, job: "_Job") -> tuple[dict[str, Any], bytes] | int:
        """What the job returned, or how the process ended on it."""
        process = self._taken()
        try:
            return job.run_in(process)
        except (OSError, EOFError):
            process.kill()
            return process.wait()
        finally:
            if job.ended:  # it may have been killed just when the job was done
                process.kill()
                process.wait()
            elif process.poll() is None:
                self._idle.append(process)

    def _taken(self) -> subprocess.Popen[bytes]:
        """One that is idle, or a new one."""
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                return self._started()
            if process.poll() is None:  # else somebody else has ended it
                return process

    def _started(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(Path(runtime.__file__).parents[1]), *filter(None, sys.path)])
        environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(self._command, stdin=pipe, stdout=pipe, env=environment)  # it ends with its stdin


class _Job:
    """What one process is to do, which another thread may end."""

    def __init__(self, content: bytes, options: dict[str, Any]):
        self._content, self._options = content, options
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None  # while it runs there
        self.ended = False  # nobody waits for it

    def run_in(self, process: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bytes]:
        """Raises EOFError or OSError where the process has died."""
        assert process.stdin is not None and process.stdout is not None
        with self._lock:
            if self.ended:
                return {}, b""
            self._process = process
        try:
            send(process.stdin, self._options, self._content)
            if (found := receive(process.stdout)) is None:
                raise EOFError
        finally:
            with self._lock:
                self._process = None
        if "error" in found[0]:
            raise UserError(found[0]["error"])
        return found

    def end(self) -> None:
        """Kill the process that runs it; it is not begun where it still waits."""
        with self._lock:
            self.ended = True
            if self._process is not None:
                self._process.kill()
