"""Schedules read from audits on minibatch runs: predicted against realised dissipation, and beside
cosine, linear decay, and refinement from gradient norms.

    python -m analysis schedules [--seeds 5]
    python -m analysis schedules --speeds     # which speed is best evened: all, drift or transport

Three tasks (`analysis.minibatch`) × SGD, Adam and NGD-T at batch size 32, 160 steps. The learning
rate (NGD-T: the budget) of a constant schedule is the best of four by held-out loss over two seeds.
*Even*: `to.even_schedule` of an audited constant run, at equal Σ lr and on another seed; predicted
and realised dissipation are compared there. Then every schedule is tuned alike, its whole scale
over ×½, ×1, ×2 of the constant run's Σ lr by held-out loss over two seeds, and trained on the
seeds. *Refined* is the schedule of Defazio et al. 2023 from the constant run's gradient norms: w =
|g|⁻² (of Adam and NGD-T 1/|g|₁), median-filtered over a tenth of the run, η_k ∝ w_k Σ_{p>k} w_p.
Noise and drift are told by replicas at every fourth step. Seeds of tuning are not those reported.
Writes schedules.csv.

``--speeds``: at the knobs of schedules.csv (SGD at 0.2, far from instability), constant runs of the
seeds are recorded, and schedules at an even speed of all motion, of its drift and of its transport
(theory §11, per step, means over the runs in their stretches; what can't be told from zero counts
as its standard error) are each tried on as many other seeds, at equal Σ lr. Writes
schedule_speeds.csv.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import median_filter
from torch import nn

import thermo_opt as to
from analysis.minibatch import MinibatchTask, minibatch_tasks
from analysis.timing import RESULTS, report

STEPS, BATCH, EVERY = 160, 32, 4
SCALES = (0.5, 1.0, 2.0)
TUNING_SEEDS = (1000, 1001)
Factors = np.ndarray


@dataclass(frozen=True)
class Method:
    """An optimizer, and the knob of its constant schedule."""

    name: str
    make: Callable[[nn.Module, float, str], torch.optim.Optimizer]
    knobs: Sequence[float]


METHODS = (
    Method("SGD", lambda m, k, _: torch.optim.SGD(m.parameters(), lr=k), (0.1, 0.2, 0.4, 0.8)),
    Method(
        "Adam", lambda m, k, _: torch.optim.Adam(m.parameters(), lr=k), (3e-3, 0.01, 0.02, 0.04)
    ),
    Method(
        "NGD-T",
        lambda m, k, f: to.NGDT(m, k, weight_decay=0.0, likelihood=f),
        (1e-3, 3e-3, 0.01, 0.03),
    ),
)


@dataclass
class Trained:
    """A run: held-out loss, gradient norms (2 and 1) of each step, and its audit where recorded."""

    loss: float
    norms: np.ndarray
    audit: to.Audit | None

    @property
    def converged(self) -> bool:
        """Whether it ended with a loss that is a number, and no absurd one."""
        return bool(np.isfinite(self.loss) and self.loss < 100)


def train(
    task: MinibatchTask,
    method: Method,
    knob: float,
    factors: Factors,
    seed: int,
    folder: Path | None = None,
) -> Trained:
    """Train with these factors on the learning rate; recorded with replicas where there is a
    folder."""
    model = task.build(seed)
    optimizer = method.make(model, knob, task.likelihood)
    base = float(optimizer.param_groups[0]["lr"])
    generator, others = (torch.Generator().manual_seed(seed + k) for k in (0, 5000))

    def closure(source: torch.Generator) -> torch.Tensor:
        x, y = task.draw(BATCH, source)
        optimizer.zero_grad()
        loss = task.loss(model(x), y)
        loss.backward()
        return loss

    def set_rate(k: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = base * float(factors[min(k, STEPS - 1)])

    set_rate(0)
    recorder = None
    if folder is not None:
        recorder = to.Recorder(
            folder,
            model=model,
            optimizer=optimizer,
            probe=task.held,
            likelihood=task.likelihood,  # type: ignore[arg-type]
            sigma2=1.0 if task.likelihood == "gaussian" else None,
            batch_size=BATCH,
            replica=lambda: closure(others),
            replica_every=EVERY,
        ).__enter__()
    norms = []
    for k in range(STEPS):
        own = closure(generator)
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        norms.append((float(g.norm()), float(g.abs().sum())))
        optimizer.step()
        used = base * float(factors[k])
        set_rate(k + 1)  # before the replica of the next step
        if recorder is not None:
            recorder.step(loss=own, lr=used)
    audit = None
    loss = task.held_loss(model)
    if recorder is not None and folder is not None:
        recorder.close()
        audit = to.audit(folder, lens="outputs") if np.isfinite(loss) else None
    return Trained(loss, np.array(norms), audit)


def refined(run: Trained, method: Method) -> Factors:
    """The refined schedule of Defazio et al. 2023, with factors of mean one."""
    power, column = (2, 0) if method.name == "SGD" else (1, 1)
    norms = median_filter(run.norms[:, column], size=STEPS // 10, mode="reflect")
    w = norms ** -float(power)
    rates = w * np.concatenate([np.cumsum(w[::-1])[::-1][1:], [0.0]])
    return rates / rates.mean()


def shapes(run: Trained, method: Method) -> dict[str, Factors]:
    """Every schedule, with factors of mean one."""
    assert run.audit is not None
    k = np.arange(STEPS)
    even = to.even_schedule(run.audit).learning_rates
    found = {
        "constant": np.ones(STEPS),
        "even": even,
        "cosine": 1 + np.cos(np.pi * k / STEPS),
        "linear": 1 - k / STEPS,
        "refined": refined(run, method),
    }
    return {name: shape / shape.mean() for name, shape in found.items()}


def measured(task: MinibatchTask, method: Method, seeds: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of one task and method."""

    def tuned(choices: dict[float, tuple[float, Factors]]) -> float:
        def score(choice: float) -> float:
            knob, factors = choices[choice]
            losses = [train(task, method, knob, factors, s).loss for s in TUNING_SEEDS]
            return fmean(losses) if np.isfinite(losses).all() else np.inf

        return min(choices, key=score)

    flat = np.ones(STEPS)
    knob = tuned({knob: (knob, flat) for knob in method.knobs})
    runs = 0

    def recorded(factors: Factors, seed: int) -> Trained:
        nonlocal runs
        runs += 1
        return train(
            task, method, knob, factors, seed, folder / f"{task.name}-{method.name}-{runs}"
        )

    own = [recorded(flat, seed) for seed in range(seeds)]
    predictions = [to.even_schedule(run.audit) for run in own if run.audit is not None]
    forms = [shapes(run, method) for run in own]
    moved = [recorded(forms[s]["even"], seeds + s) for s in range(seeds)]
    rows = [_row(task, method, knob, "constant", 1.0, own)]
    even = _row(task, method, knob, "even, equal Σ lr", 1.0, moved)
    q = [_whole(run) for run in own]
    even["predicted Q"] = fmean(p.predicted_dissipation / p.dissipation for p in predictions)
    even["± 1 s.e."] = fmean(p.saving_error for p in predictions) / seeds**0.5
    even["realised Q"] = even["Q"] / fmean(q)
    even["realised drift"] = even["drift"] / rows[0]["drift"]
    rows.append(even)
    for name in ("even", "cosine", "linear", "refined"):
        scale = tuned({c: (knob, c * forms[0][name]) for c in SCALES})
        done = [recorded(scale * forms[s][name], seeds + s) for s in range(seeds)]
        rows.append(_row(task, method, knob, f"{name}, tuned", scale, done))
    return rows


