"""Run a sweep's trials that aren't recorded yet, in parallel, and draw the front of all of them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from thermo_opt.errors import InputError
from thermo_opt.fronts.front import CLOCK_OF, ParetoFront, pareto
from thermo_opt.fronts.trajectory import read_trajectory
from thermo_opt.runs import load_run
from thermo_opt.sweep.config import Sweep, Trial
from thermo_opt.sweep.records import UNFINISHED, exclusive, finished
from thermo_opt.sweep.training import check, train
from thermo_opt.workers import in_processes
from thermo_opt.writing import write_whole

TABLE, PAGE, FIGURE = "table.csv", "pareto.html", "pareto.png"
"""What a sweep leaves beside its runs."""
_RENAMED = {"frontier": "least_distance"}
"""Columns of `TABLE` as they were called before, and are."""


@dataclass(frozen=True)
class Outcome:
    """A finished sweep: its front, how many runs it trained this time, and the runs without a path,
    with the reason."""

    front: ParetoFront
    trained: int
    left_out: dict[str, str]


def run_sweep(
    sweep: Sweep,
    *,
    jobs: int = 1,
    progress: Callable[[str, int], Callable[[int], None]] | None = None,
) -> Outcome:
    """Train what isn't recorded yet, then write table, page and figure of the speed-cost front.

    Every run is checked before the first is trained: its settings, one step of each method, one
    probe for all seeds. A killed sweep, called again, repeats no finished run, and ends as if it
    had not been killed. A second sweep on the same output waits until the first has ended.

    Args:
        sweep: the configuration, see `read_config`.
        jobs: runs trained at a time (through joblib, in processes); -1: one per core.
        progress: ``progress(description, total)`` starts a bar and returns ``advance(n)``.

    Raises:
        InputError: the configuration can't mean anything, a finished run was damaged, or a run
            couldn't be trained to its end.
    """
    trials = sweep.trials()
    waiting = [trial for trial in trials if not finished(trial, sweep.output)]
    _check(sweep, waiting)
    with exclusive(sweep.output):
        waiting = [trial for trial in trials if not finished(trial, sweep.output)]
        unfinished = sweep.output / UNFINISHED
        shutil.rmtree(unfinished, ignore_errors=True)  # what a killed sweep left
        advance = None if progress is None else progress("training", len(trials))
        if advance is not None:
            advance(len(trials) - len(waiting))
        _train(waiting, sweep.output, jobs, advance)
        shutil.rmtree(unfinished, ignore_errors=True)
        front, left_out = _draw(sweep, trials)
    return Outcome(front, len(waiting), left_out)


def read_table(path: Path) -> pd.DataFrame:
    """The table that a sweep left, with today's names of columns whenever it was written."""
    try:
        table = pd.read_csv(path / TABLE if path.is_dir() else path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as a sweep's table: {error}") from None
    return table.rename(columns=_RENAMED)


def _check(sweep: Sweep, waiting: list[Trial]) -> None:
    probes: dict[int, str] = {}
    stepped: set[str] = set()
    for trial in waiting:
        if trial.seed != waiting[0].seed and trial.seed in probes:
            continue  # the settings were checked with the first seed
        probes[trial.seed] = check(trial, step=trial.method not in stepped)
        stepped.add(trial.method)
    if len(set(probes.values())) > 1:
        raise InputError(
            f"[task] {sweep.task}: its probe changes with the seed: make it the same for every seed"
        )


def _train(
    waiting: list[Trial], output: Path, jobs: int, advance: Callable[[int], None] | None
) -> None:
    from joblib import delayed

    work = (delayed(train)(trial, output) for trial in waiting)
    try:
        for _ in in_processes(work, jobs, ordered=False):
            if advance is not None:
                advance(1)
    except BrokenExecutor:
        raise InputError(
            f"{output}: a process that trained a run was killed, perhaps for want of memory: run "
            "the sweep again with fewer jobs at a time; finished runs are kept"
        ) from None


def _draw(sweep: Sweep, trials: list[Trial]) -> tuple[ParetoFront, dict[str, str]]:
    tracks, groups, left_out = [], [], {}
    for trial in trials:
        run = load_run(sweep.output / trial.name)
        if len(run.steps) == 0:
            left_out[trial.name] = "its first loss isn't finite"
            continue
        try:
            tracks.append(read_trajectory(run, CLOCK_OF[sweep.x]))
        except InputError as error:
            left_out[trial.name] = str(error)
            continue
        groups.append(trial.method)
    if not tracks:
        name, reason = next(iter(left_out.items()))
        raise InputError(f"no run of the sweep can be drawn; {name}: {reason}")
    front = pareto(tracks, target_loss=sweep.target_loss, x=sweep.x, groups=groups)
    write_whole(sweep.output / TABLE, front.table.drop(columns="path").to_csv(index=False))
    front.to_html(sweep.output / PAGE)
    _save_figure(front, sweep.output / FIGURE)
    return front, left_out


def _save_figure(front: ParetoFront, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8 * len(front.targets), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for position, target in enumerate(front.targets, start=1):
        front.plot(figure.add_subplot(1, len(front.targets), position), target.target_loss)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    write_whole(path, drawn.getvalue())
