"""Fronts in a plane whose two coordinates are both costs: non-dominated points, dominated area,
convex hulls."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def pareto_mask(x: ArrayLike, y: ArrayLike) -> NDArray[np.bool_]:
    """Which points (x_i, y_i) no other point beats: none is at most as large in both and smaller in
    one.

    Equal points beat neither each other nor are beaten for it; NaN points are never in the set. O(n
    log n).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    kept = np.zeros(len(x), dtype=bool)
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    order = known[np.lexsort((y[known], x[known]))]
    lowest = np.inf
    last: tuple[float, float] | None = None
    for i in order:
        if y[i] < lowest or last == (x[i], y[i]):
            kept[i], lowest, last = True, y[i], (x[i], y[i])
    return kept


def hypervolume(x: ArrayLike, y: ArrayLike, corner: tuple[float, float]) -> float:
    """Area of the points that some (x_i, y_i) beats and that lie below and left of ``corner``: the
    hypervolume. O(n log n)."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    use = pareto_mask(x, y) & (x < corner[0]) & (y < corner[1])
    if not use.any():
        return 0.0
    order = np.argsort(x[use], kind="stable")
    left, low = x[use][order], y[use][order]
    right = np.append(left[1:], corner[0])
    return float(np.dot(right - left, corner[1] - low))


def attainable_hypervolume(product: float, corner: tuple[float, float]) -> float:
    """Area on or above the hyperbola ``x·y = product``, below and left of ``corner``; 0 when the
    corner is below it."""
    box = corner[0] * corner[1]
    if not product > 0:
        return box
    return max(0.0, box - product * (1 + np.log(box / product))) if box > product else 0.0


def hull(x: ArrayLike, y: ArrayLike) -> NDArray[np.int64]:
    """Indices of the convex hull's corners, anticlockwise; one point, or the two ends, when the
    points span no area.

    Andrew's monotone chain (1979), which unlike Qhull takes points on a line as they come. O(n log
    n).
    """
    points = np.column_stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    order = np.lexsort((points[:, 1], points[:, 0]))

    def chain(indices: NDArray[np.int64]) -> list[int]:
        kept: list[int] = []
        for i in indices:
            while len(kept) > 1:
                (ax, ay), (bx, by) = (
                    points[kept[-1]] - points[kept[-2]],
                    points[i] - points[kept[-2]],
                )
                if ax * by - ay * bx > 0:
                    break
                kept.pop()
            if not kept or not np.array_equal(points[kept[-1]], points[i]):
                kept.append(int(i))
        return kept

    lower, upper = chain(order), chain(order[::-1])
    corners = lower[:-1] + upper[:-1]
    return np.array(corners or lower, dtype=np.int64)
