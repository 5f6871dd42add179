"""A speed-cost front as a page: one figure a target, the runs' table, how to read both; one file
that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from thermo_opt.describe.quantities import DURATION_UNITS, cost_unit, number, percent
from thermo_opt.plots.front import Front, FrontTarget, contours, cost_label, window
from thermo_opt.plots.palette import look
from thermo_opt.report.page import render_template
from thermo_opt.report.spec import Figure, Spec, layout, log_axis, numbers
from thermo_opt.writing import write_whole


def write_front(
    front: Front, path: str | PathLike[str], left_out: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write the front's page to ``path`` (by rename) and return the path; `InputError` when it
    can't be written. ``left_out``: (run, reason) of the runs that have no line."""
    return write_whole(path, render_front(front, left_out))


def render_front(front: Front, left_out: Sequence[tuple[str, str]] = ()) -> str:
    """The page as a string; everything that came from a run is escaped."""
    drawn = [_figure(front, target, index) for index, target in enumerate(front.targets)]
    looks = [{"name": group, "index": i, "look": look(i)} for i, group in enumerate(front.groups)]
    return render_template(
        "front.html.j2",
        drawn,
        front.to_json(left_out=left_out),
        left_out=left_out,
        title=f"Speed and cost of {len(front.table) // len(front.targets)} training runs",
        lead=" ".join(sentences(front)),
        groups=looks,
        unit=DURATION_UNITS[front.counted_in],
        cost=cost_unit(front.counted_in),
        rows=_rows(front),
    )


def sentences(front: Front) -> list[str]:
    """The front in words, a sentence a target, and how runs of different starts were made
    comparable."""
    said = []
    for target in front.targets:
        best = front.front(target.target_loss)
        rows = front.rows(target.target_loss)
        missed = int(rows["censored"].sum())
        names = ", ".join(best["run"].iloc[:4]) + (
            f" and {len(best) - 4} more" if len(best) > 4 else ""
        )
        alone = len(best) == 1
        whole = rows["every_step"].all()
        share = f"{'' if whole else 'about '}{percent(target.coverage)}"
        late = f"{missed} of {len(rows)} runs {'never' if whole else 'are not seen to'} reach it"
        said.append(
            f"To reach loss {number(target.target_loss)}, "
            f"{'' if whole else 'at the snapshots that are seen, '}"
            f"{'no other run is' if alone else 'no run is'} both faster and "
            f"cheaper than {names}: {'it dominates' if alone else 'together they dominate'} "
            f"{share} of "
            "what the universal frontier leaves possible" + (f"; {late}." if missed else ".")
        )
    if not all(target.same_start for target in front.targets):
        said.append(
            "The runs start from different predictions, so each one’s dissipation is scaled by its "
            "own D*²."
        )
    return [*said, *front.notes]


def costs(row: Mapping[Any, Any]) -> list[str]:
    """Time, dissipation, least distance and efficiency of a table's row as a person reads them:
    "≈" before what is read between snapshots several steps apart, ">" where the run ended first.

    A loss may fall faster than on the straight line between two snapshots, or have met the target
    and left it again: time and dissipation up to the first meeting have no known side then.
    """
    least = number(row["least_distance"])
    whole = row["every_step"]
    if row["censored"]:
        ends = [number(row[key], toward="down") for key in ("duration", "dissipation_total")]
        return [f"> {ends[0]}", f"> {ends[1]}", least, "–"] if whole else ["–", "–", least, "–"]
    about = "" if whole else "≈ "
    time, spent = (f"{about}{number(row[key])}" for key in ("time", "dissipation"))
    return [time, spent, least, f"{about}{percent(row['efficiency'])}"]


