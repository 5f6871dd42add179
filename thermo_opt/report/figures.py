"""The page's figures as plotly.js specifications, plain dictionaries: those along the training are
made here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from thermo_opt.describe.quantities import cost_unit
from thermo_opt.describe.sentences import LENS_WORDS
from thermo_opt.lenses.results import Audited
from thermo_opt.plots import series
from thermo_opt.plots.palette import look
from thermo_opt.report.maps import decomposition, dissipation_heatmap, trajectory_map
from thermo_opt.report.spec import Figure, Spec, axis, layout, line, log_axis, numbers, units
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
    drawn.append(critical_batch(audits))
    drawn += [dissipation_heatmap(audits), predicted_vs_realised(audits)]
    return [figure for figure in drawn if figure is not None]


def loss_and_dissipation(audits: Sequence[Audited]) -> Figure | None:
    """Loss above, dissipation spent so far below, against the training step."""
    data: list[Spec] = []
    sources = set()
    for i, audit in enumerate(audits):
        step, loss, source = series.loss_curve(audit)
        if len(step):
            sources.add(source)
            data.append(line(i, audit, step, loss, "loss %{y:.4g} nats"))
        step, spent = series.cumulative_dissipation(audit.headline)
        if len(step):
            unit = cost_unit(audit.summary["clock"])
            data.append(
                line(i, audit, step, spent, "dissipated so far %{y:.4g} " + unit) | {"yaxis": "y2"}
            )
    if not data:
        return None
    frame = layout(
        xaxis=axis("training step", anchor="y2"),
        yaxis=axis("loss (nats / example)", domain=[0.55, 1]),
        yaxis2=axis(f"Q so far ({units(audits)})", domain=[0, 0.45], rangemode="tozero"),
    )
    measured = " and ".join(
        {"probe": "on the probe set", "training": "as logged in training"}[s]
        for s in sorted(sources)
    )
    return Figure(
        "loss-and-dissipation",
        "Loss and dissipation along the training",
        f"Above: the loss, {measured}. Below: the dissipation spent up to each step. A steep "
        "stretch below, "
        "under a flat one above, is cost that bought little."
        if measured
        else "The dissipation spent up to each step.",
        "Line charts of the loss and of the cumulative dissipation against the training step, one "
        "line a run.",
        data,
        frame,
        520,
    )


def alignment(audits: Sequence[Audited]) -> Figure | None:
    """ε over steps: a band where only a bracket is known, a line where a value or a lower bound is
    (theory §3, §5)."""
    data: list[Spec] = []
    kinds: dict[str, None] = {}
    for i, audit in enumerate(audits):
        found = series.alignment_series(audit)
        if found is None:
            continue
        kinds[_ALIGNMENT_WORDS[found.kind].format(lens=LENS_WORDS[found.lens])] = None
        colour = look(i).colour
        if found.kind == "bracket":
            outline = {
                "type": "scatter",
                "mode": "lines",
                "x": numbers(np.concatenate([found.step, found.step[::-1]])),
                "y": numbers(np.concatenate([found.upper, found.lower[::-1]])),
                "fill": "toself",
                "fillcolor": f"@{colour}:0.25",
                "line": {"width": 0, "color": f"@{colour}"},
                "hoverinfo": "skip",
                "name": escape(audit.run),
                "meta": {"run": i},
            }
            data.append(outline)
            middle = (found.lower + found.upper) / 2
            trace = line(
                i,
                audit,
                found.step,
                middle,
                "alignment between %{customdata[0]:.3f} and %{customdata[1]:.3f}",
            )
            trace["customdata"] = [
                [float(lo), float(up)] for lo, up in zip(found.lower, found.upper, strict=True)
            ]
        else:
            word = "alignment" if found.kind == "value" else "alignment at least"
            trace = line(i, audit, found.step, found.lower, word + " %{y:.3f}")
        data.append(trace)
    if not data:
        return None
    frame = layout(xaxis=axis("training step"), yaxis=axis("alignment ε", zeroline=True))
    return Figure(
        "alignment",
        "Alignment with the natural gradient",
        "The share of each step’s dissipation that bought first-order decrease of the loss: 1 for "
        "the natural gradient "
        f"itself, negative uphill. {' '.join(kinds)}",
        "Line chart of the alignment of each step with the natural gradient, one line or band a "
        "run.",
        data,
        frame,
        360,
    )


_ALIGNMENT_WORDS = {
    "bracket": "Bands: certified from below and above, from {lens}.",
    "value": "Lines: from {lens}.",
    "lower bound": "Lines: certified lower bounds, from {lens}.",
}


def coarse_graining(audits: Sequence[Audited]) -> Figure | None:
    """ℒ_m and Q_m against the sampling stride, log axes (theory §4)."""
    data: list[Spec] = []
    exponents = []
    tables = []
    for i, audit in enumerate(audits):
        table = series.coarse_curves(audit.headline)
        if len(table) < 2:
            continue
        tables.append(table)
        steps = table["stride_steps"].to_numpy(dtype=np.float64)
        for column, panel, words in (
            ("length", "y", "length %{y:.4g} √nats"),
            ("dissipation", "y2", "dissipation %{y:.4g} " + cost_unit(audit.summary["clock"])),
        ):
            style = look(i)
            trace = line(
                i,
                audit,
                steps,
                table[column].to_numpy(dtype=np.float64),
                words,
                where="every %{x:.4g} steps",
            )
            trace |= {"mode": "lines+markers", "yaxis": panel}
            trace["marker"] = {"color": f"@{style.colour}", "symbol": style.symbol, "size": 6}
            data.append(trace)
        if audit.headline.hurst is not None:
            exponents.append(f"{audit.run} {audit.headline.hurst:.2f}")
    if not data:
        return None
    drawn = {
        key: np.concatenate([table[key] for table in tables])
        for key in ("stride_steps", "length", "dissipation")
    }
    frame = layout(
        xaxis=log_axis("sampling stride (optimizer steps)", drawn["stride_steps"], anchor="y2"),
        yaxis=log_axis("length ℒ (√nats)", drawn["length"], domain=[0.55, 1]),
        yaxis2=log_axis(f"dissipation Q ({units(audits)})", drawn["dissipation"], domain=[0, 0.45]),
    )
    said = (
        f" Exponent H (1: steady drift, ½: minibatch noise): {', '.join(exponents)}."
        if exponents
        else ""
    )
    return Figure(
        "coarse-graining",
        "How much the sampling hides",
        "Length and dissipation as they would have been found from fewer snapshots. They can only "
        "fall as snapshots get "
        "sparser, so a run recorded sparsely gives lower bounds; curves still rising at the left "
        "end mean there is "
        f"more to see.{said}",
        "Log-log charts of length and dissipation against the sampling stride, one line a run.",
        data,
        frame,
        520,
    )


def predicted_vs_realised(audits: Sequence[Audited]) -> Figure | None:
    """½a against the realised KL of each step, log axes, with the line on which they agree."""
    data: list[Spec] = []
    span = np.array([np.inf, -np.inf])
    for i, audit in enumerate(audits):
        found = series.realised(audit)
        if found is None:
            continue
        step, predicted, measured = found
        both = np.concatenate([predicted, measured])
        span = np.array([min(span[0], both.min()), max(span[1], both.max())])
        style = look(i)
        trace = line(
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
        data.append(trace)
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
        "Predicted and realised dissipation",
        "Each point is an audited interval: the metric’s prediction against the Kullback–Leibler "
        "divergence really "
        "measured. On the dashed line they agree.",
        "Scatter chart of predicted dissipation against realised divergence, one point an "
        "interval.",
        [diagonal, *data],
        frame,
        420,
    )
