"""How many steps, seconds and nats each optimizer needs to reach a target loss.

    python -m analysis.race [--task digits|cifar10|transformer|all] [--scale small|full] [--data PATH] [--steps N] [--methods A,B]

Protocol: every method gets the same number of tuning trials (its grid in `analysis.methods`, seed 0), chosen by the final loss on
validation data that is neither trained on nor reported; then three seeds at its best. Same data order, same schedule (warm-up 20 steps, cosine to 5 %), no weight decay.
Steps are interpolated on held-out probe losses taken every 10 steps. Dissipation: outputs lens on the probe, stride 10. Seconds are
processor seconds of forward, backward and step (one thread by default, so that other work on the machine doesn't count). Targets: the
probe loss of AdamW's worst seed half-way through its best runs ("half") and at their end ("end"). Writes race_<task>.csv, race_<task>_curves.csv and a figure.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import thermo_opt as to
from analysis.methods import METHODS, Method, cosine
from analysis.tasks import TASKS, Task, cross_entropy
from analysis.timing import RESULTS, machine

SCALES: dict[str, dict[str, dict[str, Any]]] = {
    "small": {
        "digits": {"steps": 200},
        "cifar10": {"steps": 250, "limit": 20_000},
        "transformer": {"steps": 300, "layers": 3, "width": 64, "batch_size": 16, "probe": 64},
    },
    "full": {"digits": {"steps": 400}, "cifar10": {"steps": 1000}, "transformer": {"steps": 1000}},
}
STRIDE = 10


def train(task: Task, method: Method, knob: float, seed: int, steps: int) -> pd.DataFrame:
    """One run: a row every `STRIDE` steps with step, seconds, dissipation so far, probe loss, mean training loss since the last row; ``attrs["validation"]``: final loss on the validation data."""
    torch.manual_seed(seed)
    model = task.build(seed)
    optimizer = method.make(model, knob)
    scheduler = cosine(optimizer, steps)
    data = task.batches(seed)
    x, y = task.probe

    def predictions() -> tuple[torch.Tensor, float]:
        model.eval()
        with torch.no_grad():
            outputs = model(x)
        model.train()
        return outputs.flatten(0, -2), float(cross_entropy(outputs, y))

    before, loss = predictions()
    rows = [{"step": 0, "seconds": 0.0, "dissipation": 0.0, "loss": loss, "train_loss": math.nan}]
    seconds, dissipation, recent = 0.0, 0.0, []
    for step in range(1, steps + 1):
        inputs, targets = next(data)
        start = time.process_time()
        training = cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        training.backward()
        optimizer.step()
        seconds += time.process_time() - start
        scheduler.step()
        recent.append(training.item())
        if step % STRIDE == 0:
            after, loss = predictions()
            if not math.isfinite(loss):
                break
            distance = to.fisher_rao(before.double().numpy(), after.double().numpy(), kind="logits")
            dissipation += float(distance) ** 2 / (2 * STRIDE)
            before = after
            rows.append(
                {
                    "step": step,
                    "seconds": seconds,
                    "dissipation": dissipation,
                    "loss": loss,
                    "train_loss": float(np.mean(recent)),
                }
            )
            recent = []
    frame = pd.DataFrame(rows)
    model.eval()
    with torch.no_grad():
        frame.attrs["validation"] = float(cross_entropy(model(task.validation[0]), task.validation[1]))
    return frame


def first_reach(run: pd.DataFrame, target: float) -> dict[str, float]:
    """Step, seconds and dissipation at which the probe loss first reaches the target (linear between rows); NaN when it never does."""
    below = np.flatnonzero(run["loss"].to_numpy() <= target)
    if not len(below) or below[0] == 0:
        return dict.fromkeys(("steps", "seconds", "dissipation"), math.nan)
    i = int(below[0])
    left, right = run.iloc[i - 1], run.iloc[i]
    t = (left["loss"] - target) / (left["loss"] - right["loss"])
    return {
        name: float(left[column] + t * (right[column] - left[column]))
        for name, column in (("steps", "step"), ("seconds", "seconds"), ("dissipation", "dissipation"))
    }


def race(
    name: str, scale: str, data: Path | None, steps: int | None, methods: list[str], seeds: int, tune: bool
) -> Path:
    """Tune, run and compare on one task; returns the path of the table."""
    options = dict(SCALES[scale][name])
    length = int(options.pop("steps"))
    length = steps or length
    task = TASKS[name](data, **options)
    curves: list[pd.DataFrame] = []

    def run(method: str, knob: float, seed: int) -> pd.DataFrame:
        frame = train(task, METHODS[method], knob, seed, length).assign(method=method, knob=knob, seed=seed)
        curves.append(frame)
        last = frame.iloc[-1]
        print(
            f"{name} {method} {METHODS[method].knob}={knob:g} seed {seed}: loss {last['loss']:.4f} after {last['step']:.0f} steps, "
            f"{last['dissipation']:.3f} nats, {last['seconds']:.1f} s",
            flush=True,
        )
        return frame

    best: dict[str, float] = {}
    for method in methods:
        scores = {}
        for knob in METHODS[method].grid if tune else METHODS[method].grid[2:3]:
            frame = run(method, knob, 0)
            score = frame.attrs["validation"]
            scores[knob] = score if math.isfinite(score) else math.inf
        best[method] = min(scores, key=lambda k: scores[k])
    for seed in range(1, seeds):
        for method in methods:  # methods take turns
            run(method, best[method], seed)
    everything = pd.concat(curves, ignore_index=True)
    RESULTS.mkdir(exist_ok=True)
    everything.to_csv(RESULTS / f"race_{name}_curves.csv", index=False, float_format="%.5g")
    trials = len(METHODS[methods[0]].grid) if tune else 1
    return summarise(name, everything, best, trials)


def summarise(name: str, everything: pd.DataFrame, best: dict[str, float], trials: int) -> Path:
    """The table and the figure from all runs' curves and each method's best setting."""
    methods, length = list(best), int(everything["step"].max())
    chosen = {m: everything[(everything["method"] == m) & (everything["knob"] == best[m])] for m in methods}
    reference = chosen["AdamW" if "AdamW" in chosen else methods[0]].groupby("step")["loss"]
    # The worst seed's loss, so that every run of the reference reaches its own targets.
    targets = {
        "half": float(reference.max().loc[length // 2 // STRIDE * STRIDE]),
        "end": float(reference.max().iloc[-1]),
    }
    rows = []
    for method in methods:
        runs = [r for _, r in chosen[method].groupby("seed")]
        row: dict[str, Any] = {
            "task": name,
            "method": method,
            "knob": f"{METHODS[method].knob}={best[method]:g}",
            "trials": trials,
        }
        final = [float(r["loss"].iloc[-1]) for r in runs]
        row |= {"final_loss": float(np.mean(final)), "final_spread": float(np.std(final))}
        row["seconds_a_step"] = float(np.mean([r["seconds"].iloc[-1] / r["step"].iloc[-1] for r in runs]))
        for label, target in targets.items():
            reached = pd.DataFrame([first_reach(r, target) for r in runs])
            for column in reached:
                complete = not reached[column].isna().any()
                row[f"{column}_{label}"] = float(reached[column].mean()) if complete else math.nan
        rows.append(row)
    table = pd.DataFrame(rows)
    if "AdamW" in methods:
        adam = table.set_index("method").loc["AdamW"]
        for label in targets:
            for column in ("steps", "seconds", "dissipation"):
                table[f"{column}_{label}_over_AdamW"] = table[f"{column}_{label}"] / float(adam[f"{column}_{label}"])
    table = table.assign(
        target_half=targets["half"],
        target_end=targets["end"],
        length=length,
        seeds=everything["seed"].nunique(),
        machine=machine(),
    )
    path = RESULTS / f"race_{name}.csv"
    table.to_csv(path, index=False, float_format="%.5g")
    draw(name, chosen, targets)
    shown = ["method", "knob", "final_loss", *[c for c in table if c.endswith("over_AdamW")]]
    print(table[shown].to_string(index=False, float_format="%.3f"), flush=True)
    return path


def summarise_again(name: str) -> Path:
    """Table and figure anew from the curves and the chosen settings of an earlier race."""
    table = pd.read_csv(RESULTS / f"race_{name}.csv")
    best = {row.method: float(str(row.knob).split("=")[1]) for row in table.itertuples()}
    return summarise(name, pd.read_csv(RESULTS / f"race_{name}_curves.csv"), best, int(table["trials"].iloc[0]))


def draw(name: str, chosen: dict[str, pd.DataFrame], targets: dict[str, float]) -> None:
    """Probe loss against steps, seconds and dissipation: mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, column, label in zip(
        axes, ("step", "seconds", "dissipation"), ("steps", "processor seconds", "dissipation (nats)"), strict=True
    ):
        for method, frame in chosen.items():
            mean = frame.groupby("step")[["seconds", "dissipation", "loss"]].mean().reset_index()
            axis.plot(mean[column], mean["loss"], label=method, lw=2 if method == "NGD-T" else 1.2)
        for target in targets.values():
            axis.axhline(target, color="0.6", lw=0.8, ls=":")
        axis.set_xlabel(label)
    axes[0].set_ylabel("probe loss (nats)")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{name}: each method at its best setting, mean of its seeds; dotted: targets")
    figure.savefig(RESULTS / f"race_{name}.png", dpi=120)
    plt.close(figure)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="all", choices=[*TASKS, "all"])
    parser.add_argument("--scale", default="small", choices=list(SCALES))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--methods", default="NGD-T,AdamW,SGD,SOAP,Muon")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-tuning", action="store_true", help="one setting a method: the third of its grid")
    parser.add_argument(
        "--again", action="store_true", help="only make table and figure anew from the curves of an earlier race"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = list(TASKS) if options.task == "all" else [options.task]
    for name in names:
        if options.again:
            print(summarise_again(name))
            continue
        print(
            race(
                name,
                options.scale,
                options.data,
                options.steps,
                options.methods.split(","),
                options.seeds,
                not options.no_tuning,
            )
        )


if __name__ == "__main__":
    main()
