"""Build hook: the wheel ships a part of ``data/``, enough for ``thermo-opt demo``; the rest stays
in the repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SNAPSHOTS, CHECKPOINTS = 5, 3
"""Every fifth snapshot of our own runs, every third checkpoint of the Trainer's; the last always.
"""


def shipped(data: Path) -> list[Path]:
    """The files of ``data`` that go into the wheel."""
    left_out: set[Path] = set()
    for run in (folder for folder in data.iterdir() if folder.is_dir()):
        own = sorted((run / "snapshots").glob("*.safetensors"))
        left_out |= {file for i, file in enumerate(own[:-1]) if i % SNAPSHOTS}
        steps = sorted(run.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
        left_out |= {folder for i, folder in enumerate(steps[:-1]) if i % CHECKPOINTS}
    return [
        file
        for file in sorted(data.rglob("*"))
        if file.is_file()
        and not left_out & {file, *file.parents}
        and file.name not in ("make_runs.py", "wheel.py", "SHA256SUMS")
    ]


class DemoData(BuildHookInterface[Any]):
    """Puts `shipped` files under ``thermo_opt/demo_data``."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatch before it collects the wheel's files."""
        if version != "standard":  # an editable install has data/ beside it
            return
        data = Path(self.root) / "data"
        for file in shipped(data):
            target = Path("thermo_opt/demo_data") / file.relative_to(data)
            build_data["force_include"][str(file)] = target.as_posix()
