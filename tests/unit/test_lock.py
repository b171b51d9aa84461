"""constraints.txt pins everything that `make setup` installs, so that an audit of it is one of the environment."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def pins() -> dict[str, str]:
    """Package -> version, of constraints.txt."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()]
    pairs = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): version for name, version in pairs}


def setup_requirements() -> list[Requirement]:
    """What `make setup` asks pip for."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    variables = dict(re.findall(r"^(\w+) := (.*)$", makefile, re.MULTILINE))
    extras = re.sub(r"\$\((\w+)\)", lambda match: variables[match[1]], variables["SETUP"]).split(",")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    of_extras = [name for extra in extras for name in project["optional-dependencies"][extra]]
    requirements = [Requirement(name) for name in (*project["dependencies"], *of_extras)]
    return [found for found in requirements if found.marker is None or found.marker.evaluate()]


def installed(requirements: list[Requirement]) -> dict[str, str]:
    """Package -> installed version, of requirements and of whatever these require here."""
    found, seen, waiting = {}, set(), list(requirements)
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        package = distribution(requirement.name)
        found[canonicalize_name(requirement.name)] = package.version
        for required in map(Requirement, package.requires or []):
            extras = ("", *requirement.extras)
            if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(required)
    return found


def test_what_make_setup_installs_is_pinned():
    locked = pins()
    found = installed(setup_requirements())
    assert {"onnxruntime", "torch", "ray", "mpmath"} <= found.keys(), "named by extras, and required by those"
    assert {name: locked.get(name) for name in found} == found


def test_each_requirement_of_the_project_lets_its_pin_in():
    for requirement in setup_requirements():
        version = pins()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"
