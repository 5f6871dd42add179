"""``thermo-opt audit`` and ``thermo-opt compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thermo_opt.cli.options import (
    BatchSize,
    Clock,
    Cluster,
    Format,
    Html,
    Jobs,
    Json,
    Key,
    Kind,
    Label,
    LeftOut,
    Lens,
    Likelihood,
    Model,
    Probe,
    RunPath,
    RunPaths,
    Sigma2,
    Steps,
    Stride,
    told_apart,
    with_settings,
)
from thermo_opt.cli.pages import check_page
from thermo_opt.cluster import existing, on_cluster
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
    cluster: Cluster = None,
    likelihood: Likelihood = None,
    sigma2: Sigma2 = None,
    kind: Kind = None,
) -> None:
    """Audit a recorded run: what its path dissipated, how much was unavoidable, where the rest
    went."""
    check_page(html, "--html")
    jobs = jobs if cluster is None else -1
    options = _options(
        lens, clock, stride, model, probe, batch_size, steps, jobs, likelihood, sigma2, kind
    )
    paths = _shared([run], options, cluster)
    with on_cluster(cluster, existing([*paths, options["probe"]])):
        audits, _ = _audits(paths, {"format": format, "key": key}, options)
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
    cluster: Cluster = None,
    likelihood: Likelihood = None,
    sigma2: Sigma2 = None,
    kind: Kind = None,
    label: Label = None,
) -> None:
    """Audit several runs and compare them at the snapshots that all have, the most efficient
    first. A run that can't be read is left out with a sentence."""
    check_page(html, "--html")
    jobs = jobs if cluster is None else -1
    options = _options(
        lens, clock, stride, model, probe, batch_size, steps, jobs, likelihood, sigma2, kind
    )
    paths = _shared(runs, options, cluster)
    with on_cluster(cluster, existing([*paths, options["probe"]])):
        audits, left_out = _audits(paths, {"format": format, "key": key}, options)
    names = [with_settings(a.run, a.settings, label or []) for a in audits]
    distinct = told_apart(names, [a.path for a in audits])
    named = [a.named(name) for a, name in zip(audits, distinct, strict=True)]
    print_compared(named, json, html, left_out)


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


def _shared(paths: Sequence[Path], options: dict[str, Any], cluster: str | None) -> Sequence[Path]:
    """The runs' paths as a cluster's workers find them, who stand in other folders; the probe's
    too, in the options."""
    from thermo_opt.runs.remote import absolute

    if cluster is None:
        return paths
    if options["probe"] is not None:
        options["probe"] = absolute(options["probe"])
    return [absolute(path) for path in paths]


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


def _audits(
    paths: Sequence[Path], reading: dict[str, Any], options: dict[str, Any]
) -> tuple[list[Audit], list[LeftOut]]:
    """The runs' audits, and (run, reason) of those among several that can't be audited."""
    from thermo_opt.audits import audit
    from thermo_opt.cli.terminal import Bars
    from thermo_opt.runs import load_run

    audits: list[Audit] = []
    left_out: list[LeftOut] = []
    with Bars() as bars:
        for path in paths:
            try:
                run = load_run(path, **reading)
                bars.named(run.name)
                audits.append(audit(run, progress=bars, **options))
            except InputError as error:
                if len(paths) == 1:
                    raise
                left_out.append((str(path), str(error)))
    if left_out and len(audits) < 2:  # what is left is nothing to compare
        raise InputError(left_out[0][1])
    return audits, left_out


def print_compared(
    audits: list[Audit], json: bool, html: Path | None, left_out: Sequence[LeftOut] = ()
) -> None:
    """Print several audits at their common snapshots, say which runs were left out, and write the
    page if one is wanted."""
    from thermo_opt.audits import comparison
    from thermo_opt.cli import terminal

    compared = comparison.comparison(audits)
    terminal.warn_left_out(left_out)
    if not json:
        terminal.print_comparison(compared.audits, compared.table)
    _finish(compared.audits, json, html, left_out, compared.notes)


def _finish(
    audits: list[Audit],
    json: bool,
    html: Path | None,
    left_out: Sequence[LeftOut] = (),
    notes: Sequence[str] = (),
) -> None:
    from thermo_opt.cli import terminal
    from thermo_opt.lenses import summaries_json

    if html is not None:
        from thermo_opt.report import write_report

        written = write_report(audits, html, left_out, notes)
        if not json:
            terminal.say(f"\nReport: {written.resolve()}")
    if json:
        terminal.print_json(summaries_json(audits, left_out, notes))
