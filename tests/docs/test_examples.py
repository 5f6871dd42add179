"""The scripts in ``examples/`` run, each in a folder of its own."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from tests.docs.pages import ROOT
from thermo_opt.cli import main

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")


def test_the_sweep_of_ones_own_task_draws_its_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("own_task.py", "sweep_own_task.toml"):
        shutil.copy(ROOT / "examples" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "sweep_own_task.toml"]) == 0
    assert len(list((tmp_path / "sweep-own-task").glob("*/run.json"))) == 4


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [script.name for script in SCRIPTS if f"`{script.name}`" not in listed] == []
