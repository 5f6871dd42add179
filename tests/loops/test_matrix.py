"""The tables of the page on training loops say what the tests of this folder show, row by row."""

import re

import pytest

from tests.docs.pages import DOCS
from tests.loops import (
    test_huggingface_trainer,
    test_lightning_trainer,
    test_losses,
    test_models,
    test_passes,
)

PAGE = (DOCS / "training-loops.md").read_text(encoding="utf-8")

TABLES = {
    "the model, or the call": (test_passes.FOUND, test_passes.REFUSED),
    "setting of the Trainer": (test_huggingface_trainer.SETTINGS, {}),
    "model in the Trainer": (test_huggingface_trainer.MODELS, {}),
    "kind of Lightning module or option": (test_lightning_trainer.KINDS, {}),
    "scheduler": (test_lightning_trainer.SCHEDULERS, {}),
    "loss": (test_losses.LOSSES, test_losses.REFUSED),
    "model": (test_models.MODELS, {}),
}


def rows(title):
    """First and second cells of the table whose first column has this title."""
    table = re.search(
        rf"^\| {re.escape(title)} \| result \|\n\|[-|]+\|\n((?:\|.*\n?)+)", PAGE, re.M
    )
    assert table is not None
    lines = table[1].strip().splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|"))[:2] for line in lines]


@pytest.mark.parametrize("title", TABLES)
def test_every_row_of_the_table_is_a_test_and_every_test_a_row(title):
    works, refused = TABLES[title]
    found = rows(title)
    assert sorted(name for name, result in found if result.startswith("works")) == sorted(works)
    assert sorted(name for name, result in found if result.startswith("refused")) == sorted(refused)
