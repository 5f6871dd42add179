"""Report pages that a command is about to write: refused before any work where they can't be."""

from __future__ import annotations

import os
from pathlib import Path

from thermo_opt.errors import InputError


def check_page(path: Path | None, option: str) -> None:
    """Refuse, before any work, a report page that can't be written or would replace a file of
    somebody's own."""
    if path is None:
        return
    if path.exists() and not is_report(path):
        raise InputError(
            f"{path} exists and is no thermo-opt report: name another file with {option}."
        )
    if not path.parent.is_dir():
        raise InputError(
            f"{path} can't be written, as its folder doesn't exist: make it, or name another file."
        )
    if not os.access(path.parent, os.W_OK):
        raise InputError(
            f"{path} can't be written, as its folder is read-only: name another with {option}."
        )


def is_report(path: Path) -> bool:
    """Whether a file is a page of ours, which may be replaced."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'name="generator" content="thermo-opt' in file.read(4096)
