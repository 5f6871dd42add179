"""Hundreds of runs in the space of predictions: how far seeds and optimizers lie apart, how far
along they are, and the entropy that an ensemble of SGD produced at least.

    python -m analysis ensembles [--seeds 80] [--figure FILE]

One network on digits from one start, three optimizers, each with as many orders of its minibatches
as seeds; 60 steps, recorded every tenth. Distances are root mean squares over pairs of runs at the
last step, in √nats on 100 held-out images. Writes ensembles.csv, and the map and the progress as a
picture.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import thermo_opt as to
from analysis.minibatch import MinibatchTask, minibatch_tasks
from analysis.timing import RESULTS, report
from thermo_opt import plots

STEPS, EVERY, BATCH, HELD = 60, 10, 32, 100
METHODS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.3),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
    "NGD-T": lambda m: to.NGDT(m, 0.003, weight_decay=0.0),
}


def trained(
    task: MinibatchTask, make: Callable[[nn.Module], torch.optim.Optimizer], seed: int, path: Path
) -> Path:
    """Record one run; only the order of its minibatches depends on the seed."""
    model = task.build(0)
    optimizer = make(model)
    generator = torch.Generator().manual_seed(seed)
    probe = task.held[0][:HELD], task.held[1][:HELD]
    with to.Recorder(path, model=model, optimizer=optimizer, probe=probe, every=EVERY) as recorder:
        for _ in range(STEPS):
            x, y = task.draw(BATCH, generator)
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    return path


def rows(found: Any, groups: np.ndarray) -> list[dict[str, Any]]:
    """One row a method: spread of its seeds, distance from the others, progress."""
    squared = found.distances() ** 2
    table = []
    for name in METHODS:
        own = groups == name
        pairs = squared[np.ix_(own, own)]
        row: dict[str, Any] = {"method": name, "runs": int(own.sum())}
        row["between its seeds"] = float(np.sqrt(pairs.sum() / (own.sum() * (own.sum() - 1))))
        for other in METHODS:
            if other != name:
                row[f"to {other}"] = float(np.sqrt(squared[np.ix_(own, groups == other)].mean()))
        row["progress"] = float(found.progress[own, -1].mean())
        row["progress sd"] = float(found.progress[own, -1].std(ddof=1))
        row["off geodesic"] = float(found.off_geodesic[own, -1].mean())
        table.append(row)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, write CSV and picture."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(prog="analysis ensembles", description=__doc__)
    parser.add_argument("--seeds", type=int, default=80)
    parser.add_argument("--figure", type=Path, default=RESULTS / "ensembles.png")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task = minibatch_tasks()[0]
    with tempfile.TemporaryDirectory() as folder:
        paths, groups = [], []
        for name, make in METHODS.items():
            for seed in range(given.seeds):
                paths.append(trained(task, make, seed, Path(folder) / f"{name} {seed}"))
                groups.append(name)
        found = to.ensemble(paths)
        bound = to.ensemble(paths[: given.seeds]).entropy_bound()
    table = rows(found, np.array(groups))
    table[0] |= {"entropy at least": bound.value, "entropy s.e.": bound.error}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    plots.ensemble_map(found, left, groups)
    plots.progress(found, right, groups)
    figure.savefig(given.figure, dpi=110)
    print(report("Runs in the space of predictions", table, "ensembles"))


if __name__ == "__main__":
    main()
