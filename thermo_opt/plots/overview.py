"""One figure with the panels that a run's lenses support."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from thermo_opt.describe.sentences import headline
from thermo_opt.lenses.results import Audited
from thermo_opt.plots import curves, maps, series, split
from thermo_opt.plots.axes import KEY
from thermo_opt.plots.counterfactual import held_out, looked_at
from thermo_opt.plots.crowd import crowd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT = 3.9
"""Inches of a row of panels."""
_WIDTH = 11.0
"""Inches."""
_KEY_COLUMNS = 4
_LETTER, _HANDLE = 0.07, 0.6
"""Inches of a letter of the key, and of what stands before its words."""

Panel = tuple[Callable[..., "Axes"], float | None]
"""What draws a panel of these runs, and its height where it takes a row of its own."""


def overview(audits: Audited | Iterable[Audited]) -> Figure:
    """The panels these audits support, two a row, on a pyplot figure; those with a part for each
    run get a row of their own where the runs are many. With one run, the headline sentence stands
    above them; with several, one key below them."""
    import matplotlib.pyplot as plt

    audits = series.as_list(audits)
    rows = _rows(_panels(audits))
    maps_of = [(audit, h) for audit in audits if (h := series.heat(audit)) is not None]
    maps_of = maps_of[: series.MAX_MAPS]
    heights = [height for _, height in rows] + [maps.map_height(len(h.layers)) for _, h in maps_of]
    figure = plt.figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # type: ignore[union-attr,call-arg]
    for row, (draws, _) in enumerate(rows):
        for column, draw in enumerate(draws):
            cell = grid[row, column] if len(draws) > 1 else grid[row, :]
            draw(audits, figure.add_subplot(cell))
    for row, (audit, _) in enumerate(maps_of, start=len(rows)):
        maps.dissipation_heatmap(audit, figure.add_subplot(grid[row, :]))
    if len(audits) == 1:
        figure.suptitle(
            headline(audits[0].summary), x=0.01, ha="left", fontsize="large", parse_math=False
        )
    else:
        _key_below(figure, audits)
    if "inline" in plt.get_backend().lower():
        plt.close(
            figure
        )  # a notebook shows the returned figure; left open, it would be shown twice
    return figure


def _panels(audits: list[Audited]) -> list[Panel]:
    found: list[Panel] = []
    bars = sum(series.bar_lens(audit) is not None for audit in audits)
    aligned = sum(series.alignment_series(audit) is not None for audit in audits)
    if bars:
        found.append((maps.decomposition_bars, 1.4 + 0.45 * bars if bars > 6 else None))
    halves = sum(split.split_of(audit) is not None for audit in audits)
    if halves:
        found.append((split.split_bars, 1.6 + 0.45 * halves if halves > 6 else None))
    found.append((partial(curves.loss_and_dissipation, key=False), None))
    if aligned:
        tall = 1.2 + curves.alignment_height(min(aligned, series.MAX_PANELS))
        found.append((curves.alignment, tall if aligned > 3 else None))
    if series.trajectory_series(audits) is not None:
        found.append((partial(maps.trajectory_map, key=False), None))
    if any(len(series.coarse_curves(audit.headline)) > 1 for audit in audits):
        found.append((partial(curves.coarse_graining, key=False), None))
    if any(looked_at(audit) is not None for audit in audits):
        found.append((held_out, None))
    if any(series.realised(audit) for audit in audits):
        found.append((partial(curves.predicted_vs_realised, key=False), None))
    return found


def _rows(panels: list[Panel]) -> list[tuple[list[Callable[..., Axes]], float]]:
    """Panels two a row in order, those of a height of their own alone."""
    rows: list[tuple[list[Callable[..., Axes]], float]] = []
    waiting: list[Callable[..., Axes]] = []
    for draw, height in panels:
        if height is not None:
            rows.append(([draw], height))
            continue
        waiting.append(draw)
        if len(waiting) == 2:
            rows.append((waiting, _HEIGHT))
            waiting = []
    return rows + ([(waiting, _HEIGHT)] if waiting else [])


def _key_below(figure: Figure, audits: list[Audited]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    drawn = crowd(audits)
    for i in reversed(drawn.order) if drawn.behind else drawn.order:
        style = drawn.looks[i]
        if words := drawn.label(i, curves.exponent_words(audits[i])):
            handle = Line2D([], [], color=style.hex, marker=style.marker, markersize=4)
            handle.set_linestyle(style.linestyle)
            handle.set_label(words)
            handles.append(handle)
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = int(_WIDTH / (_HANDLE + _LETTER * longest))
    columns = max(1, min(_KEY_COLUMNS, len(handles), fitting))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, **KEY)
