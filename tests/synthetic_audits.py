"""Audits of invented runs, computed here from theory §3–4 in plain NumPy, to try plots, report and
command line on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from thermo_opt.audits import Audit
from thermo_opt.lenses import SUMMARY_KEYS, Landmarks, LensAudit

EXAMPLES, CLASSES = 30, 5


def path(noise: float, snapshots: int, seed: int) -> np.ndarray:
    """Amplitudes (snapshots, n, c) of predictions that go from uniform towards the labels, with
    noise on the way."""
    rng = np.random.default_rng(seed)
    labels = np.arange(EXAMPLES) % CLASSES
    progress = np.linspace(0, 1, snapshots)[:, None, None] ** 0.6
    logits = 4 * progress * np.eye(CLASSES)[labels]
    logits = logits + noise * np.cumsum(
        rng.normal(size=(snapshots, EXAMPLES, CLASSES)), axis=0
    ) / np.sqrt(snapshots)
    logits[0] = 0
    p = np.exp(logits - logits.max(axis=2, keepdims=True))
    return np.sqrt(p / p.sum(axis=2, keepdims=True))


def make_audit(
    run: str = "adam",
    *,
    noise: float = 0.5,
    snapshots: int = 41,
    every: int = 1,
    seed: int = 0,
    parameters: bool = False,
    outputs: bool = True,
    state: bool = False,
    probe: str = "probe-1",
    clock: str = "step",
) -> Audit:
    """An audit whose numbers obey every inequality of the theory."""
    lenses: dict[str, LensAudit] = {}
    u = path(noise, snapshots, seed)
    if outputs:
        lenses["outputs"] = _outputs(run, u, every, clock)
    if parameters:
        lenses["parameters"] = _parameters(lenses["outputs"])
    if state:
        lenses["optimizer-state"] = _state(run, u, every, clock)
    rng = np.random.default_rng(seed)
    steps = np.arange((snapshots - 1) * every)
    curve = pd.DataFrame(
        {"loss": 1.6 * np.exp(-steps / 60) + 0.05 * rng.random(len(steps))},
        index=pd.Index(steps, name="step"),
    )
    missing = {
        name: f"the run has no {name}"
        for name in ("outputs", "parameters", "optimizer-state")
        if name not in lenses
    }
    return Audit(run, f"/runs/{run}", lenses, missing, curve, "Adam", probe)


def arcs(u: np.ndarray, m: int = 1) -> np.ndarray:
    """Squared Fisher–Rao distance between every m-th prediction and the next."""
    kept = u[::m]
    overlap = np.clip(np.einsum("kij,kij->ki", kept[:-1], kept[1:]), 0, 1)
    return np.mean((2 * np.arccos(overlap)) ** 2, axis=1)


def _outputs(run: str, u: np.ndarray, every: int, clock: str) -> LensAudit:
    a = arcs(u)
    labels = np.arange(EXAMPLES) % CLASSES
    loss = -2 * np.log(u[:, np.arange(EXAMPLES), labels]).mean(axis=1)
    steps = _steps(a, every, loss)
    steps["alignment_lower"] = 0.3 * np.tanh(steps["d"] / steps["a"])
    distance = float(np.sqrt(arcs(u[[0, -1]])[0]))
    summary = _summary(run, "outputs", a, distance, every, clock)
    summary |= {
        "least_distance": 0.8 * distance,
        "loss_start": float(loss[0]),
        "loss_end": float(loss[-1]),
    }
    summary |= {
        "alignment_lower": 0.12,
        "alignment_upper": 1.0,
        "downhill_lower": 0.12,
        "downhill_upper": 1.0,
        "uphill_lower": 0.0,
        "uphill_upper": 0.0,
        "notes": ["alignment: a certified lower bound; the outputs lens has no gradients"],
    }
    rows = []
    for m in (1, 2, 4, 8):
        c = arcs(u, m)
        rows.append((m, m * every, np.sqrt(c).sum(), (c / (2 * m * every)).sum(), c.mean()))
    coarse = pd.DataFrame(
        rows, columns=["stride", "stride_steps", "length", "dissipation", "a_mean"]
    )
    kept = np.unique(np.linspace(0, len(u) - 1, 24).astype(int))
    return LensAudit(
        "outputs",
        steps,
        summary,
        coarse,
        0.81,
        None,
        Landmarks(kept * every, u[kept].astype(np.float32), loss[kept]),
    )


def _parameters(outputs: LensAudit) -> LensAudit:
    steps = outputs.steps.copy()
    steps["alignment_lower"] = np.linspace(0.7, 0.1, len(steps))
    steps["alignment_upper"] = steps["alignment_lower"] + np.linspace(0.02, 0.2, len(steps))
    rng = np.random.default_rng(1)
    steps["kl_realised"] = steps["a"] / 2 * rng.uniform(0.7, 1.4, len(steps))
    steps["null_decrease"] = 0.0
    names = [f"layer{i}.{part}" for i in range(6) for part in ("weight", "bias")]
    weights = rng.dirichlet(np.ones(len(names)), len(steps))
    weights[:, 1] -= 0.02
    weights[:, 2] += 0.02
    attribution = pd.DataFrame(weights * steps["dissipation"].to_numpy()[:, None], columns=names)
    summary = outputs.summary | {"lens": "parameters", "notes": ["Δ from Lanczos brackets"]}
    summary |= {
        "alignment": 0.35,
        "alignment_lower": 0.31,
        "alignment_upper": 0.39,
        "downhill_lower": 0.31,
        "downhill_upper": 0.39,
        "distance": None,
        "least_distance": None,
    }
    summary |= dict.fromkeys(("irreducible", "detour", "pacing", "straightness", "efficiency"))
    return LensAudit("parameters", steps, summary, outputs.coarse, None, attribution, None)


def _state(run: str, u: np.ndarray, every: int, clock: str) -> LensAudit:
    a = arcs(u)
    own = np.linspace(0.6, 0.4, len(a))
    steps = _steps(a, every, np.full(len(u), np.nan))[
        ["step", "step_end", "tau", "loss", "loss_end"]
    ]
    steps = steps.assign(
        adam_alignment_lower=own - 0.1,
        adam_alignment_upper=own,
        adam_share_lower=a / a.sum(),
        adam_share_upper=a / a.sum(),
    )
    summary = dict.fromkeys(SUMMARY_KEYS) | {
        key: value
        for key, value in _summary(run, "optimizer-state", a, 1.0, every, clock).items()
        if key in ("run", "lens", "clock", "step_unit", "first_step", "last_step", "stride")
        or key in ("every_step", "steps", "duration")
    }
    summary |= {
        "adam_alignment_lower": 0.4,
        "adam_alignment_upper": 0.5,
        "adam_straightness_lower": 0.3,
        "adam_straightness_upper": 0.6,
        "adam_steadiness_lower": 0.8,
        "adam_steadiness_upper": 0.9,
        "notes": ["batch size unknown"],
    }
    return LensAudit(
        "optimizer-state",
        steps,
        summary,
        pd.DataFrame(columns=["stride", "stride_steps", "length", "dissipation", "a_mean"]),
    )


def _steps(a: np.ndarray, every: int, loss: np.ndarray) -> pd.DataFrame:
    k = np.arange(len(a))
    return pd.DataFrame(
        {
            "step": k * every,
            "step_end": (k + 1) * every,
            "tau": float(every),
            "a": a,
            "d": -np.diff(loss),
            "delta_lower": np.nan,
            "delta_upper": 4.0,
            "alignment_lower": np.nan,
            "alignment_upper": np.nan,
            "dissipation": a / (2 * every),
            "loss": loss[:-1],
            "loss_end": loss[1:],
        }
    )


def _summary(
    run: str, lens: str, a: np.ndarray, distance: float, every: int, clock: str
) -> dict[str, Any]:
    duration = float(every * len(a))
    q, length = float((a / (2 * every)).sum()), float(np.sqrt(a).sum())
    return dict.fromkeys(SUMMARY_KEYS) | {
        "run": run,
        "lens": lens,
        "clock": clock,
        "step_unit": "step",
        "first_step": 0,
        "last_step": every * len(a),
        "stride": float(every),
        "every_step": every == 1,
        "steps": len(a),
        "duration": duration,
        "loss_start": None,
        "loss_end": None,
        "dissipation": q,
        "length": length,
        "distance": distance,
        "least_distance": None,
        "irreducible": distance**2 / (2 * duration),
        "detour": (length**2 - distance**2) / (2 * duration),
        "pacing": q - length**2 / (2 * duration),
        "straightness": distance**2 / length**2,
        "steadiness": length**2 / (2 * q * duration),
        "efficiency": distance**2 / (2 * q * duration),
        "alignment": None,
        "alignment_lower": None,
        "alignment_upper": None,
        "notes": [],
    }
