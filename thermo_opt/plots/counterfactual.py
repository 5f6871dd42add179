"""Figures of steps and their counterfactuals: what each bought, and how much of its motion reaches
fresh examples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd

from thermo_opt.lenses.results import Audited
from thermo_opt.plots.axes import KEY, given_or_new, plain, quiet, say_nothing_known
from thermo_opt.plots.crowd import crowd
from thermo_opt.plots.palette import OKABE_ITO
from thermo_opt.plots.series import as_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = {
    "decrease": ("own step", "vermillion", "o"),
    "natural_decrease": ("natural gradient", "blue", "s"),
    "kfac_decrease": ("K-FAC", "green", "D"),
}


def looked_at(audit: Audited) -> pd.DataFrame | None:
    """The steps of the counterfactual lens, or None where it did not look."""
    lens = audit.lenses.get("counterfactual")
    return None if lens is None else lens.steps


def counterfactual(audit: Audited, ax: Axes | None = None, *, held: bool = True) -> Axes:
    """Fall of the loss per nat of KL on the minibatch, of the run's own steps and of steps of the
    natural gradient of the same KL; on the probe, or with ``held=False`` on the minibatch."""
    ax = given_or_new(ax)
    steps = looked_at(audit)
    if steps is None:
        say_nothing_known(ax, "The counterfactual lens did not look at this run.")
        return ax
    where = "on the probe" if held else "on the minibatch"
    quiet(ax, f"Loss bought per nat, {where}")
    for key, (name, colour, marker) in SERIES.items():
        bought = steps[f"{key}_held" if held else key] / steps["nats"]
        ax.plot(
            steps["step"], bought, color=OKABE_ITO[colour], marker=marker, markersize=4, label=name
        )
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xlabel("training step")
    ax.set_ylabel("fall of the loss / KL on the minibatch")
    ax.legend(**KEY)
    return ax


def held_out(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """KL on the probe over KL on the step's own minibatch along the runs: 1 where a step moves
    fresh examples as far as its own, less where it is memorised."""
    audits = as_list(audits)
    ax = given_or_new(ax)
    runs = crowd(audits)
    for i in runs.order:
        steps = looked_at(audits[i])
        if steps is not None:
            line = runs.line(i, plain(audits[i].run))
            line |= {"marker": runs.looks[i].marker, "markersize": 4}
            ax.plot(steps["step"], steps["nats_held"] / steps["nats"], **line)
    if not ax.lines:
        say_nothing_known(ax, "The counterfactual lens did not look at these runs.")
        return ax
    quiet(ax, "Held-out share of each step’s motion")
    ax.axhline(1, color="0.6", linewidth=0.8)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("training step")
    ax.set_ylabel("KL on the probe / KL on the minibatch")
    ax.legend(**KEY)
    return ax
