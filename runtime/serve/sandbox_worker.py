"""The process of a `Sandbox`: it reads jobs from its input and writes their results, until its input ends.

python -m runtime.serve.sandbox_worker MODULE:JOB SETTINGS MEMORY_BYTES CPU_SECONDS
"""

import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from runtime.errors import UserError
from runtime.serve.sandbox import receive, send

NICE_INCREMENT = 10  # an image or a schema that comes later must not delay the answers before it

Result = tuple[dict[str, Any], bytes]
Job = Callable[[bytes, dict[str, Any]], Result]  # of the content and the job's options


def image_job(settings: dict[str, Any]) -> Job:
    """Image files to sized pixels: {"shape": [H, W, 3], "digest": of them} and the bytes of a uint8 array.

    settings: `rule`, of the bundle; `max_pixels`, `formats`: as `open_image` takes them. Options of a job:
    `resolution`, `aspect`.
    """
    from PIL import Image

    from runtime.image.decode import open_image
    from runtime.image.preprocess import ImageRule, digest, resized

    rule = ImageRule.from_dict(settings["rule"])
    Image.preinit()  # the common plugins, which the first image would wait for

    def run(content: bytes, options: dict[str, Any]) -> Result:
        image = open_image(content, settings["max_pixels"], settings["formats"])
        pixels = resized(image, rule, options["resolution"], options["aspect"])
        return {"shape": pixels.shape, "digest": digest(pixels)}, pixels.tobytes()

    return run


def schema_job(settings: dict[str, Any]) -> Job:
    """Whether a grammar can be compiled, as `Grammars.of_source` takes it. settings: `tokenizer`, a file; `vocab_size`;
    `eos_token_ids`."""
    from pathlib import Path

    from runtime.text.grammar import Grammars

    eos = frozenset[int](settings["eos_token_ids"])
    grammars = Grammars(Path(settings["tokenizer"]), settings["vocab_size"], eos)

    def run(content: bytes, _: dict[str, Any]) -> Result:
        grammars.of_source(content.decode())
        return {}, b""

    return run


def own_memory() -> int:
    """Private memory of this process as RLIMIT_DATA counts it, bytes; 0 where the system does not say."""
    with suppress(FileNotFoundError), open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
    return 0


def main() -> None:
    (module, job), settings = sys.argv[1].split(":"), json.loads(sys.argv[2])
    memory_bytes, cpu_seconds = map(int, sys.argv[3:])
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a terminal or a service; the server ends this
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE_INCREMENT)
    warnings.simplefilter("ignore")  # of Pillow, about metadata
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file is written to
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb", closefd=False)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no result
    run: Job = getattr(import_module(module), job)(settings)
    memory_bytes += own_memory()
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    while (received := receive(stdin)) is not None:
        limit = int(time.process_time()) + 1 + cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            options, content = received
            head, content = run(content, options)
        except UserError as error:
            head, content = {"error": str(error)}, b""
        except MemoryError:
            os.abort()  # as where an allocation fails in C or Rust; a new process has all its memory
        with suppress(BrokenPipeError):
            send(stdout, head, content)


if __name__ == "__main__":
    main()
