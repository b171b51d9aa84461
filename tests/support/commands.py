"""Runs the project's commands from tests."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

ROOT = Path(__file__).parents[2]


def run_main(
    module: str, *arguments: object, stdin: str = "", env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """`python -m module arguments...` within this process: its exit code and what it printed.

    An exception that the command does not handle is raised, where the process would print its traceback.

    Args:
        stdin: what it reads from standard input; surrogates stand for bytes that are not UTF-8.
        env: variables to add to the environment while it runs.
    """
    keyboard = io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape")), "utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    argv = [module, *map(str, arguments)]
    sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.object(sys, "path", [*sys.path]),
            mock.patch.object(sys, "stdin", keyboard),
            mock.patch.dict(os.environ, env or {}),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # it was imported before
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            err.write(f"{exit_.code}\n")
    finally:
        signal.signal(signal.SIGTERM, sigterm)
    printed, errors = (stream.buffer.getvalue().decode() for stream in (out, err))
    return CompletedProcess(argv, status, printed, errors)


def run_module(module: str, *arguments: object, **options) -> CompletedProcess[str]:
    """`python -m module arguments...` in a process of its own, from the repository's root."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ.copy(), **options)


def assert_one_line_error(done: CompletedProcess[str], *mentions: object) -> None:
    """That a command ended as it does for mistakes of its user: with 2, and one line that names them."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""
    for mention in mentions:
        assert str(mention) in done.stderr
