"""``thermo-opt audit`` and ``thermo-opt compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thermo_opt.cli.options import (
    BatchSize,
    Clock,
    Format,
    Html,
    Jobs,
    Json,
    Key,
    Kind,
    Lens,
    Likelihood,
    Model,
    Probe,
    RunPath,
    RunPaths,
    Sigma2,
    Steps,
    Stride,
)
from thermo_opt.cli.pages import check_page
from thermo_opt.errors import InputError

if TYPE_CHECKING:
    from thermo_opt.audits import Audit


def audit(
    run: RunPath,
    json: Json = False,
    html: Html = None,
    lens: Lens = None,
    clock: Clock = None,
    stride: Stride = 1,
    model: Model = None,
    probe: Probe = None,
    format: Format = None,
    key: Key = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    jobs: Jobs = 1,
    likelihood: Likelihood = None,
    sigma2: Sigma2 = None,
    kind: Kind = None,
) -> None:
    """Audit a recorded run: what its path dissipated, how much was unavoidable, where the rest
    went."""
    check_page(html, "--html")
    audits = _audits(
        [run],
        {"format": format, "key": key},
        _options(
            lens, clock, stride, model, probe, batch_size, steps, jobs, likelihood, sigma2, kind
        ),
    )
    from thermo_opt.cli import terminal

    if not json:
        terminal.print_audit(audits[0])
    _finish(audits, json, html)


def compare(
    runs: RunPaths,
    json: Json = False,
    html: Html = None,
    lens: Lens = None,
    clock: Clock = None,
    stride: Stride = 1,
    model: Model = None,
    probe: Probe = None,
    format: Format = None,
    key: Key = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    jobs: Jobs = 1,
    likelihood: Likelihood = None,
    sigma2: Sigma2 = None,
    kind: Kind = None,
) -> None:
    """Audit several runs and compare them, the most efficient first."""
    check_page(html, "--html")
    audits = _audits(
        runs,
        {"format": format, "key": key},
        _options(
            lens, clock, stride, model, probe, batch_size, steps, jobs, likelihood, sigma2, kind
        ),
    )
    print_compared(audits, json, html)


def _options(
    lens: list[str] | None,
    clock: str | None,
    stride: int,
    model: str | None,
    probe: Path | None,
    batch_size: int | None,
    steps: str | None,
    jobs: int,
    likelihood: str | None = None,
    sigma2: float | None = None,
    kind: str | None = None,
) -> dict[str, Any]:
    return {
        "lens": lens or None,
        "clock": clock,
        "stride": stride,
        "model": model,
        "probe": probe,
        "batch_size": batch_size,
        "steps": None if steps is None else _slice(steps),
        "jobs": jobs,
        "likelihood": likelihood,
        "sigma2": sigma2,
        "kind": kind,
    }


def _slice(text: str) -> slice:
    try:
        parts = [int(part) if part else None for part in text.split(":")]
    except ValueError:
        parts = []
    if not 2 <= len(parts) <= 3 or parts[2:] == [0]:
        raise InputError(
            f"--steps {text}: write A:B or A:B:C, whole numbers as in a Python slice, for example "
            "0:100:10."
        )
    return slice(*parts)


def _audits(paths: Sequence[Path], reading: dict[str, Any], options: dict[str, Any]) -> list[Audit]:
    from thermo_opt.audits import audit
    from thermo_opt.cli.terminal import Bars
    from thermo_opt.runs import load_run

    audits = []
    runs = [load_run(path, **reading) for path in paths]
    with Bars() as bars:
        for run in runs:
            bars.named(run.name)
            audits.append(audit(run, progress=bars, **options))
    return audits


def print_compared(audits: list[Audit], json: bool, html: Path | None) -> None:
    """Print several audits in one table, or their JSON, and write their report page."""
    from thermo_opt.audits import compare
    from thermo_opt.cli import terminal

    table = compare(audits)
    order = {run: position for position, run in reversed(list(enumerate(table["run"])))}
    audits = sorted(audits, key=lambda audit: order[audit.run])
    if not json:
        terminal.print_comparison(audits, table)
    _finish(audits, json, html)


def _finish(audits: list[Audit], json: bool, html: Path | None) -> None:
    from thermo_opt.cli import terminal
    from thermo_opt.lenses import summaries_json

    if html is not None:
        from thermo_opt.report import write_report

        written = write_report(audits, html)
        if not json:
            terminal.say(f"\nReport: {written.resolve()}")
    if json:
        terminal.print_json(summaries_json(audits))
