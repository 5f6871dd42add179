"""A comparison in which every method is tuned alike over its own knobs, and one in which none is.

    python -m analysis evidence digits|cifar10|imagenet|transformer
    or clouds|sources|spirals|mixer|brackets (`APART`: nothing was developed on them)
    [--trials 12] [--seeds 5] [--steps N] [--seconds 3600] [--methods A;B] [--jobs 2] [--data PATH]
    [--scale full --device cuda --precision bfloat16 --every 50]

Tuned: every method gets the same number of trials, drawn once for all by a Latin hypercube (SciPy,
fixed seed) over its own natural knobs, weight decay among them (`SPACES`), with seed 0, scored on
validation data that is neither trained on nor reported; then the seeds 1, 2, … at its best.
Untuned: the same seeds at the settings of `DEFAULTS`, which its authors or library publish. All
share starts, order of the data and a schedule with linear warm-up and a cosine to zero. Steps: five
times the study's by default; at full scale, the study's. ``--trials 0``: nothing is tuned, the
untuned column alone.

Runs are recorded at every step on the probe, so that dissipation is not that of a stride; beside it
stands the dissipation of the same path at every tenth step. Targets: the final probe loss of the
worst of AdamW's tuned seeds, and 1.02 times it. Columns: mean over seeds and the half-width of the
mean's 95 % interval (Student's t) of final loss and accuracy (test data where the task has them),
steps, processor seconds, examples and nats to both targets, over all of AdamW's, seed by seed;
``reached``: seeds that get there. ``commit``: of the code that was run.

Finished runs are kept, so that a comparison can be made in pieces: ``--seconds`` ends a piece after
the run that passes it, and the next call goes on. The table is written when all runs are there:
evidence_<task>.csv.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from scipy import stats

import thermo_opt as to
from analysis.studies import APART, STUDIES
from analysis.timing import report
from analysis.trials import RUNS, Recorded, read, record, trial_of
from thermo_opt.fronts import read_trajectory
from thermo_opt.sweep import Trial, finished, read_result
from thermo_opt.sweep.config import PRECISIONS

TASKS = STUDIES | APART
REFERENCE = "AdamW"
HORIZON = 5
"""Times a study's steps."""
SEED = 20
"""Of the Latin hypercubes."""
SLACK = {"end": 1.0, "near": 1.02}
"""Targets, as multiples of the reference's final loss."""
OPTIONS: dict[str, dict[str, Any]] = {
    "digits": {},
    "cifar10": {"probe": 200, "whole_test": True},
    "imagenet": {"probe": 100},
    "transformer": {"probe": 8, "test": 256},
}
"""Over the study's own options: probes small enough to be recorded at every step."""
SHOWN = (
    *("method", "choice", "final_loss", "final_loss_ci", "reached_end"),
    *("steps_end_ratio", "seconds_end_ratio", "dissipation_end_ratio"),
)
"""Columns of the table that is printed; the CSV has all."""


@dataclass(frozen=True)
class Range:
    """Where a knob is searched: evenly in its logarithm, or in that of 1 − value (``near_one``)."""

    low: float
    high: float
    near_one: bool = False

    def at(self, share: float) -> float:
        """The value at a share of the way, 0 to 1."""
        ends = (1 - self.low, 1 - self.high) if self.near_one else (self.low, self.high)
        value = ends[0] * (ends[1] / ends[0]) ** share
        return float(f"{1 - value if self.near_one else value:.4g}")


_FIRST, _SECOND = Range(0.7, 0.98, near_one=True), Range(0.9, 0.9995, near_one=True)
_DECAY = {"weight_decay": Range(1e-3, 1.0)}
SPACES: dict[str, dict[str, Range]] = {
    "AdamW": {
        **{"lr": Range(3e-4, 5e-2), "beta1": _FIRST, "beta2": _SECOND},
        **{"warmup": Range(0.005, 0.2), **_DECAY},
    },
    "SGD": {
        **{"lr": Range(3e-3, 2.0), "momentum": Range(0.5, 0.99, near_one=True)},
        "weight_decay": Range(1e-5, 1e-2),
    },
    "SOAP": {"lr": Range(3e-4, 5e-2), "beta1": _FIRST, "beta2": _SECOND, **_DECAY},
    "Muon": {"lr": Range(1e-3, 0.3), "beta1": _FIRST, "beta2": _SECOND, **_DECAY},
    "NGD-T": {"budget": Range(1e-3, 0.3), "eta_max": Range(1e-2, 1.0), **_DECAY},
    "K-FAC, KL clip": {"budget": Range(1e-4, 0.1), "eta_max": Range(1e-2, 1.0), **_DECAY},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.01},
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
    "SOAP": {"lr": 3e-3, "betas": [0.95, 0.95], "weight_decay": 0.01},
    "Muon": {"lr": 0.02, "weight_decay": 0.0},
    "NGD-T": {"budget": None, "weight_decay": None},
    "K-FAC, KL clip": {"budget": 1e-3, "eta_max": 0.1, "weight_decay": None},
}


