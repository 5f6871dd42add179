"""Docstrings in Google style can be read by the tool that makes the reference."""

from __future__ import annotations

import ast
import re

from tests.docs.pages import ROOT

_SECTION = re.compile(r"^Args:\n((?: {4}.*\n?|\n)+)", re.M)
_ENTRY = re.compile(r"^ {4}(\S.*?):(?: |$)", re.M)


def described(docstring: str) -> list[str]:
    """Names of the entries in a docstring's list of arguments."""
    section = _SECTION.search(docstring)
    return [] if section is None else _ENTRY.findall(section[1])


def parameters(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Names that a function takes, or a class when it is made (fields, of a dataclass)."""
    if isinstance(node, ast.ClassDef):
        makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        fields = {
            n.target.id
            for n in node.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        }
        return parameters(makers[0]) if makers else fields
    given = node.args
    gathered = [a for a in (given.vararg, given.kwarg) if a is not None]
    return {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, *gathered)}


def test_every_described_argument_is_one_that_is_taken() -> None:
    unknown = [
        f"{file.relative_to(ROOT)}, line {node.lineno}: {name}"
        for file in sorted((ROOT / "thermo_opt").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        for name in described(ast.get_docstring(node) or "")
        if name.lstrip("*") not in parameters(node)
    ]
    assert unknown == []
