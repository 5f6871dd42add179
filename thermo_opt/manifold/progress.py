"""How far predictions are on the geodesic from ignorance to the truth (Mao et al., PNAS 2024)."""

from __future__ import annotations

import numpy as np
import scipy  # whose parts load when they are used
from numpy.typing import NDArray

from thermo_opt.errors import InputError

Array = NDArray[np.float64]

_GRID = 33
"""Points of the geodesic tried before the minimum between two of them is sought."""


def progress(
    amplitudes: NDArray[np.floating], start: NDArray[np.floating], truth: NDArray[np.floating]
) -> tuple[Array, Array]:
    """Progress s ∈ [0, 1] along the geodesic from ``start`` to ``truth``, and the distance from it.

    s is the point of the geodesic (of all examples together, each on its own great circle) that is
    nearest in Fisher–Rao distance. Cost O(K n c).

    Args:
        amplitudes: (K, n, c) unit amplitudes √p of K predictions on n examples.
        start: (n, c) those where s is 0, such as equal probabilities.
        truth: (n, c) those where s is 1: √ of the targets' probabilities.

    Returns:
        s and the distance to the nearest point (√nats), each (K,).

    Raises:
        InputError: when shapes differ, or start and truth are orthogonal or equal in an example.
    """
    u, a, b = (np.asarray(x, dtype=np.float64) for x in (amplitudes, start, truth))
    if u.ndim != 3 or u.shape[1:] != a.shape or a.shape != b.shape:
        raise InputError("predictions, start and truth must be on the same examples and classes")
    angle = np.arccos(np.clip(np.einsum("ij,ij->i", a, b), -1.0, 1.0))
    sine = np.sin(angle)
    if (sine < 1e-9).any():
        raise InputError("start and truth must differ in every example: no geodesic joins them")
    from_start, from_truth = np.einsum("kij,ij->ki", u, a), np.einsum("kij,ij->ki", u, b)

    def squared(s: float, k: int) -> float:
        overlap = np.sin((1 - s) * angle) * from_start[k] + np.sin(s * angle) * from_truth[k]
        return float(np.mean(4 * np.arccos(np.clip(overlap / sine, -1.0, 1.0)) ** 2))

    found = np.empty((2, len(u)))
    grid = np.linspace(0, 1, _GRID)
    for k in range(len(u)):
        best = int(np.argmin([squared(s, k) for s in grid]))
        bounds = (grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)])
        nearest = scipy.optimize.minimize_scalar(
            squared, bounds=bounds, args=(k,), method="bounded"
        )
        at_end = min((grid[best], nearest.x), key=lambda s: squared(float(s), k))
        found[:, k] = at_end, np.sqrt(squared(float(at_end), k))
    return found[0], found[1]
