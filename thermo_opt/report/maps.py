"""Figures of where, as plotly.js specifications: the decomposition's bars, the trajectory map, the
heat map of layers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from thermo_opt.describe.quantities import cost_unit, number, percent, time_of
from thermo_opt.describe.sentences import seen
from thermo_opt.describe.standing import with_standing
from thermo_opt.lenses.results import Audited
from thermo_opt.plots import series
from thermo_opt.plots.crowd import crowd
from thermo_opt.plots.maps import intervals_words
from thermo_opt.plots.palette import PARTS
from thermo_opt.report.spec import (
    Figure,
    Spec,
    axis,
    behind,
    label,
    layout,
    line,
    null,
    numbers,
    panel_title,
    units,
)


def decomposition(audits: Sequence[Audited]) -> Figure | None:
    """One stacked bar a run: Q = irreducible + detour + pacing (theory §4)."""
    rows = [
        (i, audit, lens.summary)
        for i, audit in enumerate(audits)
        if (lens := series.bar_lens(audit)) is not None
    ]
    if not rows:
        return None
    looks = crowd(audits).looks
    data: list[Spec] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part.capitalize(),
            "x": [summary[part] for _, _, summary in rows],
            "y": list(range(len(rows))),
            "width": 0.42,
            "customdata": [
                [
                    escape(audit.run),
                    f"{with_standing(summary, part)} {cost_unit(time_of(summary))}",
                    _share(summary, part),
                ]
                for _, audit, summary in rows
            ],
            "hovertemplate": "<b>%{customdata[0]}</b><br>%{fullData.name}: "
            "%{customdata[1]} (%{customdata[2]})<extra></extra>",
            "marker": {
                "color": [f"@{looks[i].colour}:{opacity}" for i, _, _ in rows],
                "line": {"width": 1, "color": [f"@{looks[i].colour}" for i, _, _ in rows]},
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
            "text": (
                f"{label(audit.run, 30)}  <b>{with_standing(summary, 'dissipation')}</b> "
                f"{cost_unit(time_of(summary))}"
            ),
        }
        for row, (_, audit, summary) in enumerate(rows)
    ]
    sparse = "" if all(s["every_step"] for _, _, s in rows) else _SPARSE
    return Figure(
        "decomposition",
        f"Where the dissipation went, {seen(audits)}",
        "Irreducible: what a straight path at constant speed would have cost. Detour: the price of "
        "a longer path. "
        f"Pacing: the price of uneven speed. The three add up to the dissipation exactly.{sparse}",
        "Stacked bars. "
        + "; ".join(
            f"{audit.run}: " + ", ".join(f"{p} {_share(summary, p)}" for p in PARTS)
            for _, audit, summary in rows
        ),
        data,
        layout(
            barmode="stack",
            annotations=labels,
            xaxis=axis(f"dissipation Q ({units(audits)})", rangemode="tozero"),
            yaxis={"visible": False, "fixedrange": True, "range": [len(rows) - 0.55, -0.75]},
            margin={"l": 8, "r": 12, "t": 4, "b": 46},
        ),
        62 + 58 * len(rows),
    )


def trajectory_map(audits: Sequence[Audited]) -> Figure | None:
    """Recorded predictions of the runs on one plane (`manifold.trajectory_map`)."""
    found = series.trajectory_series(audits)
    if found is None:
        return None
    data: list[Spec] = []
    drawn = crowd(audits)
    paths = {path.index: path for path in found.trajectories}
    for path in (paths[i] for i in drawn.order if i in paths):
        style = drawn.looks[path.index]
        shape = [style.symbol + "-open"] + ["circle"] * (len(path.step) - 2) + [style.symbol]
        between, end = (0, 6) if style.recedes else (4, 11)
        size = [end] + [between] * (len(path.step) - 2) + [end]
        trace = line(
            style,
            path.index,
            audits[path.index],
            path.xy[:, 0],
            path.xy[:, 1],
            "step %{customdata[0]}<br>loss %{customdata[1]:.4g} nats",
            where="",
        )
        trace |= {
            "mode": "lines+markers",
            "customdata": [
                [int(s), null(loss)] for s, loss in zip(path.step, path.loss, strict=True)
            ],
            "marker": {
                "color": f"@{style.colour}",
                "symbol": shape,
                "size": size,
                "opacity": 1,
                "line": {"width": 2, "color": f"@{style.colour}"},
            },
        }
        data.append(behind(trace, style))
    frame = layout(
        xaxis=axis("first intensive component"),
        yaxis=axis("second intensive component", scaleanchor="x", scaleratio=1),
    )
    left_out = (
        f" Not drawn, recorded on another probe: {', '.join(found.left_out)}."
        if found.left_out
        else ""
    )
    return Figure(
        "trajectory-map",
        f"The paths, in the space of predictions, {seen(audits)}",
        "Each point is a recorded set of predictions; points far apart are easy to tell apart "
        "(intensive principal "
        "components). Open markers: start. Large filled markers: end. "
        f"The plane shows {percent(found.explained)} of the spread."
        f"{left_out}{drawn.sentence(audits)}",
        "Map of each run's path through the space of predictions, in two dimensions.",
        data,
        frame,
        480,
    )


def dissipation_heatmap(audits: Sequence[Audited]) -> Figure | None:
    """Layers × steps, a panel a run: each layer's part δ_lᵀ(Fδ)_l of the dissipation on one
    logarithmic colour scale."""
    known = [
        (audit, found)
        for audit in audits
        if (found := series.heat(audit)) is not None and (found.values > 0).any()
    ]
    if not known:
        return None
    panels = known[: series.MAX_MAPS]
    columns = list(dict.fromkeys(intervals_words(audit) for audit, _ in panels))
    more = f" Shown: {len(panels)} of {len(known)} runs." if len(panels) < len(known) else ""
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
        unit = cost_unit(time_of(audit.summary))
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
            panel_title(label(audit.run, 34), ceiling - _PANEL_TITLE / total)
        )
        ceiling = floor
    frame["xaxis"] = axis(
        series.along([audit for audit, _ in panels]),
        anchor=f"y{len(panels) if len(panels) > 1 else ''}",
        showgrid=False,
    )
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
                "text": f"dissipation of an interval ({units(audits)})",
                "side": "top",
                "font": {"size": 13},
            },
        },
    }
    return Figure(
        "dissipation-heatmap",
        f"Which layers dissipated, and when, {seen(audits)}",
        "Each interval’s dissipation by layer; the layers sum to the whole. Blank where a layer’s "
        "part is not positive: its "
        f"motion cancelled that of others. Columns: {' or '.join(columns)}.{more}",
        "Heat map of dissipation by layer and training step of "
        f"{', '.join(audit.run for audit, _ in panels)}.",
        data,
        frame,
        108 + total,
    )


_PANEL_TITLE, _LAYER = 30, 22
"""Heights in pixels of a heat map panel's title and of a layer's row."""


_SPARSE = (
    " Where not every step was seen, these are the parts of what was: the dissipation and its "
    "detour are at least so large."
)


def _share(summary: dict[str, Any], part: str) -> str:
    """A part's share of the dissipation; of what was seen of it, where that is a bound."""
    share = summary[part] / summary["dissipation"] if summary["dissipation"] else 0.0
    return percent(share) + ("" if summary["every_step"] else " of what is seen")