def _figure(front: Front, target: FrontTarget, position: int) -> Figure:
    span_x, span_y = window(front, target)
    time, floor = np.geomspace(span_x[0] / 1.2, span_x[1] * 1.2, 120), span_y[0] / 1.2
    edge = target.least_dissipation(time)
    data: list[Spec] = [
        _line(time, np.full_like(time, floor), "@muted:0"),
        _line(
            time,
            np.maximum(edge, floor),
            "@text",
            dash="dash",
            fill="tonexty",
            fillcolor="@muted:0.18",
        ),
    ]
    for efficiency in contours(target, span_x, span_y):
        words = f"efficiency {percent(efficiency)}"
        line = _line(time, target.least_dissipation(time, efficiency), "@rule", width=1)
        data.append(line | {"hoverinfo": "text", "text": words})
    rows = front.rows(target.target_loss)
    hulls = front.hulls(target.target_loss)
    for index, group in enumerate(front.groups):
        own = rows[(rows["group"] == group) & ~rows["censored"]]
        if own.empty:
            continue
        style = look(index)
        corners = hulls[group]
        if len(corners) > 1:
            closed = np.vstack([corners, corners[:1]])
            colour = f"@{style.colour}:0.35"
            filled = _line(
                closed[:, 0],
                closed[:, 1],
                colour,
                width=1,
                fill="toself",
                fillcolor=f"@{style.colour}:0.13",
            )
            data.append(filled | {"meta": {"run": index}})
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(group),
                "meta": {"run": index},
                "x": numbers(own["time"]),
                "y": numbers(own["dissipation_scaled"]),
                "customdata": [
                    [escape(str(row["run"])), *costs(row)[1::2]] for row in own.to_dict("records")
                ],
                "marker": {"color": f"@{style.colour}", "symbol": style.symbol, "size": 9},
                "hovertemplate": "<b>%{customdata[0]}</b> (%{fullData.name})<br>after %{x:.4g} "
                f"{DURATION_UNITS[front.counted_in]}<br>"
                f"Q %{{customdata[1]}} {cost_unit(front.counted_in)}"
                "<br>efficiency %{customdata[2]}<extra></extra>",
            }
        )
    best = front.front(target.target_loss)
    steps = _line(best["time"].to_numpy(), best["dissipation_scaled"].to_numpy(), "@text", width=2)
    steps["line"]["shape"] = "hv"
    data.append(steps)
    frame = layout(
        xaxis=log_axis(f"time to reach it ({DURATION_UNITS[front.counted_in]})", np.array(span_x)),
        yaxis=log_axis(cost_label(front, target), np.array(span_y)),
    )
    words = f"loss {number(target.target_loss)}"
    return Figure(
        f"front-{position}",
        f"The cost of reaching {words}",
        "Each point is a run: lower is cheaper, further left is faster. Black steps: the runs that "
        "no other beats. Dashed: "
        "the universal frontier Q·T = D*²/2; no optimizer and no architecture can be in the shade "
        "below it. Grey lines "
        "join points of equal efficiency. Tinted: what each group spans.",
        f"Scatter chart on logarithmic axes of time and dissipation to {words}. On the front: "
        f"{', '.join(best['run'])}.",
        data,
        frame,
        460,
    )


def _line(
    x: np.ndarray, y: np.ndarray, colour: str, width: float = 1.5, dash: str = "solid", **more: Any
) -> Spec:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": numbers(x),
        "y": numbers(y),
        "line": {"color": colour, "width": width, "dash": dash},
        "hoverinfo": "skip",
        **more,
    }


def _rows(front: Front) -> list[dict[str, Any]]:
    """The table: targets in order, within each the runs by time, those that never reach it last."""
    rows = []
    for target in front.targets:
        ordered = front.rows(target.target_loss).sort_values(
            "time", kind="stable", na_position="last"
        )
        for row in ordered.to_dict("records"):
            rows.append(
                {
                    "run": row["run"],
                    "group": row["group"],
                    "on_front": row["on_front"],
                    "cells": [
                        number(row["target_loss"]),
                        *costs(row),
                        number(row["lowest_loss"]),
                        number(row["stride"]),
                    ],
                }
            )
    return rows