SPEEDS = {"all": ("noise", "drift"), "drift": ("drift",), "transport": ("transport",)}
"""Speeds that are evened, and the parts of the dissipation that they are the roots of."""
_CALM = 0.2
"""SGD's learning rate where speeds are compared."""


def compared_speeds(
    task: MinibatchTask, method: Method, knob: float, seeds: int, folder: Path
) -> list[dict[str, Any]]:
    """Rows of one task and method: the constant runs', and what each even speed changed."""

    def recorded(name: str, factors: Factors, first: int) -> list[Trained]:
        found = range(first, first + seeds)
        return [train(task, method, knob, factors, s, folder / f"{name} {s}") for s in found]

    flat = np.ones(STEPS)
    own = recorded("constant", flat, 0)
    curves = []
    for run in own:
        split = None if run.audit is None else run.audit.lenses["outputs"].split
        if split is not None:
            curves.append(split.curve)
    spans = (curves[0]["step_end"] - curves[0]["step"]).to_numpy(int)
    base = _row(task, method, knob, "constant", 1.0, own)
    rows = [base]
    for name, parts in SPEEDS.items():
        table = np.array([sum(curve[part].to_numpy(float) for part in parts) for curve in curves])
        mean = table.mean(axis=0)
        error = table.std(axis=0, ddof=1) / len(table) ** 0.5
        speed = np.repeat(np.sqrt(np.maximum(mean, error)), spans)
        way = np.concatenate([[0.0], np.cumsum(speed)])
        time = np.arange(STEPS + 1.0)
        shape = np.diff(np.interp(np.linspace(0, way[-1], STEPS + 1), way, time))
        row = _row(task, method, knob, f"even, {name}", 1.0, recorded(name, shape, seeds))
        row |= {f"{key} over constant": row[key] / base[key] for key in ("Q", "drift")}
        rows.append(row)
    return rows


