"""Noise, housekeeping and transport of the runs in data/, recorded anew with replicas, and of the
four studies' tasks at small scale.

    python -m analysis splits [--steps 96] [--only WORD,…] [--datasets FOLDER]

The runs of data/ on digits have their own optimizers, batches and 120 steps. The studies' tasks run
for ``--steps`` steps with the methods' best settings of the committed studies, constant, at the
study's batch size; 128 examples of the probe; a replica at every fourth step. Nats on the clock
step, with one standard error. Writes splits.csv.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import thermo_opt as to
from analysis import tasks
from analysis.studies import STUDIES
from analysis.timing import RESULTS, report

DATA = Path(__file__).parents[1] / "data"
METHODS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": lambda m, k: torch.optim.SGD(m.parameters(), lr=k, momentum=0.9),
    "AdamW": lambda m, k: torch.optim.AdamW(m.parameters(), k, (0.9, 0.95), weight_decay=0.0),
    "NGD-T": lambda m, k: to.NGDT(m, k, weight_decay=0.0),
}
EVERY, SHOWN = 4, 128
FOLDERS = {"cifar10": "cifar10", "imagenet": "tiny-imagenet-50"}
"""Studies on images → their folder among the data sets."""
Batches = Iterator[tuple[Tensor, Tensor]]


def recorded(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    probe: tuple[Tensor, Tensor],
    own: Batches,
    other: Batches,
    size: int,
    steps: int,
) -> dict[str, Any]:
    """Train with replicas and give the split's row."""

    def closure(source: Batches) -> Tensor:
        x, y = next(source)
        optimizer.zero_grad()
        f = model(x)
        loss = cross_entropy(f.flatten(0, -2), y.flatten())
        loss.backward()
        return loss

    with to.Recorder(
        path,
        model=model,
        optimizer=optimizer,
        probe=(probe[0][:SHOWN], probe[1][:SHOWN]),
        batch_size=size,
        replica=lambda: closure(other),
        replica_every=EVERY,
    ) as recorder:
        for _ in range(steps):
            loss = closure(own)
            optimizer.step()
            recorder.step(loss=loss)
    summary = to.audit(path, lens="outputs").summary
    split = summary["split"]
    row: dict[str, Any] = {"steps": steps, "batch size": size, "loss": summary["loss_end"]}
    row["Q"] = summary["dissipation"]
    for key in ("noise", "drift", "transport", "housekeeping"):
        row[key] = split[key]
        row[f"{key} s.e."] = split[f"{key}_error"]
    return row


def of_data() -> Iterator[dict[str, Any]]:
    """The digits runs of data/, as its make_runs.py trains them."""
    found = importlib.util.spec_from_file_location("make_runs", DATA / "make_runs.py")
    assert found is not None
    assert found.loader is not None
    recipe = importlib.util.module_from_spec(found)
    found.loader.exec_module(recipe)
    pixels, labels = recipe.digits()

    def drawn(size: int | None, seed: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(recipe.TRAIN, generator=generator)
            for rows in order.split(size or recipe.TRAIN):
                yield pixels[rows], labels[rows]

    for name, (kind, settings, size) in recipe.DIGITS.items():
        torch.manual_seed(recipe.START_SEED)
        model = recipe.digits_mlp()
        with tempfile.TemporaryDirectory() as folder:
            row = recorded(
                Path(folder) / name,
                model,
                kind(model.parameters(), **settings),
                (pixels[: recipe.PROBE], labels[: recipe.PROBE]),
                ((pixels[b], labels[b]) for b in recipe.batches(size)),
                drawn(size, 99),
                size or recipe.TRAIN,
                recipe.STEPS,
            )
        yield {"task": "data", "run": name} | row


def of_study(study: str, steps: int, datasets: Path) -> Iterator[dict[str, Any]]:
    """One study's task with SGD, AdamW and NGD-T at their best settings."""
    scale = STUDIES[study].scales["small"]
    variant, options = next(iter(scale.variants.items()))
    options = dict(options)
    size = int(options.pop("batch_size", 128))
    if study in FOLDERS:
        options["data"] = str(datasets / FOLDERS[study])
    best = pd.read_csv(RESULTS / f"{study}_small.csv")
    best = best[best["choice"] == "best"]
    if "variant" in best:
        best = best[best["variant"] == variant]
    for method, make in METHODS.items():
        task = getattr(tasks, study)(0, **options)
        knob = float(best[best["method"] == method]["setting"].iloc[0])
        own, other = (task.train(size, torch.Generator().manual_seed(k)) for k in (0, 99))
        with tempfile.TemporaryDirectory() as folder:
            row = recorded(
                Path(folder) / "run", task.model, make(task.model, knob), task.probe, own, other,
                size, steps,
            )  # fmt: skip
        yield {"task": study, "run": f"{method}, {knob:g}"} | row


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, write the CSV."""
    parser = argparse.ArgumentParser(prog="analysis splits", description=__doc__)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--only", default="", help="tasks by words, separated by commas")
    parser.add_argument("--datasets", type=Path, default=tasks.DATASETS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    words = given.only.split(",")
    rows = []
    for name in ("data", *STUDIES):
        if any(word in name for word in words):
            for row in of_data() if name == "data" else of_study(name, given.steps, given.datasets):
                print(f"{row['task']}, {row['run']}: done", flush=True)
                rows.append(row)
    print(report("Noise, housekeeping and transport", rows, "splits"))


if __name__ == "__main__":
    main()
