"""Figures: a study's loss curves and speed-cost fronts, and the README's two pictures.

readme.png: where four recorded digits runs' dissipation went. readme_front.png: NGD-T swept by its
budget and Adam by its learning rate on digits, two seeds per setting, with the frontier that no run
can cross; its runs are recorded under analysis/runs/readme.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import thermo_opt as to
from analysis.methods import setting
from analysis.timing import RESULTS
from analysis.trials import RUNS, Recorded
from thermo_opt import plots
from thermo_opt.fronts import ParetoFront
from thermo_opt.sweep import Method, Sweep, Training, run_sweep

SWEPT = ("NGD-T", "AdamW")
"""Methods whose settings are joined by a line, where they are run."""
DATA = Path(__file__).parents[1] / "data"
README_SWEEP = Sweep(
    output=RUNS / "readme",
    task="digits",
    likelihood="categorical",
    training=Training(steps=300, batch_size=128, every=1, schedule="cosine"),
    seeds=(0, 1),
    methods=(
        Method(
            "NGD-T, by its budget",
            "NGDT",
            grid={"budget": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]},
        ),
        Method(
            "Adam, by its learning rate",
            "Adam",
            grid={"lr": [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]},
        ),
    ),
    target_loss=(0.5, 0.2),
)


def curves(
    name: str,
    methods: Sequence[str],
    final: Sequence[Recorded],
    targets: Mapping[str, float],
    path: Path,
) -> None:
    """Probe loss against steps, seconds and dissipation, at each method's best setting: mean over
    seeds, and their range against steps."""
    figure = _figure(12.5, 4.2)
    axes = figure.subplots(1, 3, sharey=True)
    for index, method in enumerate(methods):
        own = [run for run in final if run.trial.method == method and run.track is not None]
        if not own:
            continue
        tracks = [run.track for run in own if run.track is not None]
        shortest = min(len(track.loss) for track in tracks)
        loss = np.array([track.loss[:shortest] for track in tracks])
        steps = tracks[0].steps[:shortest]
        across = (
            steps,
            np.mean([[run.seconds_at(step) for step in steps] for run in own], axis=0),
            np.mean([track.dissipation[:shortest] for track in tracks], axis=0),
        )
        label = f"{method} ({setting(own[0].trial):g})"
        for axis, x in zip(axes, across, strict=True):
            axis.plot(x, loss.mean(0), color=f"C{index}", lw=1.6, label=label)
        axes[0].fill_between(
            steps, loss.min(0), loss.max(0), color=f"C{index}", alpha=0.15, linewidth=0
        )
    labels = ("steps", "seconds of forward pass, backward pass and step", "dissipation (nats)")
    for axis, label in zip(axes, labels, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        for target in targets.values():
            axis.axhline(target, color="0.45", lw=0.9, ls=":")
        axis.set_xlabel(label)
    # BatchNorm's running statistics lag behind large early steps: such spikes, far above the start,
    # would flatten all else.
    start = axes[0].lines[0].get_ydata()[0]
    if axes[0].get_ylim()[1] > 2 * start:
        for axis in axes:
            axis.set_ylim(0.9 * min(targets.values()) - 0.1 * start, 1.6 * start)
        axes[1].set_title(
            "losses above 1.6 times the start's are cut off", fontsize="small", color="0.4"
        )
    axes[0].set_ylabel("probe loss (nats)")
    axes[2].legend(title="best setting", title_fontsize="small", fontsize="small", frameon=False)
    title = f"{name.replace('_', ', ')}: mean over seeds; dotted: the two targets"
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def fronts(name: str, front: ParetoFront, runs: Sequence[Recorded], path: Path) -> None:
    """The front of each target, every run of the study a point; the swept methods' settings
    joined."""
    drawn = [setting(run.trial) for run in runs if run.track is not None]
    figure = draw_front(front, drawn, [group for group in front.groups if group in SWEPT])
    title = f"{name.replace('_', ', ')}: every run, tuning trials included"
    figure.suptitle(title, x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def draw_front(front: ParetoFront, settings: Sequence[float], joined: Sequence[str]) -> Figure:
    """One panel per target, one key for all; ``settings``: of the runs, in the front's order."""
    figure = _figure(6.4 * len(front.targets) + 1.6, 5.2)
    key: dict[str, Any] = {}
    panels = np.atleast_1d(figure.subplots(1, len(front.targets)))
    for axis, target in zip(panels, front.targets, strict=True):
        front.plot(axis, target.target_loss)
        legend = axis.get_legend()
        handles = {
            text.get_text(): handle
            for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        }
        key |= handles
        legend.remove()  # one for all panels, where no point lies beneath it
        rows = front.rows(target.target_loss).assign(setting=list(settings))
        for group in joined:
            if group in handles:  # some run of it reaches the target
                colour = colour_of(handles[group])
                join_settings(axis, rows[rows["group"] == group], colour)
    figure.legend(key.values(), key.keys(), loc="outside right upper", frameon=False)
    return figure


def colour_of(handle: Any) -> Any:
    """The colour in which a legend shows a group."""
    if hasattr(handle, "get_facecolor"):
        return handle.get_facecolor()[0]
    return handle.get_markerfacecolor() if hasattr(handle, "get_marker") else handle.get_color()


def join_settings(axis: Axes, rows: pd.DataFrame, colour: Any) -> None:
    """Join one method's settings (column ``setting``; geometric mean over their runs that reach the
    target) and write them beside the line."""
    known = rows[~rows["censored"]]
    if known.empty:
        return
    logarithms = known.assign(time=np.log(known["time"]), cost=np.log(known["dissipation_scaled"]))
    points = logarithms.groupby("setting")[["time", "cost"]].mean()
    across, up = np.exp(points["time"]), np.exp(points["cost"])
    axis.plot(across, up, color=colour, lw=1.3, alpha=0.8, zorder=2.5)
    offset: Any = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": "x-small"}
    for value, time, cost in zip(points.index, across, up, strict=True):
        axis.annotate(f"{value:g}", (time, cost), color=colour, **offset)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def main(arguments: list[str]) -> None:
    """Draw the README's two pictures."""
    parser = argparse.ArgumentParser(prog="analysis figures", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    audits = [to.audit(path, lens="outputs") for path in sorted(DATA.glob("digits-*"))]
    figure = _figure(10.5, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.2])
    plots.trajectory_map(audits, left)
    plots.decomposition_bars(audits, right)
    figure.savefig(options.output / "readme.png", dpi=130)
    front = run_sweep(README_SWEEP, jobs=options.jobs).front
    settings = {trial.name: next(iter(trial.settings.values())) for trial in README_SWEEP.trials()}
    drawn = [settings[run] for run in front.rows(front.targets[0].target_loss)["run"]]
    draw_front(front, drawn, front.groups).savefig(options.output / "readme_front.png", dpi=130)
    print(options.output / "readme.png", options.output / "readme_front.png")
