"""Jobs for a sandbox, by what the content says."""

import os
import signal
import time
from pathlib import Path

from runtime.errors import UserError
from runtime.serve.sandbox_worker import image_job


def work(settings):
    def run(content, options):
        what, _, argument = content.decode().partition(" ")
        if what == "spin":
            if argument:
                Path(argument).symlink_to("begun")  # no file may be written to
            while True:
                pass
        if what in ("once", "wait"):
            begun, again = Path(argument), Path(argument).is_symlink()
            if not again:
                begun.symlink_to("begun")
            while begun.is_symlink() and not again:
                time.sleep(0.01)
            argument = "1"
        if what == "eat":
            held = []
            while True:
                held.append(bytes(1 << 20))
        if what == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "exit":
            raise SystemExit(3)
        if what == "refuse":
            raise UserError("not this")
        if what == "print":
            print("{}", flush=True)
            os.system("echo noise")
        if what == "write":
            Path(argument).write_bytes(bytes(10))
        return {"pid": os.getpid(), **settings, **options}, content * int(argument or 1)

    return run


def slow_image(settings):
    """As `image_job`, but the content "spin" never ends."""
    opened = image_job(settings)

    def run(content, options):
        while content == b"spin":
            pass
        return opened(content, options)

    return run
