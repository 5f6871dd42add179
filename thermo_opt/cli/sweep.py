"""``thermo-opt sweep``: train what a configuration says, and print the speed-cost front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from thermo_opt.cli.options import Cluster
from thermo_opt.cluster import existing, on_cluster
from thermo_opt.errors import InputError


def sweep(
    config: Annotated[
        Path, typer.Argument(help="Configuration of the sweep (TOML).", show_default=False)
    ],
    jobs: Annotated[int, typer.Option(help="Runs trained at a time; -1: one a core.")] = 1,
    cluster: Cluster = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
) -> None:
    """Train a model over optimizers, settings and seeds, recording each run; resumes where it was
    interrupted."""
    from thermo_opt.cli import terminal
    from thermo_opt.cli.pareto import print_front
    from thermo_opt.sweep import read_config, run_sweep
    from thermo_opt.sweep.sweep import PAGE

    if jobs == 0:
        raise InputError("--jobs 0: give at least one process, or -1 for all cores")
    settings = read_config(config)
    jobs = jobs if cluster is None else -1
    if cluster is not None:  # its workers stand in other folders
        settings = replace(settings, output=settings.output.absolute())
    with (
        on_cluster(cluster, existing([settings.output, *settings.output.parents])[:1]),
        terminal.Bars() as bars,
    ):
        outcome = run_sweep(settings, jobs=jobs, progress=bars)
    if json:
        terminal.print_json(outcome.front.to_json())
        return
    print_front(outcome.front)
    for name, reason in outcome.left_out.items():
        terminal.say(f"Left out: {name} ({reason})")
    terminal.say(
        f"\n{outcome.trained} runs trained now. Runs, table and page: "
        f"{(settings.output / PAGE).resolve()}"
    )
