"""Small helpers on Matplotlib Axes: a quiet style, a key beside the data, and stacked panels in the
place of one."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

from thermo_opt.describe.quantities import number
from thermo_opt.plots.series import log_ticks, shortened

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes


KEY: dict[str, Any] = {"framealpha": 0.85, "edgecolor": "none", "fontsize": "small"}
"""How a legend looks."""
_KEY_ROWS = 24
"""Entries of a key below one another."""
NAME = 28
"""Letters of a run's name in a figure, at most."""


def given_or_new(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    """The Axes given, or one on a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def quiet(ax: Axes, title: str = "") -> None:
    """No box, a light grid behind the data, the title on the left."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.6")
    ax.tick_params(color="0.6")
    ax.grid(True, color="0.92", linewidth=0.8)
    ax.set_axisbelow(True)
    if title:
        ax.set_title(title, loc="left", fontsize="medium", fontweight="bold")


def stacked(ax: Axes, title: str = "") -> tuple[Axes, Axes]:
    """Two panels, one above the other with a common x axis, in the place of ``ax``."""
    ax.set_axis_off()
    upper = ax.inset_axes((0, 0.55, 1, 0.45))
    lower = ax.inset_axes((0, 0, 1, 0.45), sharex=upper)
    upper.tick_params(labelbottom=False)
    quiet(upper, title)
    quiet(lower)
    return upper, lower


def in_rows(ax: Axes, count: int, title: str = "") -> list[Axes]:
    """``count`` panels, one above the other with common axes, in the place of ``ax``."""
    ax.set_axis_off()
    ax.set_title(title, loc="left", fontsize="medium", fontweight="bold", pad=18)
    gap = 0.3 / count
    height = (1 - gap * (count - 1)) / count
    panels: list[Axes] = []
    for row in range(count):
        first = panels[0] if panels else None
        bottom = 1 - height - row * (height + gap)
        panel = ax.inset_axes((0, bottom, 1, height), sharex=first, sharey=first)
        panel.tick_params(labelbottom=row == count - 1, labelsize="small")
        quiet(panel)
        panels.append(panel)
    return panels


def log_axes(ax: Axes) -> None:
    """Logarithmic axes with few ticks, written in full."""
    log_axis(ax, "x")
    log_axis(ax, "y")


def log_axis(ax: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis with few ticks, written in full."""
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis, ends = (ax.xaxis, ax.get_xlim()) if which == "x" else (ax.yaxis, ax.get_ylim())
    ticks = log_ticks(*ends)
    if len(ticks) > 1:  # a narrower axis keeps Matplotlib's own ticks
        axis.set_ticks([], minor=True)
        axis.set_ticks(ticks, [number(tick, 1) for tick in ticks])


def key_beside(
    ax: Axes, handles: Sequence[Artist] | None = None, *, last_first: bool = False
) -> None:
    """The key of what is drawn, to the right of the data; ``last_first``: what was drawn last, on
    top of the others, is named first."""
    entries = ax.get_legend_handles_labels()[0] if handles is None else list(handles)
    entries = entries[::-1] if last_first else entries
    ax.legend(
        handles=entries,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        ncols=max(1, ceil(len(entries) / _KEY_ROWS)),
        **KEY,
    )


def plain(text: str) -> str:
    """Text of a run's, shortened, that Matplotlib doesn't take for mathematics."""
    return shortened(text, NAME).replace("$", r"\$")


def say_nothing_known(ax: Axes, what: str) -> None:
    """Say in the panel what none of the runs' lenses knows, rather than leave it blank."""
    ax.set_axis_off()
    ax.text(
        0.5, 0.5, what, ha="center", va="center", color="0.4", transform=ax.transAxes, wrap=True
    )
