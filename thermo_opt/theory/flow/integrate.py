"""Natural-gradient flow, or any other velocity field, integrated adaptively (theory §6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp

from thermo_opt.errors import InputError
from thermo_opt.theory.flow.landscape import Landscape, NotConverged
from thermo_opt.theory.flow.path import Path

Array = NDArray[np.float64]


def integrate(
    landscape: Landscape,
    start: ArrayLike,
    duration: float,
    *,
    velocity: Callable[[Array], Array] | None = None,
    stop_loss: float | None = None,
    stop_delta: float | None = None,
    samples: int = 101,
    rtol: float = 1e-10,
    atol: float = 1e-12,
    method: str = "DOP853",
    max_evaluations: int = 200_000,
) -> Path:
    """Follow ``θ̇ = velocity(θ)``, by default natural-gradient flow ``θ̇ = −F⁺∇L`` (§6).

    Cost: one metric solve per evaluation.

    Args:
        landscape: the loss with its metric.
        start: θ at time 0, (P,).
        duration: the longest time to follow it.
        velocity: θ → θ̇.
        stop_loss: end as soon as L(θ) falls to this value, nats.
        stop_delta: end as soon as Δ falls to this value, nats.
        samples: points of the returned path.
        rtol: relative tolerance of the solver, which the returned integrals obey too.
        atol: absolute tolerance.
        method: SciPy's adaptive solver.
        max_evaluations: most evaluations of the velocity.

    Raises:
        InputError: for a start or a stop that can't be.
        NotConverged: when the solver fails or needs more evaluations.
    """
    theta0 = np.atleast_1d(np.asarray(start, dtype=np.float64))
    if not (duration > 0 and np.isfinite(duration)):
        raise InputError(f"the duration of a flow must be positive, not {duration}")
    if not (np.isfinite(theta0).all() and np.isfinite(landscape.loss(theta0))):
        raise InputError(
            f"{landscape.name}: the loss is not finite at the start "
            f"{np.array2string(theta0, threshold=6)}"
        )
    size, budget = len(theta0), [max_evaluations]

    def scalars(theta: Array) -> tuple[Array, Array]:
        g = landscape.gradient(theta)
        metric = landscape.metric(theta)
        natural = metric.solve(g)
        v = -natural if velocity is None else velocity(theta)
        a, delta = metric.quadratic(v), float(g @ natural)
        action = 0.0 if velocity is None else metric.quadratic(v + natural) / 2
        return v, np.array([np.sqrt(max(a, 0.0)), a / 2, delta / 2, action, -float(g @ v)])

    def rate(t: float, y: Array) -> Array:
        budget[0] -= 1
        if budget[0] < 0:
            raise NotConverged(
                f"{landscape.name}: {max_evaluations} evaluations were not enough to reach t = "
                f"{t:.4g}"
            )
        v, s = scalars(y[:size])
        return np.concatenate([v, s[:4]])

    events: list[Any] = []
    reasons: list[str] = []
    if stop_loss is not None:
        events.append(lambda t, y: landscape.loss(y[:size]) - stop_loss)
        reasons.append("loss")
    if stop_delta is not None:
        events.append(lambda t, y: 2 * scalars(y[:size])[1][2] - stop_delta)
        reasons.append("delta")
    for event, reason in zip(events, reasons, strict=True):
        event.terminal, event.direction = True, -1
        if event(0.0, theta0) <= 0:
            raise InputError(
                f"{landscape.name}: the {reason} to stop at is already reached at the start"
            )
    try:
        solution = solve_ivp(
            rate,
            (0.0, float(duration)),
            np.concatenate([theta0, np.zeros(4)]),
            method=method,
            rtol=rtol,
            atol=atol,
            dense_output=True,
            events=events or None,
        )
    except np.linalg.LinAlgError as error:
        raise NotConverged(
            f"{landscape.name}: the metric could not be decomposed ({error})"
        ) from None
    if not solution.success or not np.isfinite(solution.y).all():
        raise NotConverged(
            f"{landscape.name}: the flow stopped at t = {solution.t[-1]:.4g}: {solution.message}"
        )
    status = "duration"
    if solution.status == 1:
        status = next(r for r, hits in zip(reasons, solution.t_events, strict=True) if len(hits))
    times = np.linspace(0.0, solution.t[-1], samples)
    states = np.concatenate([solution.sol(times[:-1]).T, solution.y[:, -1][None]])
    thetas = states[:, :size]
    rows = np.stack([scalars(theta)[1] for theta in thetas])
    return Path(
        landscape=landscape,
        times=times,
        theta=thetas,
        loss=np.array([landscape.loss(theta) for theta in thetas]),
        a=2 * rows[:, 1],
        d=rows[:, 4],
        delta=2 * rows[:, 2],
        length=states[:, size],
        dissipation=states[:, size + 1],
        conjugate=states[:, size + 2],
        action=states[:, size + 3],
        status=status,
        curve=lambda t: solution.sol(t)[:size],
    )
