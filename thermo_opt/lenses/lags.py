"""Products of displacements that lie apart in time: what of the motion lasts (theory §11).

⟨u_{k+m} − u_k, u_{k+3m} − u_{k+2m}⟩ over a path holds no noise of single steps, and none of the
motion that undoes noise within m steps: only what goes on in the same direction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from thermo_opt.manifold import Point
from thermo_opt.manifold.predictive import ON_SPHERES

LAGS = (1, 2, 4, 8, 16)
"""Displacements m of the products, in snapshots; each spans 3m."""

ADJACENT = 0
"""Key of the products ⟨u_{k+1} − u_k, u_{k+2} − u_{k+1}⟩ of neighbouring displacements."""

Products = dict[int, list[tuple[int, float]]]
"""Per m (or `ADJACENT`) the (first snapshot, product as a mean over examples, nats)."""


def coordinates(point: Point, likelihood: str) -> np.ndarray:
    """(n, width) coordinates whose small displacements have the Fisher-Rao length."""
    u = 2 * point.u if likelihood in ON_SPHERES else point.u
    if point.weights is not None:
        u = u * np.sqrt(point.weights)[:, None]
    return u.reshape(point.examples, -1) if len(u) % point.examples == 0 else u


class LaggedProducts:
    """Takes the products while a path is walked; holds three displacements per m.

    Args:
        lags: the m to take, in snapshots.
        likelihood: family of the predictions.
    """

    def __init__(self, lags: Sequence[int], likelihood: str) -> None:
        self._likelihood = likelihood
        self._last: dict[int, np.ndarray] = {}
        self._moved: dict[int, deque[np.ndarray]] = {m: deque(maxlen=3) for m in lags}
        self.found: Products = {m: [] for m in lags}
        if 1 in self.found:
            self.found[ADJACENT] = []

    def add(self, index: int, offset: int, point: Point) -> None:
        """See snapshot ``index``, ``offset`` snapshots after the first one seen. Cost O(n c)."""
        due = [m for m in self._moved if offset % m == 0]
        if not due:
            return
        here = coordinates(point, self._likelihood)
        for m in due:
            moved = self._moved[m]
            if m in self._last:
                moved.append(here - self._last[m])
                if m == 1 and len(moved) > 1:
                    self.found[ADJACENT].append((index - 2, _product(moved[-2], moved[-1])))
                if len(moved) == 3:
                    self.found[m].append((index - 3 * m, _product(moved[0], moved[2])))
            self._last[m] = here


def _product(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", x, y)) / len(x)
