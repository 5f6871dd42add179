"""A study's figures: loss curves, and speed-cost fronts on which a method's settings can be
followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from analysis.study_table import Recorded
from thermo_opt.fronts.front import ParetoFront
from thermo_opt.plots.axes import KEY, quiet
from thermo_opt.plots.palette import look

SWEPT = ("NGD-T", "AdamW")
"""Methods whose settings are joined by a line, where they are run."""


def curves(
    name: str,
    methods: Sequence[str],
    final: Sequence[Recorded],
    targets: Mapping[str, float],
    path: Path,
) -> None:
    """Probe loss against steps, seconds and dissipation, at each method's best setting: mean over
    seeds, and their range against steps."""
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
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
        style = look(index)
        for axis, x in zip(axes, across, strict=True):
            label = f"{method} ({own[0].trial.setting:g})"
            every = (
                index % 3,
                max(1, len(steps) // 6),
            )  # markers apart, where lines lie on one another
            axis.plot(
                x,
                loss.mean(0),
                color=style.hex,
                marker=style.marker,
                markevery=every,
                ms=5,
                lw=1.6,
                label=label,
            )
        axes[0].fill_between(
            steps, loss.min(0), loss.max(0), color=style.hex, alpha=0.15, linewidth=0
        )
    labels = ("steps", "seconds of forward, backward and step", "dissipation (nats)")
    for axis, label in zip(axes, labels, strict=True):
        quiet(axis)
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
    axes[2].legend(title="best setting", title_fontsize="small", **KEY)
    figure.suptitle(
        f"{name.replace('_', ', ')}: mean over seeds; dotted: the two targets", x=0.01, ha="left"
    )
    figure.savefig(path, dpi=130)


def fronts(name: str, front: ParetoFront, rows: pd.DataFrame, path: Path) -> None:
    """The front of each target, every run of the study a point; the swept methods' settings
    joined."""
    figure = Figure(figsize=(6.4 * len(front.targets) + 1.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    key: dict[str, Any] = {}
    for axis, target in zip(
        np.atleast_1d(figure.subplots(1, len(front.targets))), front.targets, strict=True
    ):
        front.plot(axis, target.target_loss)
        legend = axis.get_legend()
        key |= {
            text.get_text(): handle
            for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
        }
        legend.remove()  # one for all panels, where no point lies beneath it
        own = front.rows(target.target_loss).reset_index(drop=True)
        # rows and front agree but for runs that diverged at once, which a front can't hold
        held = rows[rows["dissipation"].notna()].reset_index(drop=True)
        own = own.assign(setting=held["setting"])
        for index, group in enumerate(front.groups):
            if group in SWEPT:
                join_settings(axis, own[own["group"] == group], look(index).hex)
    figure.legend(key.values(), key.keys(), loc="outside right upper", frameon=False)
    figure.suptitle(
        f"{name.replace('_', ', ')}: every run, tuning trials included", x=0.01, ha="left"
    )
    figure.savefig(path, dpi=130)


def join_settings(axis: Axes, rows: pd.DataFrame, colour: str) -> None:
    """Join one method's settings (column ``setting``; geometric mean over their runs that reach the
    target) and write them beside the line."""
    known = rows[~rows["censored"]]
    if known.empty:
        return
    logarithms = known.assign(time=np.log(known["time"]), cost=np.log(known["dissipation_scaled"]))
    points = logarithms.groupby("setting")[["time", "cost"]].mean()
    across, up = np.exp(points["time"]), np.exp(points["cost"])
    axis.plot(across, up, color=colour, lw=1.3, alpha=0.8, zorder=2.5)
    offset: Any = (5, 4)
    for setting, time, cost in zip(points.index, across, up, strict=True):
        axis.annotate(
            f"{setting:g}",
            (time, cost),
            xytext=offset,
            textcoords="offset points",
            fontsize="x-small",
            color=colour,
        )