@dataclass(frozen=True)
class Comparison:
    """One task's comparison, at its size."""

    task: str
    methods: tuple[str, ...] = tuple(SPACES)
    trials: int = 12
    seeds: int = 5
    steps: int | None = None
    scale: str = "small"
    data: str | None = None
    runs: Path = RUNS
    jobs: int = 1
    device: str = "cpu"
    precision: str = "float32"
    every: int = 1

    @property
    def folder(self) -> Path:
        """Of its recorded runs."""
        return self.runs / f"evidence_{self.task}_{self.scale}"

    def trial(self, method: str, settings: Mapping[str, Any], seed: int) -> Trial:
        """One of its runs."""
        size = TASKS[self.task].scales[self.scale]
        small = OPTIONS.get(self.task, {}) if self.scale != "tiny" else {}
        return trial_of(
            TASKS[self.task].task or self.task,
            {**next(iter(size.variants.values())), **small},
            method,
            settings,
            seed,
            self.steps or (1 if self.scale == "full" else HORIZON) * size.length,
            every=self.every,
            device=self.device,
            precision=self.precision,
            decay=size.decay,
            data=self.data,
            min_lr_rate=0.0,
        )

    def draws(self, method: str) -> list[dict[str, Any]]:
        """The settings that a method's trials have."""
        space = SPACES[method]
        shares = stats.qmc.LatinHypercube(len(space), seed=SEED).random(self.trials)
        length = self.trial(method, DEFAULTS[method], 0).training.steps
        return [
            settings_of(
                method, dict(zip(space, map(Range.at, space.values(), row), strict=True)), length
            )
            for row in shares.tolist()
        ]


def settings_of(method: str, knobs: Mapping[str, float], length: int) -> dict[str, Any]:
    """A method's settings from its knobs: betas in a pair, warm-up in steps."""
    settings: dict[str, Any] = dict(knobs)
    if "beta1" in settings:
        name = "adamw_betas" if method == "Muon" else "betas"
        settings[name] = [settings.pop("beta1"), settings.pop("beta2")]
    if "warmup" in settings:
        settings["warmup_steps"] = max(1, round(settings.pop("warmup") * length))
    return settings


def run(plan: Comparison, trials: Sequence[Trial], deadline: float) -> bool:
    """Record the trials that aren't yet, until the deadline; whether all are there."""
    waiting = [trial for trial in trials if not finished(trial, plan.folder)]
    work = functools.partial(record, folder=plan.folder)
    size = plan.jobs if plan.jobs > 0 else torch.multiprocessing.cpu_count()
    for start in range(0, len(waiting), size):
        if time.monotonic() > deadline:
            return False
        group = waiting[start : start + size]
        Parallel(n_jobs=plan.jobs)(delayed(work)(trial) for trial in group)
        for trial in group:
            found = read_result(plan.folder / trial.name)
            print(f"{trial.name}: validation {found['validation']:.4f}", flush=True)
    return True


def best(plan: Comparison, method: str) -> dict[str, Any]:
    """The settings of a method's trial with the lowest validation loss; diverged ones lose."""

    def score(settings: dict[str, Any]) -> float:
        found = read_result(plan.folder / plan.trial(method, settings, 0).name)["validation"]
        return float(found) if math.isfinite(found) else math.inf

    return min(plan.draws(method), key=score)


def compare(plan: Comparison, seconds: float = math.inf) -> list[dict[str, Any]] | None:
    """The table; None where the time ran out before all runs were there."""
    deadline = time.monotonic() + seconds
    search = [
        plan.trial(method, settings, 0)
        for place in range(plan.trials)
        for method in plan.methods
        for settings in [plan.draws(method)[place]]
    ]
    if not run(plan, search, deadline):
        return None
    chosen = {(m, "tuned"): best(plan, m) for m in plan.methods if plan.trials}
    chosen |= {(method, "untuned"): DEFAULTS[method] for method in plan.methods}
    final = {
        key: [plan.trial(key[0], settings, seed) for seed in range(1, plan.seeds + 1)]
        for key, settings in chosen.items()
    }
    turns = [trial for own in zip(*final.values(), strict=True) for trial in own]
    if not run(plan, turns, deadline):
        return None
    recorded = {key: [read(trial, plan.folder) for trial in own] for key, own in final.items()}
    first = REFERENCE if REFERENCE in plan.methods else plan.methods[0]
    reference = recorded[first, "tuned" if plan.trials else "untuned"]
    ends = [float(run.track.loss[-1]) for run in reference if run.track is not None]
    targets = {name: slack * max(ends) for name, slack in SLACK.items()}
    rows = []
    for (method, choice), own in recorded.items():
        row = {"method": method, "choice": choice, "settings": json.dumps(chosen[method, choice])}
        rows.append(row | row_of(plan, own, reference, targets))
    return rows


