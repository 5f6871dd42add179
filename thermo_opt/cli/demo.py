"""The demo: the recorded runs that come with the package, and how each is audited."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from thermo_opt.cli.audit import print_compared
from thermo_opt.cli.options import Jobs, Output
from thermo_opt.cli.pages import check_page
from thermo_opt.errors import InputError

if TYPE_CHECKING:
    from thermo_opt.audits import Audit
    from thermo_opt.cli.terminal import Bars

_DIGITS = "thermo_opt.demo_models:digits_mlp"


def recorded_runs() -> list[Path]:
    """Folders of the recorded runs: package data in an installed wheel, ``data/`` in a checkout.
    InputError if neither is."""
    package = Path(__file__).parent.parent
    for folder in (package / "demo_data", package.parent / "data"):
        found = sorted(
            p for p in folder.glob("*") if (p / "run.json").is_file() or any(p.glob("checkpoint-*"))
        )
        if found:
            return found
    raise InputError(
        f"{package} has no recorded runs beside it: reinstall thermo-opt, or pass runs to "
        "`compare`."
    )


def audit_recorded(bars: Bars, jobs: int = 1) -> list[Audit]:
    """Audit every recorded run (tens of seconds on one core)."""
    import torch

    from thermo_opt.audits import audit
    from thermo_opt.runs import load_run

    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # networks this small lose more to waiting for each other's threads than they gain
    try:
        for path in recorded_runs():
            run = load_run(path)
            bars.named(run.name)
            found.append(audit(run, jobs=jobs, progress=bars, **_options(path)))
    finally:
        torch.set_num_threads(threads)
    return found


def _options(path: Path) -> dict[str, Any]:
    if (path / "run.json").is_file():
        # the parameter lens costs dozens of gradients an interval: every tenth shows the same
        return {"model": _DIGITS, "steps": slice(None, None, 10)}
    return {"probe": path / "probe.safetensors", "lens": ["outputs", "optimizer-state"]}


def demo(output: Output = Path("report.html"), jobs: Jobs = 1) -> None:
    """Audit the recorded runs that come with thermo-opt, compare them, and write a report page."""
    check_page(output, "--output")
    from thermo_opt.cli.terminal import Bars

    with Bars() as bars:
        audits = audit_recorded(bars, jobs)
    print_compared(audits, False, output)
