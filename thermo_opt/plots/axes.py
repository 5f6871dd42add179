"""Small helpers on Matplotlib Axes: a quiet style, and two stacked panels in the place of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from thermo_opt.describe.quantities import number
from thermo_opt.plots.series import log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


KEY: dict[str, Any] = {"framealpha": 0.85, "edgecolor": "none", "fontsize": "small"}
"""How a legend looks."""


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


def log_axes(ax: Axes) -> None:
    """Logarithmic axes with few ticks, written in full."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis, (low, high) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        ticks = log_ticks(low, high)
        if len(ticks) > 1:  # a narrower axis keeps Matplotlib's own ticks
            axis.set_ticks([], minor=True)
            axis.set_ticks(ticks, [number(tick, 1) for tick in ticks])


def plain(text: str) -> str:
    """Text that Matplotlib doesn't take for mathematics."""
    return text.replace("$", r"\$")


def say_nothing_known(ax: Axes, what: str) -> None:
    """Say in the panel what none of the runs' lenses knows, rather than leave it blank."""
    ax.set_axis_off()
    ax.text(
        0.5, 0.5, what, ha="center", va="center", color="0.4", transform=ax.transAxes, wrap=True
    )
