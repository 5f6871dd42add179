"""The speed-cost plane: runs, their front, hulls of groups, and the frontier no run can cross."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from thermo_opt.describe.quantities import DURATION_UNITS, cost_unit, number, percent
from thermo_opt.errors import InputError
from thermo_opt.plots.axes import given_or_new, key_beside, log_axes, plain, quiet
from thermo_opt.plots.palette import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EFFICIENCIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001)
"""Contours drawn where they pass through the figure, beside the frontier (efficiency 1)."""


class FrontTarget(Protocol):
    """What is drawn of one target loss's front; see `thermo_opt.fronts.Target`."""

    @property
    def target_loss(self) -> float:
        """The loss to reach, nats."""

    @property
    def least_distance(self) -> float:
        """D*(L*), to which dissipations are scaled."""

    @property
    def coverage(self) -> float:
        """Share of the attainable area that the runs dominate."""

    @property
    def same_start(self) -> bool:
        """Whether scaling changes nothing."""

    def least_dissipation(self, time: Any, efficiency: float = 1.0) -> Any:
        """The contour of constant efficiency at these times."""


class Front(Protocol):
    """What is drawn of a speed-cost front; `thermo_opt.fronts.ParetoFront` is one."""

    @property
    def x(self) -> str:
        """What time is."""

    @property
    def clock(self) -> str:
        """The clock on which time and dissipation were measured."""

    @property
    def counted_in(self) -> str:
        """What time is counted in: the clock, or epochs."""

    @property
    def targets(self) -> Sequence[FrontTarget]:
        """One per target loss."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per run and target."""

    @property
    def notes(self) -> Sequence[str]:
        """At which snapshots the runs were compared, and what isn't seen."""

    @property
    def groups(self) -> list[str]:
        """Groups in order of first appearance."""

    def rows(self, target_loss: float) -> pd.DataFrame:
        """The table's rows of one target."""

    def front(self, target_loss: float | None = None) -> pd.DataFrame:
        """Rows that no other beats."""

    def hulls(self, target_loss: float) -> dict[str, np.ndarray]:
        """Corners of each group's hull."""

    def to_json(self, *, left_out: Sequence[tuple[str, str]] = ()) -> str:
        """The front as strict JSON, with (run, reason) of the runs that have no line."""


