"""Whether NGD-T keeps its budget: the KL of every step on its own whole minibatch, over the twelve
networks and losses of `analysis.small_tasks`, or over those of `analysis.more_tasks`.

    python -m analysis budget [--budgets 0.001,0.01,0.03] [--seeds 1] [--only WORD,…]
    [--tasks small|looked-at|apart] [--strict]

A step is repeated with its random draws after the update and compared with what it gave before,
apart from the optimizer's own measurements. Ratios are to the budget and to what the step
was allowed, s²·budget with the signal s (theory §7), in three windows of steps: median [10 %, 90 %]
max.
Beside them the validation loss, final and lowest (of every tenth step and the last), and AdamW's at
three learning rates on the same batches.
Seeds are 0, 1, and so on; one thread. ``--strict`` has every step measured on its whole minibatch
(`Calibration(every=1, predictions=None)`). Writes budget.csv, budget_apart.csv and so on, with
"_strict" at the end.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

import thermo_opt as to
from analysis.more_tasks import APART, LOOKED_AT, made
from analysis.small_tasks import SmallTask, tasks
from analysis.timing import report
from thermo_opt.fisher.likelihoods import likelihood
from thermo_opt.optim import Calibration

STEPS = 240
WINDOWS = ((0, 30), (30, 100), (160, 240))
SETS = {"looked-at": LOOKED_AT, "apart": APART}
LOOK = 10
"""Steps between two looks at the validation loss."""
RATES = (1e-3, 3e-3, 1e-2)
"""AdamW's learning rates."""


def validation(task: SmallTask, net: nn.Module) -> float:
    """The loss on held-out data, in evaluation mode."""
    x, y = task.validation()
    net.eval()
    with torch.no_grad():
        loss = float(task.loss(net(x), y))
    net.train()
    return loss


def adamw(task: SmallTask, rate: float, seed: int) -> list[float]:
    """AdamW's validation losses (`LOOK`)."""
    net = task.build(seed)
    torch.manual_seed(seed + 1000)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    losses = []
    for step, (x, y) in zip(range(1, STEPS + 1), task.batches(seed), strict=False):
        optimizer.zero_grad()
        task.loss(net(x), y).backward()
        optimizer.step()
        if step % LOOK == 0:
            losses.append(validation(task, net))
    return losses


def ngdt(
    task: SmallTask, budget: float, seed: int, strict: bool
) -> tuple[list[dict[str, float]], list[float]]:
    """(per step: realised KL over the budget and over what was allowed, and whether η_max bound it;
    the validation losses)."""
    net, family = task.build(seed), likelihood(task.likelihood)
    torch.manual_seed(seed + 1000)
    optimizer = to.NGDT(
        net,
        budget=budget,
        likelihood=task.likelihood,
        calibration=Calibration(every=1, predictions=None) if strict else "auto",
    )
    rows: list[dict[str, float]] = []
    losses = []
    for step, (x, y) in zip(range(1, STEPS + 1), task.batches(seed), strict=False):
        before = torch.get_rng_state()
        out = net(x)
        optimizer.zero_grad()
        task.loss(out, y).backward()
        optimizer.step()
        after, buffers = torch.get_rng_state(), [b.clone() for b in net.buffers()]
        torch.set_rng_state(before)
        with torch.no_grad():
            old, new = (family.outputs(f.detach().double(), y) for f in (out, net(x)))
            for b, kept in zip(net.buffers(), buffers, strict=True):
                b.copy_(kept)
        torch.set_rng_state(after)
        last = optimizer.last_step
        spent, scale = float(family.kl(old, new).mean()) / budget, last["signal"] or 1.0
        bound = float(last["bound_by_eta_max"] or 0.0)
        rows.append({"budget": spent, "allowed": spent / scale**2, "bound": bound, "signal": scale})
        if step % LOOK == 0:
            losses.append(validation(task, net))
    return rows, losses


def spread(values: Sequence[float]) -> str:
    """Median [10 %, 90 %] maximum."""
    ordered = sorted(values)
    low, high = (ordered[min(int(q * len(ordered)), len(ordered) - 1)] for q in (0.1, 0.9))
    return f"{median(ordered):.2f} [{low:.2f}, {high:.2f}] {ordered[-1]:.1f}"


def measured(task: SmallTask, budget: float, seeds: int, strict: bool) -> dict[str, Any]:
    """The table's row of one task at one budget."""
    runs = [ngdt(task, budget, seed, strict) for seed in range(seeds)]
    row: dict[str, Any] = {"task": task.name, "budget": budget, "seeds": seeds}
    for start, end in WINDOWS:
        steps = [one for rows, _ in runs for one in rows[start:end]]
        for over in ("budget", "allowed"):
            row[f"KL / {over}, {start}–{end - 1}"] = spread([one[over] for one in steps])
        row[f"η_max binds, {start}–{end - 1}"] = round(fmean(one["bound"] for one in steps), 2)
        row[f"signal, {start}–{end - 1}"] = round(fmean(one["signal"] for one in steps), 2)
    every = [one["budget"] for rows, _ in runs for one in rows]
    row["steps"], row["above 5 budgets"] = len(every), sum(one > 5 for one in every)
    row["most"] = max(every)
    row["validation loss"] = fmean(losses[-1] for _, losses in runs)
    row["lowest validation loss"] = fmean(min(losses) for _, losses in runs)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Train, print the table, write the CSV."""
    parser = argparse.ArgumentParser(prog="analysis budget", description=__doc__)
    parser.add_argument("--budgets", default="0.001,0.01,0.03")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default="", help="words of the tasks' names, separated by commas")
    parser.add_argument("--tasks", default="small", choices=["small", "looked-at", "apart"])
    parser.add_argument("--strict", action="store_true", help="measure every step, whole")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    words = given.only.split(",")
    rows = []
    chosen = tasks() if given.tasks == "small" else made(SETS[given.tasks])
    for task in (task for task in chosen if any(word in task.name for word in words)):
        others = {rate: [adamw(task, rate, seed) for seed in range(given.seeds)] for rate in RATES}
        finals = {rate: fmean(losses[-1] for losses in runs) for rate, runs in others.items()}
        lowest = min(fmean(map(min, runs)) for runs in others.values())
        for budget in map(float, given.budgets.split(",")):
            row = measured(task, budget, given.seeds, given.strict)
            best = min(finals.values())
            row |= {f"AdamW {rate:g}": final for rate, final in finals.items()}
            row["lowest of AdamW's"] = lowest
            row["over AdamW's best"] = row["validation loss"] / best if best else math.nan
            rows.append(row)
            print(f"{task.name}, budget {budget:g}: done", flush=True)
    name = "budget" if given.tasks == "small" else f"budget_{given.tasks}"
    name += "_strict" if given.strict else ""
    print(report("Realised KL over the budget, and final validation losses", rows, name))


if __name__ == "__main__":
    main()
