"""The API reference covers every public name, and facts that are said in several places agree."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import tomllib

import pytest
import yaml

import thermo_opt
from tests.docs.pages import DOCS, ROOT

REFERENCE = {
    page.name: page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md"))
}
DOCUMENTED = {name for text in REFERENCE.values() for name in re.findall(r"^::: (\S+)", text, re.M)}
COMMAND_LINE = "thermo_opt.cli"
"""A program, whose options are its interface."""


def packages() -> list[str]:
    """Every package and module of thermo_opt that says what is public in it."""
    found = [
        info.name
        for info in pkgutil.walk_packages(thermo_opt.__path__, "thermo_opt.")
        if info.ispkg
    ]
    return [
        name
        for name in found
        if name != COMMAND_LINE and hasattr(importlib.import_module(name), "__all__")
    ]


def test_every_public_package_has_its_place_in_the_reference() -> None:
    assert [name for name in packages() if name not in DOCUMENTED] == []


def test_everything_in_the_reference_exists() -> None:
    for name in DOCUMENTED:
        module, _, attribute = name.rpartition(".")
        assert (
            name in packages()
            or importlib.import_module(name)
            or getattr(importlib.import_module(module), attribute)
        )


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isroutine(value):
            assert value.__doc__, f"{name}.{public} has no docstring"


def test_the_names_of_the_face_are_on_the_first_page_of_the_reference() -> None:
    listed = set(re.findall(r"`to\.(\w+)`", REFERENCE["index.md"]))
    assert set(thermo_opt.__all__) <= listed


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["hatch"]["version"]["path"] == "thermo_opt/__init__.py"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == thermo_opt.__version__
