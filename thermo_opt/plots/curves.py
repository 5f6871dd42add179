"""Figures along the training: loss and dissipation, alignment, coarse-graining, predicted against
realised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from thermo_opt.describe.quantities import cost_unit
from thermo_opt.lenses.results import Audited
from thermo_opt.plots import series
from thermo_opt.plots.axes import (
    KEY,
    given_or_new,
    log_axes,
    plain,
    quiet,
    say_nothing_known,
    stacked,
)
from thermo_opt.plots.palette import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def units(audits: list[Audited]) -> str:
    """Unit of Q for these audits; both, when their clocks differ."""
    return " or ".join(sorted({cost_unit(audit.summary["clock"]) for audit in audits}))


def loss_and_dissipation(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """Loss (nats per example) above, dissipation Q spent so far (nats) below, against the training
    step (theory §3)."""
    audits = series.as_list(audits)
    ax = given_or_new(ax, height=5.0)
    upper, lower = stacked(ax, "Loss and dissipation")
    for i, audit in enumerate(audits):
        style = look(i)
        step, loss, _ = series.loss_curve(audit)
        if len(step):
            upper.plot(step, loss, style.linestyle, color=style.hex, label=plain(audit.run))
        step, spent = series.cumulative_dissipation(audit.headline)
        if len(step):
            lower.plot(step, spent, style.linestyle, color=style.hex)
    if not lower.lines:
        lower.text(
            0.5,
            0.5,
            "scale in nats unknown",
            ha="center",
            va="center",
            color="0.4",
            transform=lower.transAxes,
        )
        lower.set_yticks([])
    upper.set_ylabel("loss (nats)")
    lower.set_ylabel(f"Q so far ({units(audits)})")
    lower.set_xlabel("training step")
    _key(upper, audits)
    return ax


def alignment(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """Alignment ε of each interval (theory §3): a band where a bracket is known, a line where a
    value or a lower bound is."""
    audits = series.as_list(audits)
    ax = given_or_new(ax)
    drawn = False
    for i, audit in enumerate(audits):
        found = series.alignment_series(audit)
        if found is None:
            continue
        drawn = True
        style = look(i)
        name = plain(f"{audit.run} ({found.kind})")
        if found.kind == "bracket":
            ax.fill_between(
                found.step,
                found.lower,
                found.upper,
                color=style.hex,
                alpha=0.25,
                linewidth=0,
                label=name,
            )
            ax.plot(found.step, (found.lower + found.upper) / 2, style.linestyle, color=style.hex)
        else:
            ax.plot(found.step, found.lower, style.linestyle, color=style.hex, label=name)
    if not drawn:
        say_nothing_known(ax, "No lens knows the alignment of these runs.")
        return ax
    quiet(ax, "Alignment with the natural gradient")
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xlabel("training step")
    ax.set_ylabel("alignment ε")
    ax.legend(**KEY)
    return ax


def coarse_graining(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """ℒ_m (√nats) above and Q_m (nats) below against the sampling stride in optimizer steps, log
    axes (theory §4)."""
    audits = series.as_list(audits)
    ax = given_or_new(ax, height=5.0)
    tables = [(i, audit, series.coarse_curves(audit.headline)) for i, audit in enumerate(audits)]
    tables = [(i, audit, table) for i, audit, table in tables if len(table) > 1]
    if not tables:
        say_nothing_known(ax, "Coarse-graining needs three snapshots and a scale in nats.")
        return ax
    upper, lower = stacked(ax, "Coarse-graining")
    for i, audit, table in tables:
        style = look(i)
        name = plain(audit.run)
        if audit.headline.hurst is not None:
            name += f", H = {audit.headline.hurst:.2f}"
        for panel, column in ((upper, "length"), (lower, "dissipation")):
            panel.plot(
                table["stride_steps"],
                table[column],
                style.linestyle,
                color=style.hex,
                marker=style.marker,
                markersize=4,
                label=name,
            )
    for panel in (upper, lower):
        log_axes(panel)
    upper.set_ylabel("length ℒ (√nats)")
    lower.set_ylabel(f"Q ({units(audits)})")
    lower.set_xlabel("sampling stride (optimizer steps)")
    upper.legend(**KEY)
    return ax


def predicted_vs_realised(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """Each interval's predicted ½a against its realised KL divergence (nats, log axes), and the
    line of agreement."""
    ax = given_or_new(ax)
    span = np.array([np.inf, -np.inf])
    for i, audit in enumerate(series.as_list(audits)):
        found = series.realised(audit)
        if found is None:
            continue
        _, predicted, measured = found
        style = look(i)
        ax.scatter(
            predicted,
            measured,
            s=18,
            color=style.hex,
            marker=style.marker,
            alpha=0.75,
            label=plain(audit.run),
        )
        both = np.concatenate([predicted, measured])
        span = np.array([min(span[0], both.min()), max(span[1], both.max())])
    if span[0] > span[1]:
        say_nothing_known(ax, "No lens measured the realised divergence of these runs.")
        return ax
    quiet(ax, "Predicted and realised dissipation")
    ax.plot(span, span, "--", color="0.5", linewidth=1)
    log_axes(ax)
    ax.set_xlabel("predicted ½a (nats)")
    ax.set_ylabel("realised KL (nats)")
    ax.legend(**KEY)
    return ax


def _key(ax: Axes, audits: list[Audited]) -> None:
    if len(audits) > 1:
        ax.legend(**KEY)
