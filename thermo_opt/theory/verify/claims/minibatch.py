"""Noise, housekeeping and transport of a process in which all three are known: SGD on a
linear-Gaussian model, an Ornstein–Uhlenbeck process in discrete time (theory §11).
"""

from __future__ import annotations

import numpy as np

from thermo_opt import noise
from thermo_opt.theory.verify.ingredients import Ingredients
from thermo_opt.theory.verify.verdict import Check, at_most, equal

_ETA, _SCATTER, _WIDTH, _STEPS, _EVERY = 0.1, 0.7, 2000, 100, 4
_SIGMAS = 4.0
_BATCHES = (1, 16)


def split(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Replicas and neighbouring steps tell noise, housekeeping and transport of minibatch descent
    apart, each to its standard error, and noise goes as 1/B (§11).

    ``x ← x − η(hx + ξ)`` with ξ of variance s²/B, curvatures h over two decades, fluctuations
    stationary: variance V = ηs²/(Bh(2 − ηh)) about a mean that decays as (1 − ηh)^k.
    """
    h = np.geomspace(0.03, 3.0, _WIDTH)
    mean = np.where(rng.random(_WIDTH) < 0.5, -0.5, 0.5)
    checks, found = [], []
    for batch in _BATCHES:
        where = f"linear-Gaussian SGD, B = {batch}"
        parts = _estimated(use, rng, h, mean, batch)
        known = _known(h, mean, batch)
        for key, estimate in parts.items():
            checks.append(
                equal(
                    where,
                    f"{key} − closed form, in standard errors ({estimate.error:.2g} nats)",
                    0.0,
                    (estimate.value - known[key]) / estimate.error,
                    _SIGMAS,
                )
            )
        checks.append(
            at_most(where, "relative error of noise", 0.02, parts["noise"].error / known["noise"])
        )
        checks.append(
            at_most(
                where,
                "error of transport over the drift",
                0.25,
                parts["transport"].error / known["drift"],
            )
        )
        found.append(parts["noise"].value * batch)
    checks.append(
        equal("linear-Gaussian SGD", "B·noise at B = 16 over B = 1", 1, found[1] / found[0], 0.1)
    )
    same = rng.normal(size=(_WIDTH, 3))
    apart, _ = use.noise_and_drift(same, same)
    checks.append(equal("full batch", "noise of two equal steps", 0.0, apart, 1e-15))
    return checks


def _known(h: np.ndarray, mean: np.ndarray, batch: int) -> dict[str, float]:
    """Closed forms over all steps, nats."""
    variance = _ETA * _SCATTER / (batch * h * (2 - _ETA * h))
    decay = (1 - (1 - _ETA * h) ** (2 * _STEPS)) / (1 - (1 - _ETA * h) ** 2)
    transport = float(np.mean(0.5 * _ETA**2 * h**2 * mean**2 * decay))
    housekeeping = float(_STEPS * np.mean(0.5 * _ETA**2 * h**2 * variance))
    return {
        "noise": _STEPS * 0.5 * _ETA**2 * _SCATTER / batch,
        "drift": transport + housekeeping,
        "transport": transport,
        "housekeeping": housekeeping,
    }


def _estimated(
    use: Ingredients, rng: np.random.Generator, h: np.ndarray, mean: np.ndarray, batch: int
) -> dict[str, noise.Estimate]:
    """What a record of one run with replicas gives."""
    spread = np.sqrt(_ETA * _SCATTER / (batch * h * (2 - _ETA * h)))
    x = mean + spread * rng.normal(size=_WIDTH)

    def stepped() -> np.ndarray:
        return -_ETA * (h * x + np.sqrt(_SCATTER / batch) * rng.normal(size=_WIDTH))

    moves, pairs, at = [], [], []
    for k in range(_STEPS):
        step = stepped()
        if k % _EVERY == 0:
            pairs.append(use.noise_and_drift(step[:, None], stepped()[:, None]))
            at.append(k)
        moves.append(step)
        x = x + step
    adjacent = [(k, float(np.mean(moves[k] * moves[k + 1]))) for k in range(_STEPS - 1)]
    apart, drift = (noise.over_run(column, at, _STEPS) for column in np.array(pairs).T)
    moved = use.balanced_transport(adjacent, np.array(pairs)[:, 1], at, _STEPS)
    rest = noise.Estimate(drift.value - moved.total.value, moved.total.error)
    return {"noise": apart, "drift": drift, "transport": moved.total, "housekeeping": rest}
