"""Sections of the theory page that code cites exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT

SECTIONS = {
    int(n)
    for n in re.findall(
        r"^## (\d+)\. .*\{ #s\1 \}$", (DOCS / "theory.md").read_text(encoding="utf-8"), re.M
    )
}
_CITED = re.compile(r"§§? ?(\d+)(?: ?[-–] ?§?(\d+))?")


def cited(text: str) -> set[int]:
    """Numbers of the sections a text cites; the ranges §2-5 and §3–4 whole."""
    found: set[int] = set()
    for first, last in _CITED.findall(text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def sources() -> list[Path]:
    """Every text of the project that may cite a section."""
    folders = ("thermo_opt", "analysis", "tests", "notebooks", "docs", "examples", "data")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*"))]
    return [
        file
        for file in files
        if file.suffix in (".py", ".md", ".ipynb", ".j2", ".toml") and file.is_file()
    ]


def test_the_theory_page_numbers_its_sections_without_a_gap() -> None:
    assert set(range(1, 15)) == SECTIONS


def test_a_citation_is_read_with_its_range() -> None:
    assert cited("(theory §2, §4-5; §7–8)") == {2, 4, 5, 7, 8}


@pytest.mark.parametrize(
    "folder", ["thermo_opt", "analysis", "tests", "notebooks", "docs", "examples", "data"]
)
def test_every_section_cited_in_a_folder_exists(folder: str) -> None:
    for file in sources():
        if file.relative_to(ROOT).parts[0] == folder:
            assert cited(file.read_text(encoding="utf-8")) <= SECTIONS, file


def test_nothing_cites_a_document_outside_the_project() -> None:
    # the name of the page before it came here; written so that this file doesn't match itself
    outside = "THEORY" + ".md"
    assert [str(file) for file in sources() if outside in file.read_text(encoding="utf-8")] == []
