"""Speed against cost: what runs took, in time and in dissipation, to reach a loss, and which of
them nothing beats (§5)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from thermo_opt import arguments
from thermo_opt.arguments import jsonable
from thermo_opt.audits.results import Audit
from thermo_opt.describe.quantities import counted_in, number
from thermo_opt.errors import InputError
from thermo_opt.fronts.alike import refuse_unlike, same
from thermo_opt.fronts.common import at_common_snapshots
from thermo_opt.fronts.dominance import attainable_hypervolume, hull, hypervolume, pareto_mask
from thermo_opt.fronts.trajectory import Trajectory, trajectory_of
from thermo_opt.lenses.results import SCHEMA_VERSION
from thermo_opt.writing import write_whole

CLOCK_OF = {
    "steps": "step",
    "seconds": "wall",
    "examples": "examples",
    "tokens": "tokens",
    "flow": "flow",
}
"""What may stand on the time axis, and the clock on which time and dissipation are then
measured."""

COLUMNS = (
    "run",
    "group",
    "target_loss",
    "censored",
    "step",
    "time",
    "dissipation",
    "least_distance",
    "efficiency",
    "dissipation_scaled",
    "on_front",
    "energy",
    "lowest_loss",
    "duration",
    "dissipation_total",
    "first_step",
    "stride",
    "every_step",
    "path",
)
"""Columns of a front's table; see `ParetoFront`."""

_SAME_START = 1e-6
"""Relative spread of D* below which runs count as having one start."""
_CORNER = "give two numbers, a time and a scaled dissipation"
_MARGIN = 1.1
"""How far beyond the front's own extremes the hypervolume's default corner lies."""


@dataclass(frozen=True)
class Target:
    """One target loss's front.

    ``least_distance``: D*(L*), the median over the runs on the front; dissipations are scaled to
    it. ``corner``: (time, scaled dissipation) beyond which area does not count. ``hypervolume``:
    the area below the corner that the runs dominate; ``coverage``: its share of the area that lies
    above the frontier hyperbola there, 1 for a front that no run can beat. ``same_start``: whether
    the runs that reach the target have one D*, so that scaling changes nothing.
    """

    target_loss: float
    least_distance: float
    corner: tuple[float, float]
    hypervolume: float
    coverage: float
    same_start: bool

    def least_dissipation(self, time: Any, efficiency: float = 1.0) -> Any:
        """The contour of constant efficiency η: ``Q = D*²/(2 η T)`` at these times; η = 1 is the
        universal frontier."""
        return self.least_distance**2 / (2 * efficiency * np.asarray(time, dtype=np.float64))


