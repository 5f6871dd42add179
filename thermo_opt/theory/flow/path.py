"""A path θ(t) on a landscape with what it cost, and its record on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path as FilePath

import numpy as np
from numpy.typing import NDArray

from thermo_opt.errors import InputError
from thermo_opt.theory.flow.landscape import Landscape

Array = NDArray[np.float64]
Curve = Callable[[float], Array]


@dataclass(frozen=True)
class Path:
    """A curve θ(t) on a landscape with what it cost (§4, §6).

    Arrays have one entry per sample time. Calling the path gives θ at any time up to its end.

    Attributes:
        landscape: the loss with its metric.
        times: (K,).
        theta: (K, P).
        loss: L, nats.
        a: ``θ̇ᵀFθ̇`` per unit time squared.
        d: ``−gᵀθ̇`` per unit time.
        delta: ``gᵀF⁺g``.
        length: running ∫√a dt.
        dissipation: running ∫½a dt.
        conjugate: running ∫½Δ dt.
        action: running ∫½|θ̇ + F⁺g|²_F dt.
        status: why it ended: "duration", "loss" or "delta".
        curve: t → θ(t).
    """

    landscape: Landscape
    times: Array
    theta: Array
    loss: Array
    a: Array
    d: Array
    delta: Array
    length: Array
    dissipation: Array
    conjugate: Array
    action: Array
    status: str
    curve: Curve

    def __call__(self, t: float) -> Array:
        return self.curve(t)

    @property
    def duration(self) -> float:
        """T, the time at the path's end."""
        return float(self.times[-1])

    @property
    def energy_defect(self) -> float:
        """L(0) − L(T) − [∫(½a + ½Δ)dt − S], zero for every path (§6, energy identity) up to solver
        error; nats."""
        gain = self.dissipation[-1] + self.conjugate[-1] - self.action[-1]
        return float(self.loss[0] - self.loss[-1] - gain)

    def to_run(self, directory: str | PathLike[str]) -> FilePath:
        """Write the path as a recorded run, one step a sample, so that `load_run` and `audit` take
        it like any other.

        Snapshots hold the weights and the predictions on the landscape's probe; the learning rate
        of a step is its duration, so clock ``flow`` is the path's own time. Raises InputError when
        the landscape has no predictions or the folder already holds files.
        """
        return _write_run(self, FilePath(directory))


def trace(
    landscape: Landscape,
    curve: Curve,
    duration: float,
    *,
    velocity: Curve | None = None,
    samples: int = 101,
    nodes: int = 8,
) -> Path:
    """What a given smooth curve θ(t), 0 ≤ t ≤ duration, costs on a landscape.

    Integrals by Gauss–Legendre. Cost: (nodes + 1)·samples metric evaluations.

    Args:
        landscape: the loss with its metric.
        curve: t → θ(t), (P,).
        duration: T.
        velocity: t → θ̇(t); without it, sixth-order differences of the curve.
        samples: points of the returned path.
        nodes: quadrature points between samples.

    Raises:
        InputError: where the curve or its loss is not finite.
    """
    rate = velocity or derivative(curve, duration)

    def scalars(t: float) -> tuple[Array, Array, float]:
        theta, v = np.asarray(curve(t), dtype=np.float64), rate(t)
        loss = landscape.loss(theta)
        if not (np.isfinite(theta).all() and np.isfinite(loss)):
            raise InputError(f"{landscape.name}: the curve leaves the domain at t = {t:.4g}")
        g, metric = landscape.gradient(theta), landscape.metric(theta)
        natural = metric.solve(g)
        a, delta = metric.quadratic(v), float(g @ natural)
        action = metric.quadratic(v + natural) / 2
        return (
            theta,
            np.array([np.sqrt(max(a, 0.0)), a / 2, delta / 2, action, -float(g @ v)]),
            loss,
        )

    times = np.linspace(0.0, float(duration), samples)
    points = [scalars(t) for t in times]
    rows = np.stack([p[1] for p in points])
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = times[1] / 2
    pieces = [
        half * w @ np.stack([scalars(t + half * (1 + u))[1][:4] for u in x]) for t in times[:-1]
    ]
    totals = np.concatenate([np.zeros((1, 4)), np.cumsum(pieces, axis=0)])
    return Path(
        landscape=landscape,
        times=times,
        theta=np.stack([p[0] for p in points]),
        loss=np.array([p[2] for p in points]),
        a=2 * rows[:, 1],
        d=rows[:, 4],
        delta=2 * rows[:, 2],
        length=totals[:, 0],
        dissipation=totals[:, 1],
        conjugate=totals[:, 2],
        action=totals[:, 3],
        status="duration",
        curve=curve,
    )


def derivative(curve: Curve, duration: float) -> Curve:
    """The velocity of a smooth curve on [0, duration], by seven-point differences of width 6h, h =
    duration/1000."""

    def rate(t: float) -> Array:
        h = min(1e-3 * duration, duration / 8)
        centre = min(max(t, 3 * h), duration - 3 * h)
        points = np.stack(
            [np.asarray(curve(centre + k * h), dtype=np.float64) for k in range(-3, 4)]
        )
        x = (t - centre) / h
        return np.asarray(_lagrange_slopes(x) @ points / h, dtype=np.float64)

    return rate


def _lagrange_slopes(x: float) -> Array:
    """Weights of f'(x) from the values at −3, …, 3: exact for polynomials of degree six."""
    nodes = np.arange(-3, 4)
    powers = np.vander(nodes, 7, increasing=True).T.astype(np.float64)
    slopes = np.array([0.0] + [k * x ** (k - 1) for k in range(1, 7)])
    return np.linalg.solve(powers, slopes)


def _write_run(path: Path, directory: FilePath) -> FilePath:
    import torch

    from thermo_opt.runs import format as layout
    from thermo_opt.runs.probe import make_probe, probe_tensors

    scape = path.landscape
    if scape.predict is None or scape.targets is None:
        raise InputError(
            f"{scape.name} has no predictions on a probe, so its paths can't be written as a run"
        )
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory} already holds files; give an empty or new folder")
    (directory / layout.SNAPSHOT_FOLDER).mkdir(parents=True, exist_ok=True)
    targets = torch.as_tensor(np.asarray(scape.targets))
    probe = make_probe(None, targets)
    layout.write_tensors(directory / layout.PROBE_FILE, probe_tensors(None, targets))
    content = {
        "schema_version": layout.SCHEMA_VERSION,
        "name": scape.name,
        "optimizer": "natural-gradient flow" if not path.action.any() else "prescribed path",
        "settings": {"duration": path.duration, "samples": len(path.times)},
        "clock": "flow",
        "likelihood": scape.likelihood,
        "sigma2": scape.sigma2 if scape.likelihood == "gaussian" else None,
        "probe_fingerprint": probe.fingerprint,
    }
    lines = []
    for k, theta in enumerate(path.theta):
        tensors = {
            "params/theta": torch.as_tensor(np.array(theta)),
            "probe/logits": torch.as_tensor(np.array(scape.predict(theta), dtype=np.float64)),
        }
        layout.write_tensors(layout.snapshot_path(directory, k), tensors)
        if k > 0:
            row = {
                "step": k,
                "loss": float(path.loss[k - 1]),
                "lr": float(path.times[k] - path.times[k - 1]),
            }
            lines.append(json.dumps(row))
    layout.write_atomically(directory / layout.STEPS_FILE, ("\n".join(lines) + "\n").encode())
    layout.write_atomically(directory / layout.RUN_FILE, json.dumps(content, indent=2).encode())
    return directory
