"""What optimizers' steps buy beside the natural gradient's, for the same nats from the same states
and minibatches (`lens="counterfactual"`).

    python -m analysis bought [--seeds 3]

Three tasks (`analysis.minibatch`), batch size 32, 160 steps, every 20th step looked at. Shares are
sums over steps and seeds: what the run's own steps bought over what natural-gradient steps of the
same realised KL buy on the minibatch; below 1 the natural gradient buys more. Held out: fall of the
loss per nat of KL on the minibatch. Beside them the held-out share of the steps' own motion, early
(first half) and late. Writes bought.csv.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import thermo_opt as to
from analysis.minibatch import MinibatchTask, minibatch_tasks
from analysis.timing import report

STEPS, BATCH, LOOK = 160, 32, 20
Make = Callable[[nn.Module, str], torch.optim.Optimizer]
METHODS: dict[str, Make] = {
    "SGD": lambda m, _: torch.optim.SGD(m.parameters(), lr=0.3),
    "SGD, momentum": lambda m, _: torch.optim.SGD(m.parameters(), lr=0.03, momentum=0.9),
    "Adam": lambda m, _: torch.optim.Adam(m.parameters(), lr=0.01),
    "NGD-T": lambda m, family: to.NGDT(m, 0.003, weight_decay=0.0, likelihood=family),
}


def steps_of(task: MinibatchTask, make: Make, seed: int, path: Path) -> pd.DataFrame:
    """The counterfactual lens's rows of one run."""
    model = task.build(seed)
    optimizer = make(model, task.likelihood)
    generator = torch.Generator().manual_seed(seed)
    with to.Recorder(
        path,
        model=model,
        optimizer=optimizer,
        probe=task.held,
        likelihood=task.likelihood,  # type: ignore[arg-type]
        sigma2=1.0 if task.likelihood == "gaussian" else None,
        params=True,
        every=lambda k: k % LOOK in (0, 1),
    ) as recorder:
        for _ in range(STEPS):
            x, y = task.draw(BATCH, generator)
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, batch=(x, y))
    return to.audit(path, lens="counterfactual", model=model).steps


def row(found: pd.DataFrame) -> dict[str, Any]:
    """Shares of the sums."""
    total = found.sum(numeric_only=True)
    early = found[found["step"] < STEPS / 2].sum(numeric_only=True)
    late = found[found["step"] >= STEPS / 2].sum(numeric_only=True)
    return {
        "steps": len(found),
        "KL a step": total["nats"] / len(found),
        "own / natural": total["decrease"] / total["natural_decrease"],
        "own / K-FAC": total["decrease"] / total["kfac_decrease"],
        "held out per nat: own": total["decrease_held"] / total["nats"],
        "natural": total["natural_decrease_held"] / total["nats"],
        "K-FAC": total["kfac_decrease_held"] / total["nats"],
        "held-out share, early": early["nats_held"] / early["nats"],
        "late": late["nats_held"] / late["nats"],
        "not made": int(found["natural_decrease"].isna().sum()),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, write the CSV."""
    parser = argparse.ArgumentParser(prog="analysis bought", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    rows = []
    for task in minibatch_tasks():
        for name, make in METHODS.items():
            with tempfile.TemporaryDirectory() as folder:
                found = [
                    steps_of(task, make, seed, Path(folder) / str(seed))
                    for seed in range(given.seeds)
                ]
            rows.append({"task": task.name, "method": name} | row(pd.concat(found)))
            print(f"{task.name}, {name}: done", flush=True)
    print(report("What steps buy, over the natural gradient's for the same nats", rows, "bought"))


if __name__ == "__main__":
    main()
