"""The docs use the words of the code: names of quantities, keys of JSON, commands, messages."""

from __future__ import annotations

import ast
import re

import pytest
import typer

from tests.docs.pages import DOCS, ROOT
from thermo_opt.cli.app import application
from thermo_opt.describe.quantities import QUANTITIES
from thermo_opt.lenses import SUMMARY_KEYS

GAP = "…"


def page(name: str) -> str:
    """The text of a page, in one line."""
    return " ".join((DOCS / name).read_text(encoding="utf-8").split())


def messages() -> list[str]:
    """Every text of the package's code, with ``…`` for what an f-string fills in."""
    found = []
    for file in (ROOT / "thermo_opt").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else GAP for v in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize(
    "quote", re.findall(r'^\*\*"(.*?)"\*\*', (DOCS / "faq.md").read_text(), re.M)
)
def test_a_message_explained_on_the_questions_page_is_one_of_ours(quote: str) -> None:
    fragments = [re.escape(part.strip()) for part in quote.split(GAP) if part.strip()]
    pattern = re.compile(".*".join(fragments), re.S)
    assert any(pattern.search(message) for message in messages()), quote


def test_every_quantity_is_explained_by_its_name() -> None:
    text = page("numbers.md").lower()
    assert [q.name for q in QUANTITIES if q.formula and q.name.lower() not in text] == []


def test_every_key_of_json_is_listed() -> None:
    assert [key for key in SUMMARY_KEYS if f"`{key}`" not in page("format.md")] == []


def test_every_command_has_its_section() -> None:
    commands = typer.main.get_command(application()).commands
    listed = re.findall(r"\{\{ options of (\w+) \}\}", page("command-line.md"))
    assert sorted(commands) == sorted(listed)