def pareto(front: Front, ax: Axes | None = None, target_loss: float | None = None) -> Axes:
    """Time and dissipation to reach a target loss (by default the first): one point a run, on
    logarithmic axes.

    Colours and hulls: groups. Black steps: the front. Shaded: below the universal frontier ``Q T =
    D*²/2``, where no run can be. Grey lines: equal efficiency. Runs that never reach the target
    aren't drawn but counted in the title.
    """
    target = (
        front.targets[0]
        if target_loss is None
        else next(t for t in front.targets if t.target_loss == target_loss)
    )
    ax = given_or_new(ax, 6.8, 4.8)
    rows = front.rows(target.target_loss)
    missed = int(rows["censored"].sum())
    late = "never do" if rows["every_step"].all() else "aren't seen to"
    more = f" ({missed} of {len(rows)} runs {late})" if missed else ""
    quiet(ax, f"Cost of reaching loss {target.target_loss:.3g}{more}")
    hulls = front.hulls(target.target_loss)
    for index, group in enumerate(front.groups):
        own = rows[(rows["group"] == group) & ~rows["censored"]]
        if own.empty:
            continue
        style = look(index)
        ax.scatter(
            own["time"],
            own["dissipation_scaled"],
            s=26,
            color=style.hex,
            marker=style.marker,
            zorder=3,
            label=plain(group),
        )
        corners = hulls[group]
        if len(corners) > 1:
            ax.fill(
                *corners.T,
                facecolor=style.hex,
                edgecolor=style.hex,
                alpha=0.13,
                linewidth=1,
                zorder=1,
            )
    best = front.front(target.target_loss)
    ax.step(
        best["time"],
        best["dissipation_scaled"],
        where="post",
        color="0.1",
        linewidth=1.4,
        zorder=2,
        label="front",
    )
    span_x, span_y = window(front, target)
    ax.set_xlim(*span_x)
    ax.set_ylim(*span_y)
    log_axes(ax)
    time = np.geomspace(*span_x, 200)
    edge = target.least_dissipation(time)
    ax.plot(time, edge, color="0.1", linewidth=1.4, linestyle="--", label="no run can be below")
    ax.fill_between(
        time, span_y[0], np.clip(edge, *span_y), color="0.5", alpha=0.18, linewidth=0, zorder=0
    )
    for efficiency in contours(target, span_x, span_y):
        line = target.least_dissipation(time, efficiency)
        ax.plot(time, line, color="0.75", linewidth=0.8, zorder=0)
        inside = np.flatnonzero((line > span_y[0]) & (line < span_y[1]))
        label = inside[len(inside) // 10]  # off the frame, where the title is
        ax.annotate(
            percent(efficiency), (time[label], line[label]), fontsize="x-small", color="0.45"
        )
    ax.set_xlabel(f"time to reach it ({DURATION_UNITS[front.counted_in]})")
    ax.set_ylabel(cost_label(front, target))
    key_beside(ax)
    return ax


def energy(front: Front, ax: Axes | None = None, target_loss: float | None = None) -> Axes:
    """Joules against dissipation, each up to the target loss (by default the first): one point a
    run that logged both.

    Nothing binds one to the other (see `thermo_opt.runs.energy`), so there is no frontier to draw.
    Raises InputError when no run that reaches the target logged its energy.
    """
    target = (
        front.targets[0]
        if target_loss is None
        else next(t for t in front.targets if t.target_loss == target_loss)
    )
    rows = front.rows(target.target_loss).dropna(subset=["time", "energy"])
    if rows.empty:
        raise InputError(
            "no run logged its energy: record with energy=True on a machine that has a meter"
        )
    ax = given_or_new(ax, 6.8, 4.8)
    quiet(ax, f"Joules and nats of reaching loss {target.target_loss:.3g}")
    for index, group in enumerate(front.groups):
        own = rows[rows["group"] == group]
        style = look(index)
        ax.scatter(
            own["dissipation"],
            own["energy"],
            s=26,
            color=style.hex,
            marker=style.marker,
            label=plain(group),
        )
    log_axes(ax)
    ax.set_xlabel(f"dissipation Q ({cost_unit(front.counted_in)})")
    ax.set_ylabel("energy (J)")
    key_beside(ax)
    return ax


def cost_label(front: Front, target: FrontTarget) -> str:
    """The vertical axis in words."""
    scaled = "" if target.same_start else f", scaled to D* = {number(target.least_distance)}"
    return f"dissipation Q ({cost_unit(front.counted_in)}){scaled}"


def window(front: Front, target: FrontTarget) -> tuple[tuple[float, float], tuple[float, float]]:
    """Limits of both axes: every run that reaches the target, the frontier beneath them, and some
    air."""
    rows = front.rows(target.target_loss)
    rows = rows[~rows["censored"]]
    time, cost = rows["time"].to_numpy(), rows["dissipation_scaled"].to_numpy()
    lowest = float(np.min(target.least_dissipation(time)))
    return (
        (float(time.min()) / 1.3, float(time.max()) * 1.3),
        (min(float(cost.min()), lowest) / 1.3, float(cost.max()) * 1.3),
    )


def contours(
    target: FrontTarget, span_x: tuple[float, float], span_y: tuple[float, float]
) -> list[float]:
    """The efficiencies whose contours pass through a window."""
    least = 0.5 * target.least_distance**2
    low, high = least / (span_x[1] * span_y[1]), least / (span_x[0] * span_y[0])
    return [efficiency for efficiency in EFFICIENCIES if low < efficiency < high]