@dataclass(frozen=True)
class ParetoFront:
    """Time and dissipation that runs took to first reach each target loss, and which runs no other
    beats.

    ``table``: one row a run and target. ``step``, ``time`` (unit of ``clock``) and ``dissipation``
    (Q, nats on the step clock) up to the crossing, interpolated between snapshots; NaN where
    ``censored``: never reached within ``duration`` and ``dissipation_total``, which are then lower
    bounds. ``least_distance``: D*(L*) from the run's own starting predictions; ``efficiency``
    ``D*²/(2QT)`` ≤ 1; ``dissipation_scaled``: Q times (`Target.least_distance`/D*)², which puts
    runs of different starts under one hyperbola; ``on_front``: not dominated in (time,
    dissipation/D*²); ``energy``: joules to the crossing, where the run logged them; ``first_step``,
    ``stride``, ``every_step``: what of the run was seen: where not every step was, all of these but
    ``least_distance`` are estimates, without a known side, and ``censored`` means not seen to reach
    it. ``step_unit``: what step numbers count. ``targets``: one `Target` each. ``notes``:
    sentences: at which snapshots the runs were compared, and what isn't seen.
    """

    x: str
    clock: str
    targets: tuple[Target, ...]
    table: pd.DataFrame
    notes: tuple[str, ...] = ()
    step_unit: str = "step"

    @property
    def counted_in(self) -> str:
        """What ``time`` is counted in: the clock, or epochs where snapshots are numbered so."""
        return counted_in(self.clock, self.step_unit)

    @property
    def hypervolume(self) -> float:
        """`Target.hypervolume`, the mean over targets: clock units times the dissipation's."""
        return float(np.mean([target.hypervolume for target in self.targets]))

    @property
    def coverage(self) -> float:
        """`Target.coverage`, the mean over targets: one number in [0, 1]."""
        return float(np.mean([target.coverage for target in self.targets]))

    @property
    def groups(self) -> list[str]:
        """Groups in order of first appearance."""
        return list(dict.fromkeys(self.table["group"]))

    def rows(self, target_loss: float) -> pd.DataFrame:
        """The table's rows of one target."""
        return self.table[self.table["target_loss"] == target_loss]

    def front(self, target_loss: float | None = None) -> pd.DataFrame:
        """Rows of the non-dominated runs of a target (by default the first), fastest first."""
        rows = self.rows(self.targets[0].target_loss if target_loss is None else target_loss)
        return rows[rows["on_front"]].sort_values("time", kind="stable")

    def hulls(self, target_loss: float) -> dict[str, np.ndarray]:
        """For each group the corners (K, 2) of the convex hull, on logarithmic axes, of its (time,
        scaled dissipation)."""
        rows = self.rows(target_loss)
        found = {}
        for group, own in rows[~rows["censored"]].groupby("group", sort=False):
            points = own[["time", "dissipation_scaled"]].to_numpy(dtype=np.float64)
            found[str(group)] = points[hull(np.log(points[:, 0]), np.log(points[:, 1]))]
        return found

    def plot(
        self, ax: Any = None, target_loss: float | None = None, *, energy: bool = False
    ) -> Any:
        """Draw the front of a target, by default the first, or with ``energy`` its joules against
        its dissipation; returns the Matplotlib Axes (see `thermo_opt.plots.pareto`,
        `thermo_opt.plots.energy`)."""
        from thermo_opt.plots import front

        return (front.energy if energy else front.pareto)(self, ax, target_loss)

    def to_html(self, path: str | PathLike[str], left_out: Sequence[tuple[str, str]] = ()) -> Path:
        """Write a one-file page with a figure a target and the table (opens offline) and return its
        path; ``left_out``: (run, reason) of the runs that have no line."""
        from thermo_opt.report.front import write_front

        return write_front(self, path, left_out)

    def to_dict(self, left_out: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
        """Plain values: ``schema_version, x, clock, hypervolume, coverage, notes, targets``,
        ``runs``, the table's rows, and ``left_out``; None for NaN."""
        targets = [
            {
                "target_loss": target.target_loss,
                "least_distance": target.least_distance,
                "corner": list(target.corner),
                "hypervolume": target.hypervolume,
                "coverage": target.coverage,
                "front": self.front(target.target_loss)["run"].tolist(),
                "scaled": not target.same_start,
            }
            for target in self.targets
        ]
        return {
            "schema_version": SCHEMA_VERSION,
            "x": self.x,
            "clock": self.clock,
            "step_unit": self.step_unit,
            "hypervolume": self.hypervolume,
            "coverage": self.coverage,
            "notes": list(self.notes),
            "targets": targets,
            "runs": [jsonable(row) for row in self.table.to_dict("records")],
            "left_out": [{"run": run, "reason": reason} for run, reason in left_out],
        }

    def to_json(
        self,
        path: str | PathLike[str] | None = None,
        left_out: Sequence[tuple[str, str]] = (),
    ) -> str:
        """`to_dict` as strict JSON, also written to ``path`` if given; ``left_out``: (run, reason)
        of the runs that have no line."""
        text = json.dumps(self.to_dict(left_out), indent=2, allow_nan=False)
        if path is not None:
            write_whole(path, text + "\n")
        return text


def pareto(
    audits: Sequence[Audit | Trajectory],
    *,
    target_loss: float | Sequence[float] | None = None,
    x: str | None = None,
    groups: Sequence[str] | None = None,
    corner: tuple[float, float] | None = None,
) -> ParetoFront:
    """The speed-cost front of audited runs: least time and dissipation Q to first reach
    ``target_loss`` (§4, §5).

    ``target_loss``: one or several, nats an example; by default the lowest loss that at least half
    of the runs reach. ``x``: what time is: steps, seconds, examples, tokens or flow (Σ lr); by
    default the audits' own clock. Q is measured on the same clock, so that the universal frontier
    ``Q·T = D*(L*)²/2`` holds. ``groups``: a label a run, by default its optimizer. ``corner``:
    (time, scaled dissipation) that bounds the hypervolume, by default 1.1 times the front's
    extremes: give one to compare fronts.

    Time and dissipation at the crossing are interpolated along the geodesic between snapshots, and
    are those of the recorded path: with sparse snapshots both are estimates, without a known side,
    since the loss may have met the target earlier than is seen. Runs are compared at the snapshots
    that all of them have; those recorded more often are read again at these, which ``notes`` says.
    Runs of different starts are made comparable by dividing Q by each run's own D*². A run that
    begins at or below a target is refused: it has nothing to reach.

    Raises InputError for runs whose probes, likelihoods, clocks or units of steps differ (naming
    them), runs that share too few snapshots, runs without the outputs lens or targets, and a target
    that no run reaches, that isn't below every run's start, or that rounding can't resolve. Cost:
    O(runs x (snapshots + probe)) a target.
    """
    audits = arguments.listed(
        "audits", audits, (Audit, Trajectory), "give a list of what to.audit returns"
    )
    if not audits:
        raise InputError("nothing to compare: give at least one audited run")
    if groups is not None:
        groups = arguments.listed("groups", groups, str, "give one label a run")
    if corner is not None and len(arguments.listed("corner", corner, Real, _CORNER)) != 2:
        raise InputError(f"corner is {corner!r}; {_CORNER}")
    if x is not None and x not in CLOCK_OF:
        raise InputError(f"x={x!r} is unknown: use one of {', '.join(CLOCK_OF)}")
    clock = None if x is None else CLOCK_OF[x]
    own = [
        audit.clock if isinstance(audit, Trajectory) else str(audit.summary["clock"])
        for audit in audits
    ]
    same("clock", [audit.run for audit in audits], own, "audit them all on one clock")
    tracks = [
        audit if isinstance(audit, Trajectory) else trajectory_of(audit, clock) for audit in audits
    ]
    clock = clock or own[0]
    if tracks[0].clock != clock:
        raise InputError(
            f"these tracks were read on clock {tracks[0].clock!r}: read them with clock={clock!r}"
        )
    refuse_unlike(tracks)
    tracks, notes = at_common_snapshots(tracks)
    notes += _unseen(tracks)
    if groups is not None and len(groups) != len(tracks):
        raise InputError(
            f"there are {len(groups)} groups for {len(tracks)} runs: give one label a run"
        )
    labels = (
        [track.optimizer or "unknown optimizer" for track in tracks]
        if groups is None
        else list(groups)
    )
    targets = _targets(tracks, target_loss)
    found = [_front(tracks, labels, target, corner) for target in targets]
    table = pd.concat([rows for _, rows in found], ignore_index=True)
    name = next(word for word, own_clock in CLOCK_OF.items() if own_clock == clock)
    fronts = tuple(target for target, _ in found)
    return ParetoFront(name, clock, fronts, table, tuple(notes), tracks[0].step_unit)


def _front(
    tracks: Sequence[Trajectory],
    labels: Sequence[str],
    target_loss: float,
    corner: tuple[float, float] | None,
) -> tuple[Target, pd.DataFrame]:
    crossings = [track.crossing(target_loss) for track in tracks]
    time = np.array([c.time for c in crossings])
    spent = np.array([c.dissipation for c in crossings])
    least_distance = np.array([c.least_distance for c in crossings])
    reached = np.array([c.reached for c in crossings])
    per_distance = spent / least_distance**2  # Q/D*²: no unit of distance left, so starts compare
    on_front = pareto_mask(time, per_distance)
    # the front's own median, so that removing a dominated run changes nothing
    reference = float(np.median(least_distance[on_front]))
    scaled = per_distance * reference**2
    least = 0.5 * reference**2
    if corner is None:
        corner = (_MARGIN * float(time[on_front].max()), _MARGIN * float(scaled[on_front].max()))
    area = hypervolume(time, scaled, corner)
    attainable = attainable_hypervolume(least, corner)
    ends = least_distance[reached]
    target = Target(
        target_loss,
        reference,
        (float(corner[0]), float(corner[1])),
        area,
        float(area / attainable) if attainable > 0 else 0.0,
        bool(np.ptp(ends) <= _SAME_START * reference),
    )
    rows = pd.DataFrame(
        {
            "run": [track.run for track in tracks],
            "group": list(labels),
            "target_loss": target_loss,
            "censored": ~reached,
            "step": [c.step for c in crossings],
            "time": time,
            "dissipation": spent,
            "least_distance": least_distance,
            "efficiency": 0.5 / (per_distance * time),
            "dissipation_scaled": scaled,
            "on_front": on_front,
            "energy": [c.energy for c in crossings],
            "lowest_loss": [track.best for track in tracks],
            "duration": [track.time[-1] for track in tracks],
            "dissipation_total": [track.dissipation[-1] for track in tracks],
            "first_step": [int(track.steps[0]) for track in tracks],
            "stride": [track.stride for track in tracks],
            "every_step": [track.every_step for track in tracks],
            "path": [track.path for track in tracks],
        },
        columns=list(COLUMNS),
    )
    return target, rows


def _unseen(tracks: Sequence[Trajectory]) -> list[str]:
    """What the snapshots of these runs don't show, in sentences."""
    said, unit, begin = [], tracks[0].step_unit, int(tracks[0].steps[0])
    if not all(track.every_step for track in tracks):
        stride = max(track.stride for track in tracks)
        apart = f"{number(stride)} {unit}{'' if stride == 1 else 's'}"
        said.append(
            f"Not every optimizer step was seen, the snapshots lying {apart} apart: times, "
            "dissipations, efficiencies and dominated shares are estimates, and another order is "
            "possible."
        )
    if begin > 0:
        said.append(
            f"The first snapshot is {unit} {begin}: what came before it is not seen, and in no "
            "number here."
        )
    return said


def _targets(
    tracks: Sequence[Trajectory], target_loss: float | Sequence[float] | None
) -> list[float]:
    best = sorted(track.best for track in tracks)
    if target_loss is None:
        wanted = [best[(len(best) - 1) // 2]]
    elif isinstance(target_loss, int | float | np.number):
        wanted = [float(target_loss)]
    else:
        given = arguments.listed(
            "target_loss", target_loss, Real, "give a loss in nats an example, or several"
        )
        wanted = list(dict.fromkeys(float(value) for value in given))
    if not wanted:
        raise InputError("there is no target loss: give at least one, or leave the argument out")
    start = tracks[0].start
    # a mean of n losses, each a difference of logarithms of order one or more, is known to a few
    # units in the last place
    resolution = 64 * np.finfo(np.float64).eps * max(1.0, abs(start.least_loss), abs(start.loss))
    for target in wanted:
        if not np.isfinite(target):
            raise InputError(
                f"target loss {target} isn't a finite number: give a loss in nats an example"
            )
        if target < start.least_loss + resolution:
            raise InputError(
                f"target loss {target:g} is below what floating point can resolve: losses start at "
                f"{start.least_loss:g} "
                f"and are known to about {resolution:.1g}; give a higher target"
            )
        above = [track for track in tracks if track.loss[0] <= target]
        if above:
            raise InputError(
                f"{above[0].run} begins at loss {above[0].loss[0]:.6g}, not above the target "
                f"{target:g}: there is nothing "
                "to reach; give a lower target, or leave that run out"
            )
        if best[0] > target:
            raise InputError(
                f"no run reaches the target loss {target:g}, so the front is empty: the lowest "
                f"loss is {best[0]:.6g}; "
                "give a higher target, or longer runs"
            )
    return wanted
