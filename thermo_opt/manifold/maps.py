"""Low-dimensional maps of several training trajectories in prediction space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thermo_opt.errors import InputError


def trajectory_map(
    trajectories: Sequence[NDArray[np.floating]], dimensions: int = 2
) -> tuple[list[NDArray[np.float64]], float]:
    """Intensive principal components of one or more trajectories, all in one picture.

    Embeds all Σ K_r points by multidimensional scaling of the intensive (Bhattacharyya) divergence
    ``−(1/n) Σ_i log Σ_y √(p_i q_i)``, keeping the components of largest magnitude (Quinn et al.,
    PNAS 2019; Mao et al., PNAS 2024). The scaling is Minkowski-like, so a component may be
    time-like (negative eigenvalue). Cost O((ΣK)² n c).

    Args:
        trajectories: arrays (K_r, n, c) of unit amplitudes √p on the *same* n examples.
        dimensions: number of components.

    Returns:
        One (K_r, dimensions) array per trajectory; the share of Σ|eigenvalue| that they explain.

    Raises:
        InputError: when the trajectories don't share n and c, or hold fewer than two points.
    """
    if not trajectories or len({t.shape[1:] for t in trajectories}) != 1:
        raise InputError(
            "trajectories must share one probe: the same examples and the same classes"
        )
    points = np.concatenate([np.asarray(t, dtype=np.float64) for t in trajectories])
    if len(points) < 2:
        raise InputError("a map needs at least two recorded predictions")
    divergence = np.zeros((len(points), len(points)))
    floor = np.finfo(np.float64).tiny  # disjoint predictions: a huge but finite divergence
    for example in range(points.shape[1]):
        amplitudes = points[:, example]
        divergence -= np.log(np.clip(amplitudes @ amplitudes.T, floor, 1.0))
    divergence /= points.shape[1]
    np.fill_diagonal(divergence, 0.0)
    centred = (
        divergence - divergence.mean(axis=0) - divergence.mean(axis=1)[:, None] + divergence.mean()
    )
    eigenvalues, basis = np.linalg.eigh(-(centred + centred.T) / 4)
    kept = np.argsort(-np.abs(eigenvalues))[:dimensions]
    coordinates = np.zeros((len(points), dimensions))
    coordinates[:, : len(kept)] = basis[:, kept] * np.sqrt(np.abs(eigenvalues[kept]))
    # Fix each axis's sign (eigenvectors have none) so that the first trajectory starts on the left,
    # at the bottom.
    coordinates *= np.where(coordinates[0] > 0, -1.0, 1.0)
    total = np.abs(eigenvalues).sum()
    explained = float(np.abs(eigenvalues[kept]).sum() / total) if total > 0 else 1.0
    ends = np.cumsum([len(t) for t in trajectories])[:-1]
    return np.split(coordinates, ends), explained
