"""Every command says what it takes."""

import runpy
import sys

import pytest

from tests.support.commands import ROOT

FOLDERS = ("export", "calib", "runtime", "train", "benchmarks")
FILES = [file.relative_to(ROOT) for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
COMMANDS = [file for file in FILES if "ArgumentParser(" in (ROOT / file).read_text(encoding="utf-8")]


def test_commands_are_found():
    assert len(COMMANDS) > 15


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("file", COMMANDS, ids=str)
def test_help_is_printed(file, monkeypatch, capsys):
    module = ".".join(file.with_suffix("").parts).removesuffix(".__main__")
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