def row_of(
    plan: Comparison,
    own: Sequence[Recorded],
    reference: Sequence[Recorded],
    targets: Mapping[str, float],
) -> dict[str, Any]:
    """A method's numbers over its seeds."""
    row: dict[str, Any] = {"trials": plan.trials, "seeds": len(own)}
    for name in ("final_loss", "accuracy", "validation", "memory", "dissipation"):
        row |= interval(name, [run.found[name] for run in own])
    strided = [at_stride(plan.folder / run.trial.name, 10) for run in own]
    row |= interval("dissipation_stride_10", strided)
    milliseconds = [1e3 * run.found["seconds"] / max(1, run.found["steps_done"]) for run in own]
    row |= interval("ms_per_step", milliseconds)
    for label, target in targets.items():
        found = [run.reached(target) for run in own]
        base = [run.reached(target) for run in reference]
        row[f"target_{label}"] = target
        row[f"reached_{label}"] = sum(math.isfinite(one["steps"]) for one in found)
        for what in ("steps", "seconds", "dissipation"):
            row |= interval(f"{what}_{label}", [one[what] for one in found])
            ratios = [one[what] / two[what] for one, two in zip(found, base, strict=True)]
            row |= interval(f"{what}_{label}_ratio", ratios)
        size = own[0].trial.training.batch_size
        row[f"examples_{label}"] = row[f"steps_{label}"] * size if size else math.nan
    row["steps"], row["commit"] = own[0].trial.training.steps, commit()
    return row


def interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and half-width of the mean's 95 % interval; NaN unless every seed has a value."""
    mean = float(np.mean(values))
    if len(values) < 2 or not math.isfinite(mean):
        return {name: mean, f"{name}_ci": math.nan}
    spread = float(stats.sem(values)) * float(stats.t.ppf(0.975, len(values) - 1))
    return {name: mean, f"{name}_ci": spread}


def at_stride(folder: Path, stride: int) -> float:
    """Dissipation of a recorded path seen every so many snapshots; NaN where there is no path."""
    run = to.load_run(folder)
    kept = [*run.snapshots[:-1][::stride], *run.snapshots[-1:]]
    try:
        found = read_trajectory(to.Run(**{**vars(run), "snapshots": kept}))
    except to.InputError:
        return math.nan
    return float(found.dissipation[-1])


@functools.cache
def commit() -> str:
    """The commit of the code, and whether it was changed since, results aside; empty outside a
    repository."""
    here = str(Path(__file__).parent)
    git = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, check=False)
    found = git(["git", "describe", "--always"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "-uno", "--", ":/", ":(exclude)results"]).stdout
    return f"{found}-dirty" if changed else found


def main(arguments: list[str]) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        prog="analysis evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--scale", default="small", choices=["small", "full", "tiny"])
    parser.add_argument("--methods", default=";".join(SPACES), help="separated by semicolons")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, default=math.inf, help="of this piece")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--data")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--every", type=int, default=1, help="steps between recorded predictions")
    parser.add_argument("--runs", type=Path, default=RUNS)
    options = vars(parser.parse_args(arguments))
    seconds = options.pop("seconds")
    options["methods"] = tuple(options["methods"].split(";"))
    if unknown := [method for method in options["methods"] if method not in SPACES]:
        raise to.InputError(f"method {unknown[0]!r} is unknown: use some of {', '.join(SPACES)}")
    if options["trials"] < 0 or options["seeds"] < 1:
        raise to.InputError("give no trial or more, and at least one seed")
    if options["scale"] not in (known := TASKS[options["task"]].scales):
        raise to.InputError(f"{options['task']} has the scales {', '.join(known)}")
    torch.set_num_threads(1)
    rows = compare(Comparison(**options), seconds)
    if rows is None:
        print("not all runs are there yet: call the same command again to go on")
        return
    suffix = "" if options["scale"] == "small" else f"_{options['scale']}"
    title = f"evidence on {options['task']}"
    report(title, rows, f"evidence_{options['task']}{suffix}", SHOWN)
