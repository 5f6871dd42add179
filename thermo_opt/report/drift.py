"""A front on drift as a page: drift and, beside it, noise of each run; the table; how to read both
(§11)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from thermo_opt.arguments import jsonable
from thermo_opt.describe.quantities import DURATION_UNITS, number
from thermo_opt.describe.split import with_error
from thermo_opt.lenses.results import SCHEMA_VERSION
from thermo_opt.plots.drift import scattered
from thermo_opt.plots.palette import look
from thermo_opt.report.page import render_template
from thermo_opt.report.spec import Figure, Spec, layout, log_axis, numbers
from thermo_opt.writing import write_whole


def write_drift_front(
    table: pd.DataFrame, path: str | PathLike[str], left_out: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write the page of a front on drift, one file that opens offline, and return its path.

    Args:
        table: What `thermo_opt.fronts.drift_front` gives.
        path: Where to write it, by rename.
        left_out: (run, reason) of the runs that could not be used.

    Raises:
        InputError: When it can't be written there.
    """
    return write_whole(path, render_drift_front(table, left_out))


def render_drift_front(table: pd.DataFrame, left_out: Sequence[tuple[str, str]] = ()) -> str:
    """The page as a string; everything that came from a run is escaped."""
    targets = list(dict.fromkeys(table["target_loss"]))
    groups = list(dict.fromkeys(table["group"]))
    drawn = [_figure(table, target, groups, index) for index, target in enumerate(targets)]
    return render_template(
        "drift.html.j2",
        [figure for figure in drawn if figure is not None],
        drift_json(table, left_out),
        left_out=left_out,
        title=f"Speed and drift of {len(table) // len(targets)} training runs",
        lead=" ".join(drift_sentences(table)),
        groups=[{"name": str(g), "index": i, "look": look(i)} for i, g in enumerate(groups)],
        unit=DURATION_UNITS[table.attrs["clock"]],
        rows=_rows(table),
    )


def drift_json(table: pd.DataFrame, left_out: Sequence[tuple[str, str]] = ()) -> str:
    """A front on drift as strict JSON: ``schema_version, x, clock, notes, runs, left_out``, null
    for NaN; ``left_out``: (run, reason) of the runs that could not be used."""
    return json.dumps(
        {
            "schema_version": SCHEMA_VERSION,
            "x": table.attrs["x"],
            "clock": table.attrs["clock"],
            "notes": table.attrs["notes"],
            "runs": [jsonable(row) for row in table.to_dict("records")],
            "left_out": [{"run": run, "reason": reason} for run, reason in left_out],
        },
        indent=2,
        allow_nan=False,
    )


def drift_sentences(table: pd.DataFrame) -> list[str]:
    """The front in words, a sentence a target, and what of it isn't seen."""
    said = []
    for target, rows in table.groupby("target_loss", sort=False):
        best = rows[rows["on_front"]].sort_values("time", kind="stable")
        names = ", ".join(best["run"].iloc[:4]) + (
            f" and {len(best) - 4} more" if len(best) > 4 else ""
        )
        missed = int(rows["censored"].sum())
        other = "other " if len(best) == 1 else ""
        said.append(
            f"To reach loss {number(target)}, no {other}run is both faster and of less drift than "
            f"{names}" + (f"; {missed} of {len(rows)} runs never reach it." if missed else ".")
        )
    return [*said, *table.attrs["notes"]]


def _figure(
    table: pd.DataFrame, target: float, groups: Sequence[Any], position: int
) -> Figure | None:
    """Time against drift (filled) and noise (open); estimates of zero and below have no place on
    its logarithmic axis, which the caption says."""
    rows = table[(table["target_loss"] == target) & ~table["censored"]]
    shown = {"drift": rows[rows["drift"] > 0], "noise": rows[scattered(rows)]}
    if shown["drift"].empty:
        return None
    unit = DURATION_UNITS[table.attrs["clock"]]
    data: list[Spec] = []
    for index, group in enumerate(groups):
        style = look(index)
        both = shown["noise"][shown["noise"]["drift"] > 0]
        both = both[both["group"] == group]
        joined = [
            [[t, t, None], [d, n, None]] for t, d, n in both[["time", "drift", "noise"]].to_numpy()
        ]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [x for xs, _ in joined for x in xs],
                "y": [y for _, ys in joined for y in ys],
                "line": {"color": f"@{style.colour}:0.5", "width": 1},
                "hoverinfo": "skip",
                "meta": {"run": index},
            }
        )
        for part, found in shown.items():
            own = found[found["group"] == group]
            symbol = style.symbol if part == "drift" else f"{style.symbol}-open"
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": escape(str(group)),
                    "meta": {"run": index},
                    "x": numbers(own["time"]),
                    "y": numbers(own[part]),
                    "customdata": [
                        [
                            escape(str(row["run"])),
                            with_error(row, "drift"),
                            with_error(row, "noise"),
                        ]
                        for row in own.to_dict("records")
                    ],
                    "marker": {"color": f"@{style.colour}", "symbol": symbol, "size": 9},
                    "hovertemplate": "<b>%{customdata[0]}</b> (%{fullData.name})<br>after "
                    f"%{{x:.4g}} {unit}<br>drift %{{customdata[1]}} nats"
                    "<br>noise %{customdata[2]} nats<extra></extra>",
                }
            )
    best = shown["drift"][shown["drift"]["on_front"]].sort_values("time", kind="stable")
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "x": numbers(best["time"]),
            "y": numbers(best["drift"]),
            "line": {"color": "@text", "width": 2, "shape": "hv"},
            "hoverinfo": "skip",
        }
    )
    values = np.concatenate([found[part].to_numpy(float) for part, found in shown.items()])
    margin = (values.max() / values.min()) ** 0.04  # whole markers at the edges
    ends = np.array([values.min() / margin, values.max() * margin])
    words = f"loss {number(target)}"
    below = len(rows) - len(shown["drift"])
    return Figure(
        f"front-{position}",
        f"Drift and noise on the way to {words}",
        "Filled: the drift of each run, what its expected steps dissipate. Open, joined to it by a "
        "line: its noise, what minibatches scattered; a run of full batches has none. Lower is "
        "cheaper, further left is faster. Black steps: the runs that no other beats in time and "
        "drift." + (f" Not drawn: {below} whose drift came out at or below zero." if below else ""),
        f"Scatter chart on logarithmic axes of time, drift and noise to {words}. "
        + "; ".join(
            f"{row['run']}: drift {with_error(row, 'drift')}, noise {with_error(row, 'noise')}"
            for row in rows.head(_READ_ALOUD).to_dict("records")
        ),
        data,
        layout(
            xaxis=log_axis(f"time to reach it ({unit})", rows["time"].to_numpy(float)),
            yaxis=log_axis("drift and noise (nats, clock step)", ends),
        ),
        460,
    )


_READ_ALOUD = 12
"""Runs whose numbers a figure's description reads out."""


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table: targets in order, within each the runs by time, those that never reach it last."""
    found = []
    for _, rows in table.groupby("target_loss", sort=False):
        ordered = rows.sort_values("time", kind="stable", na_position="last")
        for row in ordered.to_dict("records"):
            cells = [number(row["target_loss"]), number(row["time"])]
            cells += [with_error(row, part) for part in ("drift", "noise")]
            kept = {key: row[key] for key in ("run", "group", "on_front")}
            found.append(kept | {"cells": cells})
    return found
