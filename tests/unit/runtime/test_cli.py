"""The console command: a name leads to a module's main, lazily, and what is missing is told in one line."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest

from runtime import cli
from runtime.errors import UserError


@pytest.fixture
def imported(monkeypatch):
    """Modules that a command imports, and the options that their main is given; any exit code is 7."""
    found = []

    def import_module(name):
        return SimpleNamespace(main=lambda argv: found.append((name, argv)) or 7)

    monkeypatch.setattr(cli, "import_module", import_module)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/convllava"])
    return found


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_command_runs_the_main_of_its_module(name, imported):
    assert cli.main([name, "--bundle", "x", "--help"]) == 7
    assert imported == [(cli.COMMANDS[name].module, ["--bundle", "x", "--help"])]
    assert sys.argv[0] == f"convllava {name}"


def test_the_commands_come_from_the_process_by_default(imported, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convllava", "infer", "--json"])
    assert cli.main() == 7
    assert imported == [("runtime.infer", ["--json"])]


@pytest.mark.parametrize("argv", [[], ["-h"], ["--help"]])
def test_help_has_a_line_for_each_command(argv, imported, capsys):
    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in lines)
    assert imported == []


def test_an_unknown_command_is_an_error_that_names_the_known_ones(imported):
    with pytest.raises(UserError, match=r"'exprot'.*infer, serve, export"):
        cli.main(["exprot"])


@pytest.mark.parametrize(
    ("name", "missing", "extras"),
    [("export", "torch", "cpu,export"), ("quantize", "calib", "cpu,export,calib"), ("serve", "fastapi", "cpu,serve")],
)
def test_a_missing_package_names_the_extras(name, missing, extras, monkeypatch):
    def import_module(module):
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(cli, "import_module", import_module)
    with pytest.raises(UserError, match=rf"{name} needs {missing}.*pip install '\.\[{extras}\]'"):
        cli.main([name])


def test_a_module_missing_from_the_runtime_is_a_bug(monkeypatch):
    def import_module(module):
        raise ModuleNotFoundError("No module named 'runtime.nothing'", name="runtime.nothing")

    monkeypatch.setattr(cli, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["infer"])


@pytest.mark.parametrize("command", cli.COMMANDS.values(), ids=cli.COMMANDS)
def test_every_command_names_a_module_that_is_there(command):
    assert importlib.util.find_spec(command.module)


def test_as_a_process():
    def convllava(*arguments):
        return subprocess.run([sys.executable, "-m", "runtime.cli", *arguments], capture_output=True, text=True)

    help_ = convllava("infer", "--help")
    assert (help_.returncode, help_.stderr) == (0, "")
    assert help_.stdout.startswith("usage: convllava infer ")
    assert convllava().stdout == cli.usage() + "\n"
    failed = convllava("infer", "--bundle", "nowhere", "--prompt", "x")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
