"""Pieces of a plotly.js specification shared by the page's figures: lines, axes, layouts, labels.

A colour written ``"@name"`` (or ``"@name:0.2"``, with opacity) is looked up in the page's style
sheet when the figure is drawn, so that one figure serves light and dark mode. A run's traces carry
``meta.run``, its position among the audits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from thermo_opt.describe.quantities import cost_unit, number, time_of
from thermo_opt.lenses.results import Audited
from thermo_opt.plots.palette import Look
from thermo_opt.plots.series import log_ticks, shortened

Spec = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One figure: ``key`` (its element id), title, caption, ``description`` to read aloud, and what
    plotly.js draws."""

    key: str
    title: str
    caption: str
    description: str
    data: list[Spec]
    layout: Spec
    height: int


def units(audits: Sequence[Audited]) -> str:
    """Unit of Q for these audits; all of them, when their clocks differ."""
    return " or ".join(sorted({cost_unit(time_of(audit.summary)) for audit in audits}))


def line(
    style: Look,
    index: int,
    audit: Audited,
    x: np.ndarray,
    y: np.ndarray,
    words: str,
    where: str | None = None,
) -> Spec:
    """A run's line; ``where`` (by default the step) and ``words`` are what it says under the
    pointer, below the run's name."""
    where = f"{audit.summary['step_unit']} %{{x}}" if where is None else where
    body = "<br>".join(part for part in (where, words) if part)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": escape(audit.run),
        "meta": {"run": index},
        "x": numbers(x),
        "y": numbers(y),
        "line": {"color": f"@{style.colour}", "width": 2, "dash": style.dash},
        "hovertemplate": f"<b>%{{fullData.name}}</b><br>{body}<extra></extra>",
    }


def behind(trace: Spec, style: Look) -> Spec:
    """A run's trace, thin and faint where it is one of too many to tell apart."""
    if not style.recedes:
        return trace
    trace["line"] = trace["line"] | {"width": 1, "color": f"@{style.colour}:0.4"}
    if "marker" in trace:
        trace["marker"] = trace["marker"] | {"opacity": 0.4}
    return trace


def axis(title: str, **options: Any) -> Spec:
    """An axis with a quiet grid and its title."""
    base: Spec = {
        "title": {"text": title, "standoff": 10, "font": {"size": 13}},
        "automargin": True,
        "gridcolor": "@grid",
        "linecolor": "@rule",
        "tickcolor": "@rule",
        "ticks": "outside",
        "ticklen": 4,
        "zeroline": False,
        "zerolinecolor": "@muted",
        "showline": True,
    }
    return base | options


def log_axis(title: str, values: np.ndarray, **options: Any) -> Spec:
    """A logarithmic axis over positive ``values`` whose ticks are few and written in full."""
    low, high = float(np.min(values)), float(np.max(values))
    low, high = (low / 1.5, high * 1.5) if high < 2 * low else (low / 1.15, high * 1.15)
    ticks = log_ticks(low, high)
    return axis(
        title,
        type="log",
        range=[float(np.log10(low)), float(np.log10(high))],
        tickvals=ticks,
        ticktext=[number(tick, 1) for tick in ticks],
        **options,
    )


def layout(**options: Any) -> Spec:
    """What all figures share; the page's own key stands in for a legend."""
    base: Spec = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@text", "size": 12},
        "hoverlabel": {
            "bgcolor": "@card",
            "bordercolor": "@rule",
            "font": {"color": "@text", "size": 13},
            "align": "left",
        },
        "hovermode": "closest",
        "showlegend": False,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 46},
    }
    return base | options


def panel_title(text: str, bottom: float) -> Spec:
    """A title above a panel whose upper edge lies at ``bottom`` (in parts of the figure)."""
    return {
        "text": text,
        "xref": "paper",
        "x": 0,
        "xanchor": "left",
        "yref": "paper",
        "y": bottom,
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 13},
    }


def label(text: str, length: int) -> str:
    """Shortened, and escaped for plotly's markup."""
    return escape(shortened(text, length))


def null(value: float) -> float | None:
    """JSON has no NaN: None instead."""
    return float(value) if np.isfinite(value) else None


def numbers(values: Any) -> list[float | None]:
    """A column as JSON."""
    return [null(v) for v in np.asarray(values, dtype=np.float64)]
