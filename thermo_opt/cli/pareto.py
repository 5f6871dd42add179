"""``thermo-opt pareto``: the speed-cost front of recorded runs, in the terminal, as JSON or as a
page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thermo_opt.cli.drift import show_drift
from thermo_opt.cli.options import (
    Cluster,
    Key,
    Label,
    LeftOut,
    Likelihood,
    Sigma2,
    setting,
    told_apart,
    with_settings,
)
from thermo_opt.cli.pages import check_page
from thermo_opt.cluster import existing, on_cluster
from thermo_opt.errors import InputError

if TYPE_CHECKING:
    from thermo_opt.fronts import ParetoFront, Target, Trajectory

_SHOWN = 24
"""Rows a table in the terminal has at most; the front is always shown whole."""


def pareto(
    runs: Annotated[list[Path], typer.Argument(help="Recorded runs.", show_default=False)],
    target_loss: Annotated[
        list[float] | None,
        typer.Option(
            help=(
                "Loss to reach, nats; may be repeated. Default: the lowest that half "
                "of the runs reach."
            )
        ),
    ] = None,
    x: Annotated[
        str, typer.Option(help="What time is: steps, seconds, examples, tokens or flow.")
    ] = "steps",
    html: Annotated[
        Path | None, typer.Option(help="Also write a page, one file that opens offline.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="Architecture, as package.module:factory, to replay weights with."),
    ] = None,
    probe: Annotated[Path | None, typer.Option(help="Inputs and targets to replay on.")] = None,
    format: Annotated[
        str | None, typer.Option(help="Layout of the runs, where their files don't tell.")
    ] = None,
    key: Key = None,
    likelihood: Likelihood = None,
    sigma2: Sigma2 = None,
    group_by: Annotated[
        list[str] | None,
        typer.Option(
            help="Recorded setting to group runs by, as lr or optimizer; may be repeated. "
            "Default: optimizer.",
            metavar="SETTING",
        ),
    ] = None,
    label: Label = None,
    drift: Annotated[
        bool,
        typer.Option(
            "--drift", help="Rank by drift, with the noise beside it; needs runs with replicas."
        ),
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes; more than one pays for large probes.")] = 1,
    cluster: Cluster = None,
) -> None:
    """Draw what runs took, in time and dissipation, to reach a loss, beside the frontier that none
    can cross. A run that can't be read is left out with a sentence."""
    from thermo_opt.cli import terminal
    from thermo_opt.fronts import CLOCK_OF, like_most, seen_in_time, sharing_snapshots
    from thermo_opt.fronts import pareto as speed_cost_front

    check_page(html, "--html")
    if x not in CLOCK_OF:
        raise InputError(f"--x {x}: use one of {', '.join(CLOCK_OF)}")
    if jobs == 0:
        raise InputError("--jobs 0: give at least one process, or -1 for all cores")
    replay = {"model": model, "probe": probe} if model is not None or probe is not None else None
    reading = {"format": format, "key": key, "likelihood": likelihood, "sigma2": sigma2}
    if drift:
        if cluster is not None or jobs != 1:
            raise InputError("--drift audits in this process: leave out --jobs and --cluster")
        show_drift(runs, x, target_loss, reading, replay, group_by or [], label or [], html, json)
        return
    jobs = jobs if cluster is None else -1
    places = list(runs)
    if cluster is not None:  # its workers stand in other folders
        from thermo_opt.runs.remote import absolute

        places = [absolute(run) for run in runs]
        if replay is not None and probe is not None:
            replay["probe"] = probe = absolute(probe)
    with on_cluster(cluster, existing([*places, probe])), terminal.Bars() as bars:
        tracks, left_out = read_trajectories(
            places, CLOCK_OF[x], reading, replay, jobs, bars("reading runs", len(runs))
        )
    tracks, unlike = like_most(tracks)
    for target in target_loss or ():
        tracks, late = seen_in_time(tracks, target)
        unlike += late
    tracks, apart = sharing_snapshots(tracks)
    left_out += [(str(track.path), reason) for track, reason in [*unlike, *apart]]
    given = dict(zip(map(str, places), map(str, runs), strict=True))
    tracks = [replace(t, path=given.get(str(t.path), t.path)) for t in tracks]
    left_out = [(given[name], reason) for name, reason in left_out]
    groups = None
    if group_by:
        groups = [
            ", ".join(f"{key} {setting(track.run, track.settings, key)}" for key in group_by)
            for track in tracks
        ]
    names = [with_settings(t.run, t.settings, label or []) for t in tracks]
    distinct = told_apart(names, [t.path for t in tracks])
    named = [replace(t, run=name) for t, name in zip(tracks, distinct, strict=True)]
    front = speed_cost_front(named, target_loss=target_loss, x=x, groups=groups)
    terminal.warn_left_out(left_out)
    if html is not None:
        front.to_html(html, left_out)
    if json:
        terminal.print_json(front.to_json(left_out=left_out))
        return
    print_front(front)
    if html is not None:
        terminal.say(f"\nPage: {html.resolve()}")


