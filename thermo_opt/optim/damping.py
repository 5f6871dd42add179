"""How much damping a minibatch calls for: λ of a metric from the noise of the gradients it will
multiply (THEORY §7).

A minibatch gradient of N predictions is Fθ* + ε with noise ε of covariance F/N. If the way θ* still
to go has prior precision τ in each parameter, the best linear estimate of it is (F + (τ/N) I)⁻¹g:
Tikhonov damping with λ = τ/N. Without such knowledge, the prior that knows as much as a few
predictions do has τ = `PRIOR`·tr F/d, d parameters (cf. the unit-information prior, Kass &
Wasserman, J. Am. Stat. Assoc. 90, 1995).
"""

from __future__ import annotations

import math

LEAST = 1e-4
"""λ is no less: factors of a few hundred rows say nothing about smaller eigenvalues."""

PRIOR = 10.0
"""Predictions that the prior is worth. Chosen on the studies' small networks, where 5 did nearly as
well."""


def damping_of(trace: float, parameters: int, predictions: float) -> float:
    """``max(LEAST, PRIOR · (tr F / d) / N)`` for the Fisher F of one prediction, d parameters and N
    predictions a minibatch."""
    found = PRIOR * trace / (parameters * predictions)
    return max(found, LEAST) if math.isfinite(found) else LEAST
