"""The console command `convllava`: one name for every step from a checkpoint to an answer.

Commands are known by module name alone and imported when they are asked for, so that the runtime depends on none of
the packages that export and quantize.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from runtime.command import run
from runtime.errors import UserError


@dataclass(frozen=True)
class Command:
    """A module with `main(argv)`, what it does in one line, and the extras that it needs."""

    module: str
    summary: str
    extras: str


COMMANDS = {
    "infer": Command("runtime.infer", "ask a bundle about images", "cpu"),
    "serve": Command("runtime.serve.__main__", "serve a bundle with OpenAI's chat API", "cpu,serve"),
    "export": Command("export.bundle", "checkpoint -> bundle", "cpu,export"),
    "quantize": Command("calib.quantize", "bundle -> bundle with a quantized encoder or decoder", "cpu,export,calib"),
    "engine": Command("export.engine", "add TensorRT engines to a bundle", "cpu,export,rtx"),
    "parity": Command("export.parity", "compare a bundle with its checkpoint", "cpu,export"),
    "demo": Command("runtime.demo", "make the demo bundle and ask it about a page", "cpu,export"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `convllava COMMAND [options]`.

    Args:
        argv: the command's name and its options; None for those of the process.

    Returns:
        The exit code of the command.

    Raises:
        UserError: an unknown command, or one whose packages are not installed.
    """
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}, expected one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    sys.argv[0] = f"convllava {name}"  # the name that argparse shows
    try:
        return import_module(command.module).main(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if not package or package == __package__:
            raise
        raise UserError(
            f"convllava {name} needs {package}, which is not installed; pip install '.[{command.extras}]'"
        ) from error


def usage() -> str:
    """The help text: every command and what it does."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: convllava COMMAND [options]", "", *lines, "", "convllava COMMAND --help lists its options"]
    )


def console() -> None:
    """Entry point of the console script."""
    run(main)


if __name__ == "__main__":
    console()
