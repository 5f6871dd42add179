"""Figures along the training: loss and dissipation, alignment, coarse-graining, predicted against
realised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from thermo_opt.describe.quantities import cost_unit, time_of
from thermo_opt.describe.sentences import seen
from thermo_opt.lenses.results import Audited
from thermo_opt.plots import series
from thermo_opt.plots.axes import (
    given_or_new,
    in_rows,
    key_beside,
    log_axes,
    log_axis,
    plain,
    quiet,
    say_nothing_known,
    stacked,
)
from thermo_opt.plots.crowd import crowd

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def units(audits: list[Audited]) -> str:
    """Unit of Q for these audits; both, when their clocks differ."""
    return " or ".join(sorted({cost_unit(time_of(audit.summary)) for audit in audits}))


def loss_and_dissipation(
    audits: Audited | Iterable[Audited], ax: Axes | None = None, *, key: bool = True
) -> Axes:
    """Loss (nats per example) above, on a logarithmic axis where it spans decades, dissipation Q
    spent so far (nats) below, against the training step (theory §3); ``key``: name the runs beside
    it."""
    audits = series.as_list(audits)
    ax = given_or_new(ax, height=5.0)
    upper, lower = stacked(ax, f"Loss and dissipation, {seen(audits)}")
    losses = []
    drawn = crowd(audits)
    for i in drawn.order:
        look = drawn.line(i, plain(audits[i].run))
        step, loss, _ = series.loss_curve(audits[i])
        if len(step):
            upper.plot(step, loss, **look)
            losses.append(loss)
        step, spent = series.cumulative_dissipation(audits[i].headline)
        if len(step):
            lower.plot(step, spent, **look)
    if series.spans_decades(losses):
        log_axis(upper, "y")
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
    lower.set_xlabel(series.along(audits))
    if key and len(audits) > 1:
        key_beside(upper, last_first=drawn.behind > 0)
    return ax


def alignment(audits: Audited | Iterable[Audited], ax: Axes | None = None) -> Axes:
    """Shares of the dissipation along the natural gradient, downhill above the line and uphill
    below it, as running means: a panel a run (theory §3).

    Lines: certified lower ends. Bands: up to the upper ends, where these say anything.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    audits = series.as_list(audits)
    drawn = [
        (i, audit, found)
        for i, audit in enumerate(audits)
        if (found := series.alignment_series(audit)) is not None
    ]
    shown = drawn[: series.MAX_PANELS]
    ax = given_or_new(ax, height=max(3.0, 1.2 + alignment_height(len(shown))))
    if not drawn:
        say_nothing_known(ax, "No lens knows the alignment of these runs.")
        return ax
    more = f" ({len(shown)} of {len(drawn)} runs)" if len(drawn) > len(shown) else ""
    over = list(dict.fromkeys(window_words(found) for _, _, found in shown))
    said = f", {over[0]}" if len(over) == 1 else ""
    panels = in_rows(ax, len(shown), f"Share along the natural gradient{said}{more}")
    looks = crowd(audits).looks
    for panel, (i, audit, found) in zip(panels, shown, strict=True):
        style = looks[i]
        for sign, (low, high) in ((1, found.downhill.T), (-1, found.uphill.T)):
            if not np.nanmax(high, initial=0.0) > 0 and not np.nanmax(low, initial=0.0) > 0:
                continue
            panel.fill_between(
                found.step, sign * low, sign * high, color=style.hex, alpha=0.25, linewidth=0
            )
            panel.plot(found.step, sign * low, style.linestyle, color=style.hex)
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.text(
            0.0,
            1.0,
            plain(audit.run) + ("" if said else f", {window_words(found)}"),
            transform=panel.transAxes,
            va="bottom",
            fontsize="small",
        )
    bottom, top = panels[0].get_ylim()
    panels[0].set_ylim(max(bottom, -1.0), min(top, 1.0))
    panels[0].yaxis.set_major_locator(MaxNLocator(3 if len(shown) < 8 else 2))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[-1].set_xlabel(series.along(audits))
    return ax


def alignment_height(runs: int) -> float:
    """Inches that the panels of so many runs want."""
    return runs * (2.6 if runs == 1 else 0.95 if runs <= 8 else 0.6)


def window_words(found: series.AlignmentSeries) -> str:
    """What a point of the alignment's figure is a mean over."""
    over = "single steps" if found.window == 1 else f"means over {found.window} steps"
    return f"{over}, {found.looked_at} looked at" if found.looked_at else over


def coarse_graining(
    audits: Audited | Iterable[Audited], ax: Axes | None = None, *, key: bool = True
) -> Axes:
    """ℒ_m (√nats) above and Q_m (nats) below against the sampling stride in optimizer steps, log
    axes (theory §4); ``key``: name the runs and their exponents H beside it."""
    audits = series.as_list(audits)
    ax = given_or_new(ax, height=5.0)
    drawn = crowd(audits)
    tables = [(i, series.coarse_curves(audits[i].headline)) for i in drawn.order]
    tables = [(i, table) for i, table in tables if len(table) > 1]
    if not tables:
        say_nothing_known(ax, "Coarse-graining needs three snapshots and a scale in nats.")
        return ax
    upper, lower = stacked(ax, "Coarse-graining")
    for i, table in tables:
        look = drawn.line(i, exponent_words(audits[i]))
        if not drawn.looks[i].recedes:
            look |= {"marker": drawn.looks[i].marker, "markersize": 4}
        for panel, column in ((upper, "length"), (lower, "dissipation")):
            panel.plot(table["stride_steps"], table[column], **look)
    for panel in (upper, lower):
        log_axes(panel)
    upper.set_ylabel("length ℒ (√nats)")
    lower.set_ylabel(f"Q ({units(audits)})")
    lower.set_xlabel(f"sampling stride ({series.along(audits)}s)")
    if key:
        key_beside(upper, last_first=drawn.behind > 0)
    return ax


def exponent_words(audit: Audited) -> str:
    """A run's name, with its exponent H where that is known."""
    name = plain(audit.run)
    return name if audit.headline.hurst is None else f"{name}, H = {audit.headline.hurst:.2f}"


def predicted_vs_realised(
    audits: Audited | Iterable[Audited], ax: Axes | None = None, *, key: bool = True
) -> Axes:
    """Each interval's predicted ½a against its realised KL divergence (nats, log axes), and the
    line of agreement; ``key``: name the runs beside it."""
    audits = series.as_list(audits)
    ax = given_or_new(ax)
    span = np.array([np.inf, -np.inf])
    drawn = crowd(audits)
    for i in drawn.order:
        found = series.realised(audits[i])
        if found is None:
            continue
        _, predicted, measured = found
        style = drawn.looks[i]
        ax.scatter(
            predicted,
            measured,
            s=18,
            color=style.hex,
            marker=style.marker,
            alpha=0.35 if style.recedes else 0.75,
            label=drawn.label(i, plain(audits[i].run)) or "_",
        )
        both = np.concatenate([predicted, measured])
        span = np.array([min(span[0], both.min()), max(span[1], both.max())])
    if span[0] > span[1]:
        say_nothing_known(ax, "No lens measured the realised divergence of these runs.")
        return ax
    quiet(ax, f"Predicted and realised dissipation, {seen(audits)}")
    ax.plot(span, span, "--", color="0.5", linewidth=1)
    log_axes(ax)
    ax.set_xlabel("predicted ½a (nats)")
    ax.set_ylabel("realised KL (nats)")
    if key:
        key_beside(ax, last_first=drawn.behind > 0)
    return ax
