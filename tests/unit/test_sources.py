"""No source opens a file in a way that could execute what is in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("runtime", "train", "export", "calib", "benchmarks")
# Modules whose loaders build any object that a file names
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
HARMLESS_NAMES = {"UnpicklingError", "PicklingError", "PickleError"}
EXECUTING_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}
UNSAFE_ARGUMENTS = {"trust_remote_code": False, "allow_pickle": False, "weights_only": True}  # -> its one value


def unsafe(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that could execute what a file holds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in UNSAFE_MODULES:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            for alias in node.names:
                if alias.name not in HARMLESS_NAMES:
                    yield node.lineno, f"from {node.module} import {alias.name}"
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in unsafe_call(node))


def unsafe_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for argument, safe in UNSAFE_ARGUMENTS.items():
        if argument in given and ast.unparse(given[argument]) != str(safe):
            yield f"{argument} is not {safe}"
    if name == "torch.load" and "weights_only" not in given:
        yield "torch.load without weights_only"
    if name in ("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "torch.export.load"):
        yield name
    if name in EXECUTING_CALLS or name in ("os.system", "os.popen"):
        yield name
    if name.startswith("yaml.") and name.removeprefix("yaml.") in UNSAFE_YAML:
        yield name
    if any(keyword.arg == "shell" and ast.unparse(keyword.value) != "False" for keyword in call.keywords):
        yield "a shell"


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_opened_without_executing_anything(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file in files
        for line, what in unsafe(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize("source", [
    "import pickle",
    "import cloudpickle as p",
    "from pickle import loads",
    "from dill import load as read",
    "torch.load(file)",
    "torch.load(file, weights_only=False)",
    "torch.load(file, weights_only=safe)",
    "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "AutoModel.from_pretrained(name, trust_remote_code=trusted)",
    "numpy.load(file, allow_pickle=True)",
    "torch.hub.load('owner/repository', 'model')",
    "yaml.load(text, Loader=yaml.Loader)",
    "eval(text)",
    "subprocess.run(text, shell=True)",
])  # fmt: skip
def test_unsafe_calls_are_found(source):
    assert list(unsafe(ast.parse(source)))


@pytest.mark.parametrize("source", [
    "from pickle import UnpicklingError",
    "torch.load(file, weights_only=True)",
    "numpy.load(file)",
    "yaml.safe_load(text)",
    "model.eval()",
    "re.compile(text)",
])  # fmt: skip
def test_safe_calls_are_let_pass(source):
    assert not list(unsafe(ast.parse(source)))
