"""How every command line ends: its exit code, and errors that a user can put right as a single line."""

import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

# Packages whose absence means that an extra was not installed, and how to install it
EXTRAS = {
    "onnxruntime": "install one flavor: pip install '.[cpu]' or '.[gpu]'",
    "fastapi": "pip install '.[cpu,serve]'",
    "uvicorn": "pip install '.[cpu,serve]'",
    "prometheus_client": "pip install '.[cpu,serve]'",
    "pydantic": "pip install '.[cpu,serve]'",
}


def run(main: Callable[[list[str] | None], int], extras: Mapping[str, str] = EXTRAS) -> NoReturn:
    """Exit with the status of `main(None)`, which parses `sys.argv`.

    Exit codes: that of `main`; an exception's `exit_code` where it has one (2 for `UserError`); 2 for what the system
    refuses (files, memory) and for packages in `extras` that are missing; 130 after Ctrl-C; 143 after SIGTERM; 0 where
    the reader of the output has gone. Any other exception is a bug and shows its traceback.

    Args:
        main: takes the arguments, None for those of the process, and returns the exit code.
        extras: top-level package -> what installs it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that temporary folders are removed
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    logger, messages = logging.getLogger("convllava"), logging.StreamHandler()
    logger.addHandler(messages)
    logger.setLevel(logging.WARNING)
    try:
        status = main(None)
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in extras:
            raise
        status = _report(f"no {package}; {extras[package]}", 2)
    except (OSError, MemoryError) as error:
        status = _report(str(error) or "out of memory", 2)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        status = _report(str(error), code)
    finally:
        logger.removeHandler(messages)
    sys.exit(status)


def _report(message: str, status: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status
