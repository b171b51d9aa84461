"""Unit tests need no framework: a run of them alone fails where one was imported."""

import sys
from pathlib import Path

import pytest

FRAMEWORKS = {"torch", "transformers", "onnx"}


@pytest.fixture(scope="session", autouse=True)
def no_framework(request: pytest.FixtureRequest):
    yield
    if all(Path(__file__).parent in item.path.parents for item in request.session.items):
        imported = FRAMEWORKS & sys.modules.keys()
        assert not imported, f"a unit test imported {imported}; move it to tests/integration"
