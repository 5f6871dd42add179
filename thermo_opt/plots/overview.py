"""One figure with the panels that a run's lenses support."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from thermo_opt.describe.sentences import headline
from thermo_opt.lenses.results import Audited
from thermo_opt.plots import curves, maps, series, split

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overview(audits: Audited | Iterable[Audited]) -> Figure:
    """The panels these audits support, two a row, on a pyplot figure; with one run, the headline
    sentence above them."""
    import matplotlib.pyplot as plt

    audits = series.as_list(audits)
    panels = [maps.decomposition_bars] if any(series.bar_lens(audit) for audit in audits) else []
    if any(split.split_of(audit) for audit in audits):
        panels.append(split.split_bars)
    panels.append(curves.loss_and_dissipation)
    if any(series.alignment_series(audit) for audit in audits):
        panels.append(curves.alignment)
    if series.trajectory_series(audits) is not None:
        panels.append(maps.trajectory_map)
    if any(len(series.coarse_curves(audit.headline)) > 1 for audit in audits):
        panels.append(curves.coarse_graining)
    if any(series.realised(audit) for audit in audits):
        panels.append(curves.predicted_vs_realised)
    mapped = [audit for audit in audits if series.heat(audit) is not None]
    rows = (len(panels) + 1) // 2 + len(mapped)
    figure = plt.figure(figsize=(11, 3.9 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, 2)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)  # type: ignore[union-attr,call-arg]
    for position, draw in enumerate(panels):
        alone = position == len(panels) - 1 and len(panels) % 2 == 1
        draw(
            audits, figure.add_subplot(grid[position // 2, slice(0, 2) if alone else position % 2])
        )
    for row, audit in enumerate(mapped, start=(len(panels) + 1) // 2):
        maps.dissipation_heatmap(audit, figure.add_subplot(grid[row, :]))
    if len(audits) == 1:
        figure.suptitle(
            headline(audits[0].summary), x=0.01, ha="left", fontsize="large", parse_math=False
        )
    if "inline" in plt.get_backend().lower():
        plt.close(
            figure
        )  # a notebook shows the returned figure; left open, it would be shown twice
    return figure