def read_trajectories(
    paths: Sequence[Path],
    clock: str,
    reading: Mapping[str, Any] = MappingProxyType({}),
    replay: dict[str, Any] | None = None,
    jobs: int = 1,
    advance: Callable[[int], None] | None = None,
) -> tuple[list[Trajectory], list[LeftOut]]:
    """The runs' lines in the speed-cost plane, in the order given, and (run, reason) of those among
    several that have none; InputError where none of them has."""
    from joblib import delayed

    from thermo_opt.workers import in_processes

    tracks, left_out = [], []
    work = (delayed(_read)(path, clock, dict(reading), replay) for path in paths)
    for path, found in zip(paths, in_processes(work, jobs), strict=True):
        if isinstance(found, str):
            left_out.append((str(path), found))
        else:
            tracks.append(found)
        if advance is not None:
            advance(1)
    if not tracks:
        raise InputError(left_out[0][1])
    return tracks, left_out


def _read(
    path: Path, clock: str, reading: dict[str, Any], replay: dict[str, Any] | None
) -> Trajectory | str:
    """A run's line, or why it has none."""
    from thermo_opt.fronts import read_trajectory, trajectory_of
    from thermo_opt.runs import load_run

    try:
        run = load_run(path, **reading)
        if replay is None:
            return read_trajectory(run, clock)
        from thermo_opt.audits import audit

        return trajectory_of(audit(run, lens="outputs", clock=clock, **replay))
    except InputError as error:
        return str(error)


def print_front(front: ParetoFront) -> None:
    """One table a target, the fastest first, stars on the front; then the front in words."""
    from rich.console import Console

    from thermo_opt.cli.terminal import plain
    from thermo_opt.report.front import sentences

    console = Console(highlight=False)
    for target in front.targets:
        _print_target(console, front, target)
    for sentence in sentences(front):
        console.print(plain(sentence))


def _print_target(console: Any, front: ParetoFront, target: Target) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from thermo_opt.cli.terminal import plain
    from thermo_opt.describe.quantities import DURATION_UNITS, cost_unit, number
    from thermo_opt.report.front import costs

    rows = front.rows(target.target_loss).sort_values("time", kind="stable", na_position="last")
    others = rows[~rows["on_front"]].index
    shown = rows.drop(others[max(0, _SHOWN - int(rows["on_front"].sum())) :])
    console.print(plain(f"To reach loss {number(target.target_loss)}", style="bold"))
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="dim"
    )
    table.add_column("run", overflow="fold", min_width=16)
    table.add_column("group", overflow="fold")
    for name in (
        f"T, {DURATION_UNITS[front.counted_in]}",
        f"Q, {cost_unit(front.counted_in)}",
        "D*",
        "effic.",
        "",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in shown.to_dict("records"):
        star = "★" if row["on_front"] else ""
        table.add_row(plain(row["run"]), plain(row["group"]), *costs(row), star)
    console.print(table)
    if len(shown) < len(rows):
        console.print(
            plain(
                f"and {len(rows) - len(shown)} more runs (--html or --json has them all)",
                style="dim",
            )
        )
    console.print()
