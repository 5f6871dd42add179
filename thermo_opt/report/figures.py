"""The page's figures as plotly.js specifications, plain dictionaries: those along the training are
made here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from thermo_opt.describe.quantities import cost_unit, percent, time_of
from thermo_opt.describe.sentences import LENS_WORDS, seen
from thermo_opt.lenses.results import Audited
from thermo_opt.plots import series
from thermo_opt.plots.crowd import crowd
from thermo_opt.plots.curves import window_words
from thermo_opt.plots.palette import Look
from thermo_opt.report.counterfactual import counterfactual
from thermo_opt.report.maps import decomposition, dissipation_heatmap, trajectory_map
from thermo_opt.report.spec import (
    Figure,
    Spec,
    axis,
    behind,
    label,
    layout,
    line,
    log_axis,
    numbers,
    panel_title,
    units,
)
from thermo_opt.report.split import critical_batch, split_bars


def figures(audits: Sequence[Audited]) -> list[Figure]:
    """Every figure that these audits support, in reading order."""
    drawn = [
        decomposition(audits),
        split_bars(audits),
        loss_and_dissipation(audits),
        alignment(audits),
        trajectory_map(audits),
        coarse_graining(audits),
    ]
    drawn += [critical_batch(audits), counterfactual(audits)]
    drawn += [dissipation_heatmap(audits), predicted_vs_realised(audits)]
    return [figure for figure in drawn if figure is not None]


def loss_and_dissipation(audits: Sequence[Audited]) -> Figure | None:
    """Loss above, dissipation spent so far below, against the training step."""
    data: list[Spec] = []
    sources = set()
    losses = []
    drawn = crowd(audits)
    for i in drawn.order:
        audit, style = audits[i], drawn.looks[i]
        step, loss, source = series.loss_curve(audit)
        if len(step):
            sources.add(source)
            losses.append(loss)
            trace = line(style, i, audit, step, loss, "loss %{y:.4g} nats")
            data.append(behind(trace, style))
        step, spent = series.cumulative_dissipation(audit.headline)
        if len(step):
            words = "dissipated so far %{y:.4g} " + cost_unit(time_of(audit.summary))
            trace = line(style, i, audit, step, spent, words)
            data.append(behind(trace, style) | {"yaxis": "y2"})
    if not data:
        return None
    name, place = "loss (nats / example)", [0.55, 1]
    frame = layout(
        xaxis=axis(series.along(audits), anchor="y2"),
        yaxis=log_axis(name, np.concatenate(losses), domain=place)
        if series.spans_decades(losses)
        else axis(name, domain=place),
        yaxis2=axis(f"Q so far ({units(audits)})", domain=[0, 0.45], rangemode="tozero"),
    )
    measured = " and ".join(
        {"probe": "on the probe set", "training": "as logged in training"}[s]
        for s in sorted(sources)
    )
    return Figure(
        "loss-and-dissipation",
        f"Loss and dissipation along the training, {seen(audits)}",
        f"Above: the loss, {measured}. Below: the dissipation spent up to each step. A steep "
        "stretch below, "
        f"under a flat one above, is cost that bought little.{drawn.sentence(audits)}"
        if measured
        else f"The dissipation spent up to each step.{drawn.sentence(audits)}",
        "Line charts of the loss and of the cumulative dissipation against the training step, one "
        "line a run.",
        data,
        frame,
        520,
    )


def alignment(audits: Sequence[Audited]) -> Figure | None:
    """Shares of the dissipation along the natural gradient, downhill up and uphill down: a panel a
    run, lines for certified lower ends, bands up to the upper ends (theory §3, §5)."""
    drawn = [
        (i, audit, found)
        for i, audit in enumerate(audits)
        if (found := series.alignment_series(audit)) is not None
    ]
    if not drawn:
        return None
    shown = drawn[: series.MAX_PANELS]
    height = 250 if len(shown) == 1 else 96 if len(shown) <= 8 else 60
    total = (height + _NAME) * len(shown)
    data: list[Spec] = []
    looks = crowd(audits).looks
    over = list(dict.fromkeys(window_words(found) for _, _, found in shown))
    frame = layout(annotations=[])
    ends = np.concatenate([[0.0]] + [_drawn_ends(found) for _, _, found in shown])
    low, high = (1.06 * float(end) for end in (ends.min(), ends.max()))
    for n, (i, audit, found) in enumerate(shown):
        panel = "" if n == 0 else str(n + 1)
        for sign, word, share in ((1, "downhill", found.downhill), (-1, "uphill", found.uphill)):
            if np.nanmax(share, initial=0.0) > 0:
                data += _band(looks[i], i, audit, found.step, sign * share, word, f"y{panel}")
        ceiling = 1 - n * (height + _NAME) / total
        frame[f"yaxis{panel}"] = axis(
            "share",
            domain=[max(ceiling - (height + _NAME) / total, 0.0), ceiling - _NAME / total],
            range=[low, high],
            zeroline=True,
            nticks=6 if len(shown) == 1 else 3,
            tickformat=".0%",
        )
        frame["annotations"].append(panel_title(label(audit.run, 34), ceiling - _NAME / total))
    frame["xaxis"] = axis(series.along(audits), anchor=f"y{len(shown) if len(shown) > 1 else ''}")
    lenses = dict.fromkeys(LENS_WORDS[found.lens] for _, _, found in shown)
    more = f" Shown: {len(shown)} of {len(drawn)} runs." if len(shown) < len(drawn) else ""
    return Figure(
        "alignment",
        f"Alignment with the natural gradient, {seen(audits)}",
        "The share of the dissipation that lay along it: above the line downhill, below it uphill. "
        "The rest bought no first-order decrease of the loss. Lines: certified "
        f"lower ends, from {' and '.join(lenses)}. Bands: up to the certified upper ends, where "
        f"these say anything. They join {' or '.join(over)}.{more}",
        "Line charts of the share of the dissipation along the natural gradient against the "
        "training step, one panel a run.",
        data,
        frame,
        54 + total,
    )


_LISTED = 8
"""Runs whose exponents are listed one by one."""
_NAME = 20
"""Height in pixels of a panel's title."""


