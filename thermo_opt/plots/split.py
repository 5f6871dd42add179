"""Figures of noise apart from progress (theory §11): the split's bars, the split along a run, the
critical batch size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from thermo_opt.describe.quantities import number
from thermo_opt.lenses.noise import Split
from thermo_opt.lenses.results import Audited
from thermo_opt.plots.axes import (
    NAME,
    given_or_new,
    key_beside,
    log_axis,
    plain,
    quiet,
    say_nothing_known,
)
from thermo_opt.plots.crowd import crowd
from thermo_opt.plots.palette import OKABE_ITO
from thermo_opt.plots.series import as_list, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPACITY = {"transport": 1.0, "housekeeping": 0.45, "drift": 0.45, "noise": 0.12}
"""Of each part, in a run's own colour; ``drift`` where it can't be divided."""
COLOURS = {"noise": "sky", "drift": "vermillion", "transport": "blue"}
"""Of each part along one run."""


def split_of(audit: Audited) -> Split | None:
    """An audit's split with its replicas, or None where it recorded none."""
    lens = audit.lenses.get("outputs")
    found = None if lens is None else lens.split
    return found if found is not None and found.replicas else None


def parts(split: Split) -> dict[str, tuple[float, float]]:
    """(value, standard error) of the parts that add up: transport, housekeeping and noise, or drift
    and noise where the transport can't be told from zero."""
    keys = ("drift", "noise") if split.transport is None else ("transport", "housekeeping", "noise")
    return {k: (getattr(split, k), getattr(split, f"{k}_error") or 0.0) for k in keys}


def split_bars(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """One bar a run: transport, housekeeping and noise (nats; theory §11), with the standard error
    of each at its end."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    audits = as_list(audits)
    rows = [(i, a, s) for i, a in enumerate(audits) if (s := split_of(a)) is not None]
    ax = given_or_new(ax, height=1.6 + 0.55 * len(rows))
    if not rows:
        say_nothing_known(ax, "No run recorded replicas, which tell noise from drift.")
        return ax
    seen: dict[str, None] = {}
    looks = crowd(audits).looks
    for row, (i, audit, split) in enumerate(rows):
        left = 0.0
        for part, (value, error) in parts(split).items():
            seen[part] = None
            width = max(value, 0.0)
            ax.barh(
                row,
                width,
                0.42,
                left=left,
                color=to_rgba(looks[i].hex, OPACITY[part]),
                edgecolor=looks[i].hex,
            )
            left += width
            ax.errorbar(left, row, xerr=error, color="0.25", linewidth=1, capsize=2)
        amount = number((split.noise or 0) + (split.drift or 0))
        text = f"{shortened(audit.run, NAME)}  {amount} nats"
        ax.text(0, row - 0.27, text, va="bottom", ha="left", fontsize="small", parse_math=False)
    quiet(ax, "Noise apart from progress")
    ax.grid(False, axis="y")
    ax.set_yticks([])
    ax.set_ylim(max(len(rows), 2.5) - 0.6, -1.05)
    ax.set_xlim(left=0)
    ax.set_xlabel("dissipation (nats, clock step)")
    patches = [
        Patch(facecolor=to_rgba("0.35", OPACITY[part]), edgecolor="0.35", label=part)
        for part in seen
    ]
    key_beside(ax, patches)
    return ax


def split_curve(audit: Audited, ax: Axes | None = None) -> Axes:
    """Noise, drift and transport per step along one run (nats, logarithmic), with bands of one
    standard error; a stretch where a part can't be told from zero is left out of its line."""
    ax = given_or_new(ax)
    split = split_of(audit)
    if split is None or split.curve.empty:
        say_nothing_known(ax, "This run recorded no replicas, which tell noise from drift.")
        return ax
    quiet(ax, "Noise, drift and transport along the training")
    for key, colour in COLOURS.items():
        middle, value, error = estimates(split.curve, key)
        if not len(middle):
            continue
        shade = OKABE_ITO[colour]
        ax.errorbar(middle, value, yerr=error, color=shade, marker="o", markersize=4, label=key)
    log_axis(ax, "y")
    ax.set_xlabel("training step")
    ax.set_ylabel("dissipation per step (nats)")
    key_beside(ax)
    return ax


def critical_batch(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """The critical batch size B* along the runs (loss terms, logarithmic), with standard errors;
    arrows where only a lower end is known. Thin lines: the batch size each run used."""
    audits = as_list(audits)
    ax = given_or_new(ax)
    drawn = False
    runs = crowd(audits)
    for i in runs.order:
        audit, style = audits[i], runs.looks[i]
        split = split_of(audit)
        if split is None or split.critical.empty:
            continue
        table = split.critical
        middle, value, error = estimates(table, "critical_batch")
        below = table[table["critical_batch"].isna() & (table["critical_batch_lower"] > 0)]
        if not len(middle) and below.empty:
            continue
        drawn = True
        ax.errorbar(
            middle,
            value,
            yerr=np.minimum(error, 0.9 * value),
            color=style.hex,
            marker=style.marker,
            markersize=5,
            linestyle=style.linestyle,
            alpha=0.4 if style.recedes else 1.0,
            label=runs.label(i, plain(audit.run)) or "_",
        )
        if not below.empty:
            ax.errorbar(
                (below["step"] + below["step_end"]) / 2,
                below["critical_batch_lower"],
                yerr=0.35 * below["critical_batch_lower"],
                lolims=True,
                linestyle="none",
                color=style.hex,
                alpha=0.7,
            )
        used = batch_size(audit)
        if used:
            ax.axhline(used, color=style.hex, linewidth=0.8, alpha=0.6)
    if not drawn:
        say_nothing_known(ax, "No run without momentum, with replicas and a batch size.")
        return ax
    quiet(ax, "Critical batch size")
    log_axis(ax, "y")
    ax.set_xlabel("training step")
    ax.set_ylabel("B* (loss terms)")
    key_beside(ax)
    return ax


def estimates(table: pd.DataFrame, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(middles, values, errors) of the stretches where a part stands out from zero by two errors,
    or, of noise and drift, is positive."""
    value, error = table[key].to_numpy(float), table[f"{key}_error"].to_numpy(float)
    error = np.nan_to_num(error)
    keep = np.isfinite(value) & (value > (2 * error if key == "transport" else 0))
    middle = (table["step"].to_numpy(float) + table["step_end"].to_numpy(float)) / 2
    return middle[keep], value[keep], error[keep]


def batch_size(audit: Audited) -> float | None:
    """The batch size that a run recorded."""
    settings: Mapping[str, Any] = audit.settings
    found = settings.get("batch_size")
    return float(found) if isinstance(found, int | float) and found > 0 else None
