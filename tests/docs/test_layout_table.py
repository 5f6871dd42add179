"""The table of layouts names, for each row, a test that exists."""

import ast
import re
from pathlib import Path

import pytest

from thermo_opt.runs.readers import FORMATS

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "audit.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.split("## Layouts")[1].split("\n## ")[0].splitlines()
    if line.startswith("| ") and not line.startswith("| written by")
]


def source(file, name):
    for node in ast.walk(ast.parse((TESTS / file).read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return ast.unparse(node)
    raise AssertionError(f"{file} has no test {name}")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_has_its_test(row):
    written, recognised, lenses, test = row
    assert written
    assert recognised
    assert lenses
    file, name = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", test).groups()
    # a tool that isn't installed with the tests is marked
    assert ("importorskip" in source(file, name)) == ("°" in written), written


def test_every_layout_has_a_row():
    """By the name of the format that it is read as."""
    tests = "".join(row[3] for row in ROWS)
    words = {"thermo-opt": "recorder", "safetensors": "safetensors_folder"}
    words |= {"folders": "one_folder_per_checkpoint"}
    assert all(words.get(name, name) in tests for name in FORMATS)
