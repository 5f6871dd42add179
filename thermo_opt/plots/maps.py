"""Figures of where: the decomposition's bars, the trajectory map, the heat map of layers and
steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from thermo_opt.describe.quantities import cost_unit, percent, time_of
from thermo_opt.describe.sentences import seen
from thermo_opt.describe.standing import with_standing
from thermo_opt.lenses.results import Audited
from thermo_opt.plots import series
from thermo_opt.plots.axes import NAME, given_or_new, key_beside, plain, quiet, say_nothing_known
from thermo_opt.plots.crowd import crowd
from thermo_opt.plots.curves import units
from thermo_opt.plots.palette import PARTS
from thermo_opt.plots.series import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def decomposition_bars(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """One bar a run, Q = irreducible + detour + pacing (nats; theory §4), in three tints of the
    run's colour."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    audits = series.as_list(audits)
    rows = [
        (i, audit, lens.summary)
        for i, audit in enumerate(audits)
        if (lens := series.bar_lens(audit)) is not None
    ]
    ax = given_or_new(ax, height=1.4 + 0.55 * len(rows))
    if not rows:
        say_nothing_known(ax, "No lens knows how these runs' dissipation divides.")
        return ax
    looks = crowd(audits).looks
    for row, (i, audit, summary) in enumerate(rows):
        left = 0.0
        for part, opacity in PARTS.items():
            ax.barh(
                row,
                summary[part],
                0.42,
                left=left,
                color=to_rgba(looks[i].hex, opacity),
                edgecolor=looks[i].hex,
            )
            left += summary[part]
        amount = f"{with_standing(summary, 'dissipation')} {cost_unit(time_of(summary))}"
        text = f"{shortened(audit.run, NAME)}  {amount}"
        ax.text(0, row - 0.27, text, va="bottom", ha="left", fontsize="small", parse_math=False)
    quiet(ax, f"Where the dissipation went, {seen(audits)}")
    ax.grid(False, axis="y")
    ax.set_yticks([])
    ax.set_ylim(max(len(rows), 2.5) - 0.6, -1.05)
    ax.set_xlabel(f"dissipation Q ({units(audits)})")
    patches = [
        Patch(facecolor=to_rgba("0.35", o), edgecolor="0.35", label=part)
        for part, o in PARTS.items()
    ]
    key_beside(ax, patches)
    return ax


def trajectory_map(
    audits: Audited | Iterable[Audited], ax: Axes | None = None, *, key: bool = True
) -> Axes:
    """The runs' recorded predictions on one plane of intensive principal components
    (`manifold.trajectory_map`).

    Open marker: start; filled marker: end. Runs recorded on another probe than the first are
    counted below it. ``key``: name the runs beside it.
    """
    audits = series.as_list(audits)
    ax = given_or_new(ax, height=4.8)
    found = series.trajectory_series(audits)
    if found is None:
        say_nothing_known(ax, "No recorded predictions to map.")
        return ax
    drawn = crowd(audits)
    paths = {run.index: run for run in found.trajectories}
    for i in (i for i in drawn.order if i in paths):
        style, xy = drawn.looks[i], paths[i].xy
        line = drawn.line(i, plain(audits[i].run))
        if not style.recedes:
            line |= {"marker": ".", "markersize": 4}
        ax.plot(*xy.T, **line)
        size = 4 if style.recedes else 8
        ax.plot(*xy[0], style.marker, color=style.hex, markerfacecolor="none", markersize=size)
        ax.plot(*xy[-1], style.marker, color=style.hex, markersize=size)
    quiet(ax, f"Paths of the predictions ({percent(found.explained)} of the spread)")
    ax.set_aspect("equal", adjustable="datalim")
    others = len(found.left_out)
    more = f"\n(not drawn, on another probe: {others} run{'s' * (others > 1)})" if others else ""
    ax.set_xlabel(f"first intensive component{more}")
    ax.set_ylabel("second intensive component")
    if key and len(audits) > 1:
        key_beside(ax, last_first=drawn.behind > 0)
    return ax


def dissipation_heatmap(audit: Audited, ax: Axes | None = None) -> Axes:
    """Dissipation of each layer and interval (nats, logarithmic colours); blank where a layer's
    part is not positive."""
    from matplotlib.colors import LogNorm

    found = series.heat(audit)
    ax = given_or_new(ax, height=map_height(0 if found is None else len(found.layers)))
    if found is None or not (found.values > 0).any():
        say_nothing_known(ax, "No lens attributes this run's dissipation to layers.")
        return ax
    values = np.ma.masked_less_equal(found.values, 0)
    top = float(values.max())
    norm = LogNorm(max(float(values.min()), top * 1e-6), top)
    rows = np.arange(len(found.layers))
    image = ax.pcolormesh(
        found.step, rows, values, norm=norm, cmap="viridis", shading="nearest", rasterized=True
    )
    ax.set_yticks(rows, found.layers, fontsize="small", parse_math=False)
    ax.invert_yaxis()
    ax.set_xlabel(series.along([audit]))
    ax.set_title(
        f"Which layers dissipated: {plain(audit.run)}, {intervals_words(audit)}",
        loc="left",
        fontsize="medium",
        fontweight="bold",
    )
    if (figure := ax.get_figure()) is not None:
        figure.colorbar(image, ax=ax, label=f"dissipation ({units([audit])})", pad=0.02)
    return ax


def map_height(layers: int) -> float:
    """Inches that the heat map of so many layers wants."""
    return 1.5 + 0.25 * layers


def intervals_words(audit: Audited) -> str:
    """Which of a run's intervals the lens that attributes them looked at."""
    looked = next(len(x.steps) for x in audit.lenses.values() if x.attribution is not None)
    every = "every interval"
    return every if looked == len(audit.steps) else f"{looked} of {len(audit.steps)} intervals"
