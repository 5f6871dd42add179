"""Alignment of each optimizer's steps with the exact natural gradient, all at the same points.

    python -m analysis.alignment [--steps 80] [--every 10] [--damping 1e-3]

Digits MLP, minibatches of 32. One run (AdamW's) leads; at each of its points every other optimizer,
with its own state fed by the same minibatches, proposes a step δ. ε = d|d|/(aΔ) (THEORY §3) in the
exact Fisher F_λ of the minibatch, which is formed there. Without momentum, a step's alignment is a
property of its metric; with momentum, also of the gradient noise that momentum averages away.
Writes alignment.csv.
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
import torch

import thermo_opt as to
from analysis.tasks import cross_entropy, digits
from analysis.timing import report


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--damping", type=float, default=1e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = digits(batch_size=32)
    leader = task.build(0)
    leading = torch.optim.AdamW(leader.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)
    makers: dict[str, Any] = {
        "NGD-T exact, μ=0": lambda m: to.NGDT(
            m, metric="low-rank", momentum=0.0, damping=options.damping
        ),
        "NGD-T K-FAC, μ=0": lambda m: to.NGDT(m, momentum=0.0),
        "NGD-T EKFAC, μ=0": lambda m: to.NGDT(m, metric="ekfac", momentum=0.0),
        "NGD-T K-FAC, default": lambda m: to.NGDT(m),
        "Adam, β₁=0": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.0, 0.95)),
        "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.9, 0.95)),
        "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2),
        "SGD, momentum 0.9": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    }
    models = {name: task.build(0) for name in makers}
    optimizers = {name: make(models[name]) for name, make in makers.items()}
    found: list[dict[str, Any]] = []
    data = task.batches(0)
    for step in range(options.steps):
        x, y = next(data)
        here = [p.detach().clone() for p in leader.parameters()]
        measured = step % options.every == options.every - 1
        g = to.fisher.gradient(leader, (x, y)) if measured else []
        metric = (
            to.fisher.make("low-rank", leader, (x, y), damping=options.damping)
            if measured
            else None
        )
        for name, model in models.items():
            with torch.no_grad():
                for p, q in zip(model.parameters(), here, strict=True):
                    p.copy_(q)
            optimizers[name].zero_grad()
            cross_entropy(model(x), y).backward()
            optimizers[name].step()
            if metric is not None:
                delta = [p.detach() - q for p, q in zip(model.parameters(), here, strict=True)]
                d = -sum(float((a * b).sum()) for a, b in zip(g, delta, strict=True))
                a, natural = metric.quadratic(delta), metric.dual_norm(g).upper
                found.append(
                    {
                        "optimizer": name,
                        "step": step + 1,
                        "alignment": d * abs(d) / (a * natural) if a > 0 else None,
                    }
                )
        leading.zero_grad()
        cross_entropy(leader(x), y).backward()
        leading.step()
    frame = pd.DataFrame(found)
    table = (
        frame.groupby("optimizer", sort=False)["alignment"]
        .agg(["median", "min", "max", "count"])
        .reset_index()
    )
    report(
        "alignment with the exact natural gradient, digits MLP",
        table.assign(seed=0).to_dict("records"),
        "alignment",
    )


if __name__ == "__main__":
    main()
