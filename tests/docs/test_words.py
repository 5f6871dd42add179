"""The docs use the words of the code: names of quantities, keys of JSON, commands, messages."""

from __future__ import annotations

import ast
import re
from html import unescape

import pytest
import typer

import thermo_opt as to
from docs._hooks import on_page_markdown
from tests.docs.pages import DOCS, ROOT
from thermo_opt.cli.app import application
from thermo_opt.cli.terminal import print_audit
from thermo_opt.describe.counterfactual import COUNTERFACTUAL
from thermo_opt.describe.quantities import QUANTITIES
from thermo_opt.describe.split import SPLIT
from thermo_opt.describe.standing import STANDING
from thermo_opt.lenses import SUMMARY_KEYS
from thermo_opt.report.page import render

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


SIDES = {
    "exact": {"exact"},
    "**lower bound": {"at least"},
    "**upper bound": {"at most"},
    "**bracket**": {"at least", "at most"},
    "estimate": {"estimate"},
    "no known side": {"estimate"},
    "unknown": {"unknown"},
    "not told": {"unknown"},
}
"""How a cell of the tables of "Exact, bound, estimate, unknown" begins → what it claims."""
ROWS = {
    "Q": "dissipation",
    "ℒ": "length",
    "D": "distance",
    "D*": "least_distance",
    "duration T": "duration",
    "irreducible D²/2T": "irreducible",
    "loss at start and end": "loss_start",
    "downhill": "downhill_lower",
    "uphill": "uphill_upper",
    "alignment": "alignment_lower",
    "alignment without the examples that hold χ²": "alignment_lower_rest",
    "displacement’s alignment": "displacement_alignment",
}
"""Names in those tables that aren't keys."""


@pytest.mark.parametrize("lens", ["outputs", "parameters"])
def test_the_table_of_what_is_exact_says_what_the_code_does(lens: str) -> None:
    text = (DOCS / "numbers.md").read_text(encoding="utf-8")
    _, _, table = text.partition(f"### {lens.capitalize()} lens\n")
    told = set()
    for row in re.findall(r"^\| (.*) \|$", table.partition("\n### ")[0], re.M)[1:]:
        names, *cells = row.split(" | ")
        for name in names.split(", "):
            key = ROWS.get(name, name)
            for cell, side in zip(cells[:2], STANDING[lens].get(key, ()), strict=False):
                claimed = next(sides for words, sides in SIDES.items() if cell.startswith(words))
                assert side in claimed, (name, cell, side)
                told.add(key)
    others = {"alignment", "alignment_upper", "downhill_upper", "uphill_lower", "loss_end"}
    if lens == "parameters":
        others |= {"alignment_lower_rest"}  # of the outputs lens only
    assert told == set(STANDING[lens]) - others


def test_every_key_of_json_is_listed() -> None:
    assert [key for key in SUMMARY_KEYS if f"`{key}`" not in page("format.md")] == []


NAMED = {
    **{q.key: q for q in QUANTITIES},
    **{f"split-{q.key}": q for q in SPLIT},
    **{f"counterfactual-{q.key}": q for q in COUNTERFACTUAL},
}


def test_no_two_quantities_share_a_name() -> None:
    names = [q.name for q in NAMED.values()]
    assert sorted(names) == sorted(set(names))


def test_terminal_page_docs_and_json_use_the_same_words(capsys, monkeypatch) -> None:
    """Row by row of an audit through every lens: its name, and what is printed beside it."""
    monkeypatch.setenv("COLUMNS", "160")
    audit = to.audit(
        ROOT / "data" / "digits-adam", model="thermo_opt.demo_models:digits_mlp", steps=slice(3)
    )
    print_audit(audit)
    printed = capsys.readouterr().out.split("What the lenses could not see")[0].splitlines()
    table = on_page_markdown("{{ quantities }}").splitlines()
    row = r'<tr><th scope="row">(.*?)(?: <span>.*?</span>)?</th>(.*?)</tr>'
    rows = re.findall(row, render([audit]), re.S)
    assert len(rows) > 20
    for name, cells in rows:
        name = unescape(name)
        (key,) = set(re.findall(r'data-key="(.*?)"', cells))
        assert NAMED[key].name == name
        (line,) = [p for p in printed if re.match(re.escape(name) + r"\s\s|" + name + "$", p)]
        for text in re.findall(r">([^<>]*?)</td>", cells):
            assert unescape(text) in line, (name, text, line)
        (entry,) = [t for t in table if t.startswith(f"| {name} |")]
        assert f"`{key.replace('-', '.')}`" in entry
        *entries, last = key.split("-")
        summary = audit.summaries[0]
        for part in entries:
            summary = summary[part]
        assert last in summary


def test_every_command_has_its_section() -> None:
    commands = typer.main.get_command(application()).commands
    listed = re.findall(r"\{\{ options of (\w+) \}\}", page("command-line.md"))
    assert sorted(commands) == sorted(listed)
