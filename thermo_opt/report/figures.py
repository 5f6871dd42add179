"""The page's figures as plotly.js specifications: plain dictionaries; writing a page needs no drawing library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from thermo_opt.audit.quantities import cost_unit, number, percent
from thermo_opt.audit.results import Audit
from thermo_opt.audit.words import LENS_WORDS
from thermo_opt.plots import series
from thermo_opt.plots.palette import PARTS, look
from thermo_opt.report.spec import Spec, axis, label, layout, line, log_axis, null, numbers


@dataclass(frozen=True)
class Figure:
    """One figure: ``key`` (its element id), title, caption, ``description`` to read aloud, and what plotly.js draws."""

    key: str
    title: str
    caption: str
    description: str
    data: list[Spec]
    layout: Spec
    height: int


def figures(audits: Sequence[Audit]) -> list[Figure]:
    """Every figure that these audits support, in reading order."""
    drawn = [
        decomposition(audits),
        loss_and_dissipation(audits),
        alignment(audits),
        trajectory_map(audits),
        coarse_graining(audits),
    ]
    drawn += [dissipation_heatmap(audits), predicted_vs_realised(audits)]
    return [figure for figure in drawn if figure is not None]


def decomposition(audits: Sequence[Audit]) -> Figure | None:
    """One stacked bar a run: Q = irreducible + detour + pacing (THEORY §4)."""
    rows = [(i, audit, lens.summary) for i, audit in enumerate(audits) if (lens := series.bar_lens(audit)) is not None]
    if not rows:
        return None
    data: list[Spec] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part.capitalize(),
            "x": [summary[part] for _, _, summary in rows],
            "y": list(range(len(rows))),
            "width": 0.42,
            "customdata": [
                [escape(audit.run), cost_unit(summary["clock"]), _share(summary, part)] for _, audit, summary in rows
            ],
            "hovertemplate": "<b>%{customdata[0]}</b><br>%{fullData.name}: "
            "%{x:.4g} %{customdata[1]} (%{customdata[2]})<extra></extra>",
            "marker": {
                "color": [f"@{look(i).colour}:{opacity}" for i, _, _ in rows],
                "line": {"width": 1, "color": [f"@{look(i).colour}" for i, _, _ in rows]},
            },
        }
        for part, opacity in PARTS.items()
    ]
    labels = [
        {
            "xref": "paper",
            "x": 0,
            "xanchor": "left",
            "xshift": -4,
            "y": row,
            "yanchor": "bottom",
            "yshift": 13,
            "showarrow": False,
            "align": "left",
            "font": {"size": 13},
            "text": f"{label(audit.run, 30)}  <b>{number(summary['dissipation'])}</b> {cost_unit(summary['clock'])}",
        }
        for row, (_, audit, summary) in enumerate(rows)
    ]
    return Figure(
        "decomposition",
        "Where the dissipation went",
        "Irreducible: what a straight path at constant speed would have cost. Detour: the price of a longer path. "
        "Pacing: the price of uneven speed. The three add up to the dissipation exactly.",
        "Stacked bars. "
        + "; ".join(
            f"{audit.run}: " + ", ".join(f"{p} {_share(summary, p)}" for p in PARTS) for _, audit, summary in rows
        ),
        data,
        layout(
            barmode="stack",
            annotations=labels,
            xaxis=axis(f"dissipation Q ({_units(audits)})", rangemode="tozero"),
            yaxis={"visible": False, "fixedrange": True, "range": [len(rows) - 0.55, -0.75]},
            margin={"l": 8, "r": 12, "t": 4, "b": 46},
        ),
        62 + 58 * len(rows),
    )


def loss_and_dissipation(audits: Sequence[Audit]) -> Figure | None:
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
            data.append(line(i, audit, step, spent, "dissipated so far %{y:.4g} " + unit) | {"yaxis": "y2"})
    if not data:
        return None
    frame = layout(
        xaxis=axis("training step", anchor="y2"),
        yaxis=axis("loss (nats / example)", domain=[0.55, 1]),
        yaxis2=axis(f"Q so far ({_units(audits)})", domain=[0, 0.45], rangemode="tozero"),
    )
    measured = " and ".join(
        {"probe": "on the probe set", "training": "as logged in training"}[s] for s in sorted(sources)
    )
    return Figure(
        "loss-and-dissipation",
        "Loss and dissipation along the training",
        f"Above: the loss, {measured}. Below: the dissipation spent up to each step. A steep stretch below, "
        "under a flat one above, is cost that bought little."
        if measured
        else "The dissipation spent up to each step.",
        "Line charts of the loss and of the cumulative dissipation against the training step, one line a run.",
        data,
        frame,
        520,
    )


def alignment(audits: Sequence[Audit]) -> Figure | None:
    """ε over steps: a band where only a bracket is known, a line where a value or a lower bound is (THEORY §3, §5)."""
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
                i, audit, found.step, middle, "alignment between %{customdata[0]:.3f} and %{customdata[1]:.3f}"
            )
            trace["customdata"] = [[float(lo), float(up)] for lo, up in zip(found.lower, found.upper, strict=True)]
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
        "The share of each step’s dissipation that bought first-order decrease of the loss: 1 for the natural gradient "
        f"itself, negative uphill. {' '.join(kinds)}",
        "Line chart of the alignment of each step with the natural gradient, one line or band a run.",
        data,
        frame,
        360,
    )


_ALIGNMENT_WORDS = {
    "bracket": "Bands: certified from below and above, from {lens}.",
    "value": "Lines: from {lens}.",
    "lower bound": "Lines: certified lower bounds, from {lens}.",
}


def trajectory_map(audits: Sequence[Audit]) -> Figure | None:
    """Recorded predictions of the runs on one plane (`manifold.trajectory_map`)."""
    found = series.trajectory_series(audits)
    if found is None:
        return None
    data: list[Spec] = []
    for path in found.trajectories:
        style = look(path.index)
        shape = [style.symbol + "-open"] + ["circle"] * (len(path.step) - 2) + [style.symbol]
        size = [11] + [4] * (len(path.step) - 2) + [11]
        trace = line(
            path.index,
            audits[path.index],
            path.xy[:, 0],
            path.xy[:, 1],
            "step %{customdata[0]}<br>loss %{customdata[1]:.4g} nats",
            where="",
        )
        trace |= {
            "mode": "lines+markers",
            "customdata": [[int(s), null(loss)] for s, loss in zip(path.step, path.loss, strict=True)],
            "marker": {
                "color": f"@{style.colour}",
                "symbol": shape,
                "size": size,
                "opacity": 1,
                "line": {"width": 2, "color": f"@{style.colour}"},
            },
        }
        data.append(trace)
    frame = layout(
        xaxis=axis("first intensive component"),
        yaxis=axis("second intensive component", scaleanchor="x", scaleratio=1),
    )
    left_out = f" Not drawn, recorded on another probe: {', '.join(found.left_out)}." if found.left_out else ""
    return Figure(
        "trajectory-map",
        "The paths, in the space of predictions",
        "Each point is a recorded set of predictions; points far apart are easy to tell apart (intensive principal "
        "components). Open markers: start. Large filled markers: end. "
        f"The plane shows {percent(found.explained)} of the spread.{left_out}",
        "Map of each run's path through the space of predictions, in two dimensions.",
        data,
        frame,
        480,
    )


def coarse_graining(audits: Sequence[Audit]) -> Figure | None:
    """ℒ_m and Q_m against the sampling stride, log axes (THEORY §4)."""
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
            trace = line(i, audit, steps, table[column].to_numpy(dtype=np.float64), words, where="every %{x:.4g} steps")
            trace |= {"mode": "lines+markers", "yaxis": panel}
            trace["marker"] = {"color": f"@{style.colour}", "symbol": style.symbol, "size": 6}
            data.append(trace)
        if audit.headline.hurst is not None:
            exponents.append(f"{audit.run} {audit.headline.hurst:.2f}")
    if not data:
        return None
    drawn = {key: np.concatenate([table[key] for table in tables]) for key in ("stride_steps", "length", "dissipation")}
    frame = layout(
        xaxis=log_axis("sampling stride (optimizer steps)", drawn["stride_steps"], anchor="y2"),
        yaxis=log_axis("length ℒ (√nats)", drawn["length"], domain=[0.55, 1]),
        yaxis2=log_axis(f"dissipation Q ({_units(audits)})", drawn["dissipation"], domain=[0, 0.45]),
    )
    said = f" Exponent H (1: steady drift, ½: minibatch noise): {', '.join(exponents)}." if exponents else ""
    return Figure(
        "coarse-graining",
        "How much the sampling hides",
        "Length and dissipation as they would have been found from fewer snapshots. They can only fall as snapshots get "
        "sparser, so a run recorded sparsely gives lower bounds; curves still rising at the left end mean there is "
        f"more to see.{said}",
        "Log-log charts of length and dissipation against the sampling stride, one line a run.",
        data,
        frame,
        520,
    )


def dissipation_heatmap(audits: Sequence[Audit]) -> Figure | None:
    """Layers × steps, a panel a run: each layer's part δ_lᵀ(Fδ)_l of the dissipation on one logarithmic colour scale."""
    panels = [
        (audit, found) for audit in audits if (found := series.heat(audit)) is not None and (found.values > 0).any()
    ]
    if not panels:
        return None
    positive = np.concatenate([found.values[found.values > 0] for _, found in panels])
    top = float(np.log10(positive.max()))
    bottom = max(float(np.log10(positive.min())), top - 6)
    heights = [_PANEL_TITLE + _LAYER * len(found.layers) for _, found in panels]
    total = sum(heights)
    data: list[Spec] = []
    frame = layout(margin={"l": 8, "r": 12, "t": 62, "b": 46}, annotations=[])
    ceiling = 1.0
    for n, ((audit, found), height) in enumerate(zip(panels, heights, strict=True), start=1):
        suffix = "" if n == 1 else str(n)
        unit = cost_unit(audit.summary["clock"])
        floor = max(ceiling - height / total, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            exponent = np.log10(np.where(found.values > 0, found.values, np.nan))
        data.append(
            {
                "type": "heatmap",
                "x": numbers(found.step),
                "y": list(range(len(found.layers))),
                "z": [numbers(row) for row in exponent],
                "customdata": [
                    [[escape(layer), float(v)] for v in row]
                    for layer, row in zip(found.layers, found.values, strict=True)
                ],
                "hovertemplate": "<b>%{customdata[0]}</b><br>step %{x}<br>%{customdata[1]:.4g} "
                + unit
                + "<extra></extra>",
                "coloraxis": "coloraxis",
                "yaxis": f"y{suffix}",
            }
        )
        frame[f"yaxis{suffix}"] = axis(
            "",
            domain=[floor, ceiling - _PANEL_TITLE / total],
            tickvals=list(range(len(found.layers))),
            ticktext=[label(layer, 22) for layer in found.layers],
            autorange="reversed",
            showgrid=False,
        )
        frame["annotations"].append(
            {
                "text": label(audit.run, 30),
                "xref": "paper",
                "x": 0,
                "xanchor": "left",
                "yref": "paper",
                "y": ceiling - _PANEL_TITLE / total,
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 13},
            }
        )
        ceiling = floor
    frame["xaxis"] = axis("training step", anchor=f"y{len(panels) if len(panels) > 1 else ''}", showgrid=False)
    ticks = np.arange(np.ceil(bottom), np.floor(top) + 1)
    frame["coloraxis"] = {
        "cmin": bottom,
        "cmax": top,
        "colorscale": "Viridis",
        "colorbar": {
            "orientation": "h",
            "y": 1.0,
            "yanchor": "bottom",
            "thickness": 10,
            "len": 1,
            "outlinewidth": 0,
            "tickvals": numbers(ticks),
            "ticktext": [number(10.0**t, 1) for t in ticks],
            "title": {
                "text": f"dissipation of an interval ({_units(audits)})",
                "side": "top",
                "font": {"size": 13},
            },
        },
    }
    return Figure(
        "dissipation-heatmap",
        "Which layers dissipated, and when",
        "Each interval’s dissipation by layer; the layers sum to the whole. Blank where a layer’s part is not positive: its "
        "motion cancelled that of others.",
        f"Heat map of dissipation by layer and training step of {', '.join(audit.run for audit, _ in panels)}.",
        data,
        frame,
        108 + total,
    )


_PANEL_TITLE, _LAYER = 30, 22
"""Heights in pixels of a heat map panel's title and of a layer's row."""


def predicted_vs_realised(audits: Sequence[Audit]) -> Figure | None:
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
        trace["marker"] = {"color": f"@{style.colour}", "symbol": style.symbol, "size": 7, "opacity": 0.75}
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
        "Each point is an audited interval: the metric’s prediction against the Kullback–Leibler divergence really "
        "measured. On the dashed line they agree.",
        "Scatter chart of predicted dissipation against realised divergence, one point an interval.",
        [diagonal, *data],
        frame,
        420,
    )


def _share(summary: dict[str, Any], part: str) -> str:
    return percent(summary[part] / summary["dissipation"]) if summary["dissipation"] else "0\u00a0%"


def _units(audits: Sequence[Audit]) -> str:
    return " or ".join(sorted({cost_unit(audit.summary["clock"]) for audit in audits}))
