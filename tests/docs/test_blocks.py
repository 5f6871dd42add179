"""Every code block of the documentation runs, page by page, in order, in a folder of its own.

A block with a title is written to that file; Python blocks of a page share their names; lines of
``console`` blocks that begin with ``$ thermo-opt`` or ``$ python script.py`` are executed. The runs
of ``data/`` are at hand.
"""

from __future__ import annotations

import glob
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import PAGES, ROOT, Block, blocks, label
from thermo_opt.cli import main

READ_ONLY = {"text", "json", "toml", "yaml"}
"""Languages of blocks that show something and have nothing to run."""
SHOWN = ("git", "mkdocs", "pip", "pre-commit", "pytest", "python", "python3", "uv")
"""Programs whose calls are shown and not run here (of Python, only scripts are run)."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run a page's blocks in, with the checkout's ``data`` and ``examples``."""
    for name in ("data", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=label)
def test_every_block_of_a_page_runs(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = set(sys.modules)
    names: dict[str, Any] = {"__name__": "__main__"}
    try:
        for block in blocks(page):
            if shown := re.match(r"--8<--\n(examples/.*)\n", block.code):
                assert (ROOT / shown[1]).is_file()  # test_examples runs it
            elif block.title is not None:
                target = folder / block.title
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.code, encoding="utf-8")
            elif block.language == "python":
                exec(compile(block.code, f"{label(page)}, line {block.line}", "exec"), names)
            elif block.language == "console":
                _run_console(block, page, capsys)
            else:
                assert block.language in READ_ONLY, (
                    f"{label(page)}, line {block.line}: {block.language}"
                )
    finally:
        for name in set(sys.modules) - loaded:  # modules that the page's own files defined
            if getattr(sys.modules[name], "__file__", None) and Path(
                str(sys.modules[name].__file__)
            ).is_relative_to(folder):
                del sys.modules[name]


def _run_console(block: Block, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    assert commands, f"{label(page)}, line {block.line}: a console block without a command"
    for command in commands:
        program, *words = shlex.split(command, comments=True)
        arguments = [name for word in words for name in (sorted(glob.glob(word)) or [word])]
        if program == "thermo-opt":
            capsys.readouterr()
            status = main(arguments)
            assert status == 0, (
                f"{label(page)}, line {block.line}: {command}\n{capsys.readouterr().err}"
            )
        elif program == "python" and arguments[0].endswith(".py"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", arguments)
                runpy.run_path(arguments[0], run_name="__main__")
        else:
            assert program in SHOWN, f"{label(page)}, line {block.line}: {command}"