def _drawn_ends(found: series.AlignmentSeries) -> np.ndarray:
    shares = np.concatenate([found.downhill.ravel(), -found.uphill.ravel()])
    return shares[np.isfinite(shares)]


def _band(
    style: Look,
    index: int,
    audit: Audited,
    step: np.ndarray,
    share: np.ndarray,
    word: str,
    panel: str,
) -> list[Spec]:
    """A line along the lower ends and, piece by piece where the upper ends are known, a band."""
    low, high = share.T
    trace = line(style, index, audit, step, low, f"%{{customdata}} {word}")
    trace["customdata"] = [
        f"at least {percent(abs(a), 'down')}"
        if np.isnan(b)
        else f"{percent(abs(a), 'down')} to {percent(abs(b), 'up')}"
        for a, b in zip(low, high, strict=True)
    ]
    known = np.isfinite(high)
    x: list[float | None] = []
    y: list[float | None] = []
    for piece in np.split(np.arange(len(step)), np.flatnonzero(np.diff(known)) + 1):
        if known[piece[0]]:
            x += [*numbers(step[piece]), *numbers(step[piece][::-1]), None]
            y += [*numbers(high[piece]), *numbers(low[piece][::-1]), None]
    if not x:
        return [trace | {"yaxis": panel}]
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": x[:-1],
        "y": y[:-1],
        "fill": "toself",
        "fillcolor": f"@{style.colour}:0.25",
        "line": {"width": 0, "color": f"@{style.colour}"},
        "hoverinfo": "skip",
        "name": escape(audit.run),
        "meta": {"run": index},
        "yaxis": panel,
    }
    return [band, trace | {"yaxis": panel}]


