"""The page's figures of noise apart from progress (theory §11), as plotly.js specifications."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from thermo_opt.describe.quantities import number
from thermo_opt.lenses.results import Audited
from thermo_opt.plots.crowd import crowd
from thermo_opt.plots.split import OPACITY, batch_size, estimates, parts, split_of
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
)


def split_bars(audits: Sequence[Audited]) -> Figure | None:
    """One stacked bar a run: transport, housekeeping and noise."""
    rows = [(i, a, s) for i, a in enumerate(audits) if (s := split_of(a)) is not None]
    if not rows:
        return None
    data: list[Spec] = []
    looks = crowd(audits).looks
    for part in OPACITY:
        own = [
            (row, i, a, parts(s)[part]) for row, (i, a, s) in enumerate(rows) if part in parts(s)
        ]
        if not own:
            continue
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": part.capitalize(),
                "x": [max(value, 0.0) for _, _, _, (value, _) in own],
                "y": [row for row, _, _, _ in own],
                "width": 0.42,
                "customdata": [
                    [escape(a.run), number(value), number(error, 2)]
                    for _, _, a, (value, error) in own
                ],
                "hovertemplate": "<b>%{customdata[0]}</b><br>%{fullData.name}: %{customdata[1]} "
                "± %{customdata[2]} nats<extra></extra>",
                "marker": {
                    "color": [f"@{looks[i].colour}:{OPACITY[part]}" for _, i, _, _ in own],
                    "line": {"width": 1, "color": [f"@{looks[i].colour}" for _, i, _, _ in own]},
                },
            }
        )
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
            "text": f"{label(a.run, 30)}  <b>{number((s.noise or 0) + (s.drift or 0))}</b> nats",
        }
        for row, (_, a, s) in enumerate(rows)
    ]
    return Figure(
        "split",
        "Noise apart from progress",
        "Darkest: transport, what went somewhere. Middle: housekeeping, what undid earlier noise "
        "(or all drift, where the two can’t be told apart). Lightest: noise, what minibatches "
        "scattered. From replica steps, with standard errors under the pointer.",
        "Stacked bars. "
        + "; ".join(
            f"{a.run}: "
            + ", ".join(f"{k} {number(v)} ± {number(e, 2)}" for k, (v, e) in parts(s).items())
            for _, a, s in rows
        ),
        data,
        layout(
            barmode="stack",
            annotations=labels,
            xaxis=axis("dissipation (nats, clock step)", rangemode="tozero"),
            yaxis={"visible": False, "fixedrange": True, "range": [len(rows) - 0.55, -0.75]},
            margin={"l": 8, "r": 12, "t": 4, "b": 46},
        ),
        62 + 58 * len(rows),
    )


def critical_batch(audits: Sequence[Audited]) -> Figure | None:
    """B* along the runs, with the batch sizes used."""
    data: list[Spec] = []
    values: list[np.ndarray] = []
    drawn = crowd(audits)
    for i in drawn.order:
        audit, style = audits[i], drawn.looks[i]
        split = split_of(audit)
        if split is None or split.critical.empty:
            continue
        middle, value, error = estimates(split.critical, "critical_batch")
        if not len(middle):
            continue
        trace = line(style, i, audit, middle, value, "B* %{y:.3g} ± %{customdata:.2g}")
        trace |= {"mode": "lines+markers", "customdata": numbers(error)}
        trace["marker"] = {"color": f"@{style.colour}", "symbol": style.symbol, "size": 7}
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": numbers(error),
            "arrayminus": numbers(np.minimum(error, 0.9 * value)),
            "color": f"@{style.colour}",
            "thickness": 1,
        }
        data.append(behind(trace, style))
        values += [value, value + error]
        used = batch_size(audit)
        if used:
            ends = np.array([split.critical["step"].min(), split.critical["step_end"].max()])
            flat = line(style, i, audit, ends, np.full(2, used), "batch size %{y}", where="")
            flat["line"] = flat["line"] | {"width": 1, "dash": "dot"}
            data.append(flat)
            values.append(np.array([used]))
    if not data:
        return None
    return Figure(
        "critical-batch",
        "Critical batch size",
        "Where noise would cost as much as drift. A run far below it (dotted: the batch size "
        "used) would need fewer steps with larger batches at hardly more examples; one far above "
        f"it spends examples for few steps.{drawn.sentence(audits)}",
        "Line chart of the critical batch size against the training step, one line a run.",
        data,
        layout(
            xaxis=axis("training step"),
            yaxis=log_axis("B* (loss terms)", np.concatenate(values)),
        ),
        360,
    )