def _whole(run: Trained) -> float:
    assert run.audit is not None
    return float(run.audit.summary["dissipation"])


def _row(
    task: MinibatchTask,
    method: Method,
    knob: float,
    schedule: str,
    scale: float,
    runs: Sequence[Trained],
) -> dict[str, Any]:
    """Means over the runs that did not diverge."""
    kept = [run for run in runs if run.converged]
    splits = [run.audit.summary["split"] for run in kept if run.audit is not None]
    losses = [run.loss for run in kept]
    return {
        "task": task.name,
        "method": method.name,
        "knob": knob,
        "schedule": schedule,
        "scale": scale,
        "diverged": len(runs) - len(kept),
        "loss": _mean(losses),
        "loss s.e.": float(np.std(losses, ddof=1) / len(kept) ** 0.5) if len(kept) > 1 else np.nan,
        "noise": _mean([s["noise"] for s in splits]),
        "drift": _mean([s["drift"] for s in splits]),
        "Q": _mean([_whole(run) for run in kept]),
    }


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else np.nan


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, write the CSV."""
    parser = argparse.ArgumentParser(prog="analysis schedules", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--speeds", action="store_true", help="compare speeds to even out")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    if given.speeds:
        speeds(given.seeds)
        return
    rows = []
    for task in minibatch_tasks():
        for method in METHODS:
            with tempfile.TemporaryDirectory() as folder:
                rows += measured(task, method, given.seeds, Path(folder))
            print(f"{task.name}, {method.name}: done", flush=True)
    print(report("Schedules on minibatch runs", rows, "schedules"))


def speeds(seeds: int) -> None:
    """Compare the speeds, print the table, write its CSV."""
    tuned = pd.read_csv(RESULTS / "schedules.csv").groupby(["task", "method"])["knob"].first()
    rows = []
    for task in minibatch_tasks():
        for method in METHODS:
            knob = _CALM if method.name == "SGD" else float(tuned[task.name, method.name])
            with tempfile.TemporaryDirectory() as folder:
                rows += compared_speeds(task, method, knob, seeds, Path(folder))
            print(f"{task.name}, {method.name}: done", flush=True)
    print(report("Which speed to even out", rows, "schedule_speeds"))


if __name__ == "__main__":
    main()
