"""Figures of many runs in the space of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from thermo_opt.plots.axes import KEY, given_or_new, plain, quiet
from thermo_opt.plots.palette import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Runs(Protocol):
    """What is drawn of an ensemble; `thermo_opt.audits.Ensemble` is one."""

    @property
    def runs(self) -> Sequence[str]:
        """Names."""

    @property
    def optimizers(self) -> Sequence[str | None]:
        """Names of their optimizers."""

    @property
    def steps(self) -> np.ndarray:
        """Common steps."""

    @property
    def progress(self) -> np.ndarray:
        """(R, K) progress towards the truth."""

    @property
    def off_geodesic(self) -> np.ndarray:
        """(R, K) distance from the geodesic."""

    def map(self, dimensions: int = 2) -> tuple[list[np.ndarray], float]:
        """Intensive principal components."""


def ensemble_map(found: Runs, ax: Axes | None = None, groups: Sequence[str] | None = None) -> Axes:
    """Paths of all runs on the plane of their first two intensive principal components; one colour
    a group, by default an optimizer. Large dots: the last predictions."""
    ax = given_or_new(ax, height=4.8)
    labels = _labels(found, groups)
    paths, explained = found.map()
    names = list(dict.fromkeys(labels))
    for path, label in zip(paths, labels, strict=True):
        style = look(names.index(label))
        ax.plot(*path.T, color=style.hex, linewidth=0.8, alpha=0.5)
        ax.plot(*path[-1], style.marker, color=style.hex, markersize=4)
    for i, name in enumerate(names):
        ax.plot([], [], look(i).marker, color=look(i).hex, label=plain(name))
    quiet(ax, f"{len(paths)} runs in the space of predictions ({explained:.0%} of the spread)")
    ax.set_xlabel("first intensive component")
    ax.set_ylabel("second intensive component")
    ax.legend(**KEY)
    return ax


def progress(found: Runs, ax: Axes | None = None, groups: Sequence[str] | None = None) -> Axes:
    """Distance from the geodesic between ignorance and truth against progress along it, one line a
    run, one colour a group."""
    ax = given_or_new(ax)
    labels = _labels(found, groups)
    names = list(dict.fromkeys(labels))
    for s, off, label in zip(found.progress, found.off_geodesic, labels, strict=True):
        style = look(names.index(label))
        ax.plot(s, off, color=style.hex, linewidth=0.9, alpha=0.6)
    for i, name in enumerate(names):
        ax.plot([], [], color=look(i).hex, label=plain(name))
    quiet(ax, "Progress towards the truth")
    ax.set_xlabel("progress s along the geodesic")
    ax.set_ylabel("distance from it (√nats)")
    ax.legend(**KEY)
    return ax


def _labels(found: Runs, groups: Sequence[str] | None) -> list[str]:
    if groups is not None:
        return list(groups)
    return [name or "unknown optimizer" for name in found.optimizers]
