"""The critical batch size read from audits against brute force, and the simple noise scale beside
it.

    python -m analysis critical-batch [--seeds 4]

Brute force: SGD to a held-out loss at batch sizes from 4 to 512, each at its own best of twelve
learning rates; the steps needed obey ``S = S_min (1 + B*/B)`` (McCandlish et al. 2018), whose B* is
fitted in logarithms. Beside it, at one batch size only: B* of `to.critical_batch` over the audits
of the seeds, and the simple noise scale ``tr Σ/|g|²`` of McCandlish et al. along these runs, from
per-example gradients of all training data. Both are averaged over steps as McCandlish et al. do: a
step counts as the 1/(1 + B*/B) of a noiseless step it is worth. Last, runs whose batch size follows
B* beside runs of constant batch size: same learning rate, steps and examples. Writes
critical_batch.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor
from torch.func import functional_call, grad, vmap

import thermo_opt as to
from analysis.minibatch import MinibatchTask, minibatch_tasks
from analysis.timing import report

SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
RATES = tuple(0.02 * 1.6**k for k in range(12))
REFERENCE = 32
TARGETS = {"digits": 0.25, "five classes": 1.05}
_LONGEST = 3000
_EVERY = 5
_REPLICAS = 2


def steps_to(
    task: MinibatchTask, target: float, size: int, rate: float, seed: int, cap: int
) -> int:
    """Optimizer steps until the held-out loss, a mean of three readings five steps apart, is at the
    target; more than ``cap`` where it never is."""
    model = task.build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    seen: list[float] = []
    for step in range(1, cap + 1):
        x, y = task.draw(size, generator)
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
        if step % _EVERY == 0:
            seen.append(task.held_loss(model))
            if not np.isfinite(seen[-1]):
                break
            if len(seen) > 2 and fmean(seen[-3:]) <= target:
                return step
    return cap + 1


def fewest_steps(task: MinibatchTask, target: float, size: int, seeds: int) -> tuple[float, float]:
    """(mean steps over seeds at the best learning rate, that rate)."""
    best, chosen = float(_LONGEST), RATES[0]
    for rate in RATES:
        needed: list[int] = []
        for seed in range(seeds):
            cap = int(min(best * seeds - sum(needed), _LONGEST))
            needed.append(steps_to(task, target, size, rate, seed, cap))
            if needed[-1] > cap:
                break
        if len(needed) == seeds and fmean(needed) < best:
            best, chosen = fmean(needed), rate
    return best, chosen


def fitted(sizes: Sequence[int], steps: Sequence[float]) -> tuple[float, float, float]:
    """(S_min, B*, error of log B*) of S = S_min (1 + B*/B), by least squares in logarithms."""
    b, s = np.array(sizes, dtype=float), np.log(steps)
    start = [s.min(), np.log(30.0)]
    found = least_squares(lambda p: p[0] + np.log1p(np.exp(p[1]) / b) - s, start)
    variance = 2 * found.cost / (len(b) - 2)
    error = float(np.sqrt(np.linalg.inv(found.jac.T @ found.jac)[1, 1] * variance))
    return float(np.exp(found.x[0])), float(np.exp(found.x[1])), error


def simple_noise_scale(task: MinibatchTask, model: torch.nn.Module) -> float:
    """tr Σ/|g|² on the whole training data, from per-example gradients."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return task.loss(functional_call(model, w, (x[None],)), y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weights, task.x, task.y)
    rows = torch.cat([g.flatten(1) for g in each.values()], dim=1).double()
    mean = rows.mean(0)
    return float((rows.square().sum(1).mean() - mean.square().sum()) / mean.square().sum())


def audited(
    task: MinibatchTask, rate: float, steps: int, seed: int, folder: Path
) -> tuple[to.Audit, list[float]]:
    """A run of the reference batch size recorded with replicas, and its simple noise scales."""
    model = task.build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator, others = (torch.Generator().manual_seed(seed + k) for k in (0, 1000))

    def closure(source: torch.Generator) -> Tensor:
        optimizer.zero_grad()
        x, y = task.draw(REFERENCE, source)
        loss = task.loss(model(x), y)
        loss.backward()
        return loss

    scales = []
    path = folder / f"{task.name}-{seed}"
    with to.Recorder(
        path,
        model=model,
        optimizer=optimizer,
        probe=task.held,
        likelihood=task.likelihood,  # type: ignore[arg-type]
        sigma2=1.0 if task.likelihood == "gaussian" else None,
        batch_size=REFERENCE,
        replica=lambda: closure(others),
        replica_every=_REPLICAS,
    ) as recorder:
        for k in range(steps):
            if k % (4 * _REPLICAS) == 0:
                scales.append(simple_noise_scale(task, model))
            loss = closure(generator)
            optimizer.step()
            recorder.step(loss=loss)
    return to.audit(path, lens="outputs"), scales


def weighted(scale: np.ndarray) -> float:
    """Mean of a noise scale over steps at the reference batch size, a step counted as what it was
    worth."""
    worth = 1 / (1 + scale / REFERENCE)
    return float((worth * scale).sum() / worth.sum())


def with_sizes(task: MinibatchTask, rate: float, sizes: Sequence[int], seed: int) -> float:
    """Held-out loss after a run with these batch sizes."""
    model = task.build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        x, y = task.draw(int(size), generator)
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
    return task.held_loss(model)


def measured(task: MinibatchTask, seeds: int) -> list[dict[str, Any]]:
    """One row a batch size, then one of each B*."""
    target = TARGETS[task.name]
    rows: list[dict[str, Any]] = []
    needed = {size: fewest_steps(task, target, size, seeds) for size in SIZES}
    least, star, error = fitted(SIZES, [steps for steps, _ in needed.values()])
    for size, (steps, rate) in needed.items():
        model = least * (1 + star / size)
        rows.append(
            {
                "task": task.name,
                "batch size": size,
                "best lr": rate,
                "steps": steps,
                "examples": steps * size,
                "fitted steps": model,
            }
        )
    steps, rate = needed[REFERENCE]
    with tempfile.TemporaryDirectory() as folder:
        found = [audited(task, rate, round(steps), seed, Path(folder)) for seed in range(seeds)]
        audit = to.critical_batch([a for a, _ in found])
    simple = weighted(np.mean([s for _, s in found], axis=0))
    sizes = audit.schedule(least=4).batch_sizes
    fixed, following = (
        fmean(with_sizes(task, rate, chosen, seed + 50) for seed in range(3 * seeds))
        for chosen in ([REFERENCE] * len(sizes), sizes.tolist())
    )
    common = {"task": task.name, "batch size": REFERENCE, "best lr": rate, "steps": steps}
    for name, value, off in (
        ("brute force", star, star * error),
        ("audit", audit.overall.value, audit.overall.error),
        ("simple noise scale", simple, np.nan),
    ):
        rows.append(
            common | {"of": name, "B*": value, "± 1 s.e.": off, "over brute force": value / star}
        )
    rows.append(
        common
        | {
            "of": f"batch size following B*, {sizes.min()} to {sizes.max()}",
            "loss": following,
            "loss at constant size": fixed,
        }
    )
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, write the CSV."""
    parser = argparse.ArgumentParser(prog="analysis critical-batch", description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for task in minibatch_tasks():
        if task.name in TARGETS:
            rows += measured(task, given.seeds)
    title = "Steps and examples to a loss over batch sizes, and B* from one of them"
    print(report(title, rows, "critical_batch"))


if __name__ == "__main__":
    main()