def coarse_graining(audits: Sequence[Audited]) -> Figure | None:
    """ℒ_m and Q_m against the sampling stride, log axes (theory §4)."""
    data: list[Spec] = []
    exponents = []
    tables = []
    drawn = crowd(audits)
    for i in drawn.order:
        audit, style = audits[i], drawn.looks[i]
        table = series.coarse_curves(audit.headline)
        if len(table) < 2:
            continue
        tables.append(table)
        steps = table["stride_steps"].to_numpy(dtype=np.float64)
        for column, panel, words in (
            ("length", "y", "length %{y:.4g} √nats"),
            ("dissipation", "y2", "dissipation %{y:.4g} " + cost_unit(time_of(audit.summary))),
        ):
            trace = line(
                style,
                i,
                audit,
                steps,
                table[column].to_numpy(dtype=np.float64),
                words,
                where=f"every %{{x:.4g}} {audit.summary['step_unit']}s",
            )
            trace |= {"yaxis": panel}
            if not style.recedes:
                trace["mode"] = "lines+markers"
                trace["marker"] = {"color": f"@{style.colour}", "symbol": style.symbol, "size": 6}
            data.append(behind(trace, style))
        if audit.headline.hurst is not None:
            exponents.append(f"{audit.run} {audit.headline.hurst:.2f}")
    if not data:
        return None
    values = {
        key: np.concatenate([table[key] for table in tables])
        for key in ("stride_steps", "length", "dissipation")
    }
    cost, stride = f"dissipation Q ({units(audits)})", f"sampling stride ({series.along(audits)}s)"
    frame = layout(
        xaxis=log_axis(stride, values["stride_steps"], anchor="y2"),
        yaxis=log_axis("length ℒ (√nats)", values["length"], domain=[0.55, 1]),
        yaxis2=log_axis(cost, values["dissipation"], domain=[0, 0.45]),
    )
    said = ""
    if exponents:
        known = [h for a in audits if (h := a.headline.hurst) is not None]
        listed = (
            ", ".join(exponents)
            if len(exponents) <= _LISTED
            else " to ".join(dict.fromkeys(f"{end:.2f}" for end in (min(known), max(known))))
        )
        said = f" Exponent H (1: steady drift, ½: minibatch noise): {listed}."
    return Figure(
        "coarse-graining",
        "How much the sampling hides",
        "Length and dissipation as they would have been found from fewer snapshots. They can only "
        "fall as snapshots get "
        "sparser, so a run recorded sparsely gives lower bounds; curves still rising at the left "
        "end mean there is "
        f"more to see.{said}{drawn.sentence(audits)}",
        "Log-log charts of length and dissipation against the sampling stride, one line a run.",
        data,
        frame,
        520,
    )


def predicted_vs_realised(audits: Sequence[Audited]) -> Figure | None:
    """½a against the realised KL of each step, log axes, with the line on which they agree."""
    data: list[Spec] = []
    span = np.array([np.inf, -np.inf])
    drawn = crowd(audits)
    for i in drawn.order:
        audit, style = audits[i], drawn.looks[i]
        found = series.realised(audit)
        if found is None:
            continue
        step, predicted, measured = found
        both = np.concatenate([predicted, measured])
        span = np.array([min(span[0], both.min()), max(span[1], both.max())])
        trace = line(
            style,
            i,
            audit,
            predicted,
            measured,
            "step %{customdata}<br>predicted %{x:.3g} nats<br>realised %{y:.3g} nats",
            where="",
        )
        trace |= {"mode": "markers", "customdata": numbers(step)}
        trace["marker"] = {
            "color": f"@{style.colour}",
            "symbol": style.symbol,
            "size": 7,
            "opacity": 0.75,
        }
        data.append(behind(trace, style))
    if not data:
        return None
    diagonal = {
        "type": "scatter",
        "mode": "lines",
        "x": numbers(span),
        "y": numbers(span),
        "line": {"color": "@muted", "width": 1, "dash": "dash"},
        "hoverinfo": "skip",
    }
    frame = layout(
        xaxis=log_axis("predicted dissipation ½a (nats)", span),
        yaxis=log_axis("realised KL divergence (nats)", span),
    )
    return Figure(
        "predicted-vs-realised",
        f"Predicted and realised dissipation, {seen(audits)}",
        "Each point is an audited interval: the metric’s prediction against the Kullback–Leibler "
        "divergence really "
        f"measured. On the dashed line they agree.{drawn.sentence(audits)}",
        "Scatter chart of predicted dissipation against realised divergence, one point an "
        "interval.",
        [diagonal, *data],
        frame,
        420,
    )
