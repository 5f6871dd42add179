"""The front on drift, with the noise of each run beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from thermo_opt.describe.quantities import DURATION_UNITS
from thermo_opt.lenses.noise import scatters
from thermo_opt.plots.axes import KEY, given_or_new, log_axes, plain, quiet, say_nothing_known
from thermo_opt.plots.palette import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scattered(rows: pd.DataFrame) -> list[bool]:
    """Which of a front's rows have noise that is worth a mark."""
    pairs = rows[["noise", "drift"]].to_numpy(float)
    return [scatters(noise, drift) for noise, drift in pairs]


def drift_front(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Time and drift to a loss, filled, and the noise on the way, open, joined by a line; black:
    the runs that no other beats.

    Args:
        table: What `thermo_opt.fronts.drift_front` gives; its first target is drawn, without drifts
            at or below zero and without the noise of full batches.
        ax: Where to draw.
    """
    ax = given_or_new(ax, 6.8, 4.8)
    target = table["target_loss"].iloc[0]
    rows = table[(table["target_loss"] == target) & ~table["censored"] & (table["drift"] > 0)]
    for index, (group, own) in enumerate(rows.groupby("group", sort=False)):
        style = look(index)
        ax.plot(own["time"], own["drift"], style.marker, color=style.hex, label=plain(str(group)))
        seen = own[scattered(own)]
        ax.plot(seen["time"], seen["noise"], style.marker, color=style.hex, fillstyle="none")
        for row in seen.to_dict("records"):
            ends = [row["drift"], row["noise"]]
            ax.plot([row["time"]] * 2, ends, color=style.hex, linewidth=0.8, alpha=0.5)
    if rows.empty:
        say_nothing_known(ax, "The drift of no run stands out from zero.")
        return ax
    best = rows[rows["on_front"]].sort_values("time")
    ax.step(best["time"], best["drift"], where="post", color="0.1", linewidth=1.4, label="front")
    log_axes(ax)
    quiet(ax, f"Drift (filled) and noise (open) to loss {target:.3g}")
    ax.set_xlabel(f"time to reach it ({DURATION_UNITS[table.attrs['clock']]})")
    ax.set_ylabel("nats, clock step")
    ax.legend(**KEY)
    return ax
