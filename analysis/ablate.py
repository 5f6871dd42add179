"""What NGD-T's result hinges on: one choice changed at a time, everything else at its default.

    python -m analysis ablate TASK [--data PATH] [--steps N] [--seeds 1] [--variants A,B]
    python -m analysis ablate damping

TASK: a study's first variant at small scale, its data order and schedule, fixed budget. Columns:
steps, processor seconds and nats to the target (the lowest probe loss of the default's first two
thirds), final probe loss. Writes ablate_ngdt_<task>.csv.

"damping" (two minutes): the default damping against fixed ones where a minibatch is small, on
digits; two seeds per setting, probe loss at the end. None of these batch sizes was used in choosing
the default. Writes damping.csv.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch

from analysis.studies import STUDIES
from analysis.timing import report
from analysis.trials import Recorded, read, record, trial_of


def kfac(**options: Any) -> dict[str, Any]:
    """K-FAC with these options, as a sweep's settings have it."""
    return {"kind": "kfac", **options}


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "budget 0.01": {"budget": 0.01},
    "budget 0.1": {"budget": 0.1},
    "damping 1e-2": {"damping": 1e-2},
    "damping 1e-3": {"damping": 1e-3},
    "damping 1e-4": {"damping": 1e-4},
    "damping 1e-5": {"damping": 1e-5},
    "momentum 0.5": {"momentum": 0.5},
    "momentum 0.9": {"momentum": 0.9},
    "fresh curvature at every step": {"metric": kfac(max_refresh_interval=1)},
    "stale curvature (every 64)": {"metric": kfac(max_refresh_interval=64)},
    "128 rows": {"metric": kfac(max_rows=128)},
    "all rows": {"metric": kfac(max_rows=None)},
    "whole factors": {"metric": kfac(max_solve_overhead=1e9)},
    "factor memory 0.8": {"metric": kfac(factor_decay=0.8)},
    "labels from the model": {"metric": kfac(fisher_type="mc")},
    "eigenbasis and exact damping": {"metric": kfac(inverse="pseudo"), "damping": 1e-4},
    "EKFAC": {"metric": "ekfac"},
    "reduce setting": {"metric": kfac(kfac_approx="reduce")},
    "no calibration": {"calibration": None, "budget": 1e-3},
}

LENGTHS = {2: 600, 8: 400, 32: 300}
"""Of the damping's runs: steps by batch size."""
BUDGETS, RATES = (0.003, 0.01, 0.03, 0.1), (0.001, 0.003, 0.01, 0.03)
DAMPINGS = (None, 1e-4, 1e-3, 1e-2)


def trained(
    task: str,
    options: Mapping[str, Any],
    method: str,
    settings: Mapping[str, Any],
    seeds: int,
    steps: int,
    **others: Any,
) -> list[Recorded]:
    """Runs of seeds 0, 1, …, recorded for the moment."""
    with tempfile.TemporaryDirectory() as scratch:
        trials = [
            trial_of(task, options, method, settings, seed, steps, **others)
            for seed in range(seeds)
        ]
        return [read(record(trial, Path(scratch)), Path(scratch)) for trial in trials]


def ablate(
    task: str, names: Sequence[str], seeds: int, steps: int | None, data: str | None
) -> None:
    """The table of one task."""
    scale = STUDIES[task].scales["small"]
    steps = steps or scale.length
    options = next(iter(scale.variants.values()))
    runs: dict[str, list[Recorded]] = {}
    for name in ["default", *(name for name in names if name != "default")]:
        settings = {"budget": 0.03, **VARIANTS[name]}
        runs[name] = trained(task, options, "NGD-T", settings, seeds, steps, data=data)
        print(f"{name}: {fmean(run.found['final_loss'] for run in runs[name]):.4f}", flush=True)
    target = max(
        float(run.track.loss[run.track.steps <= 2 * steps / 3].min())
        for run in runs["default"]
        if run.track is not None
    )
    rows = []
    for name, own in runs.items():
        losses = [float(run.track.loss[-1]) if run.track is not None else math.nan for run in own]
        reached = pd.DataFrame([run.reached(target) for run in own]).mean(skipna=False)
        milliseconds = fmean(1e3 * run.found["seconds"] / run.found["steps_done"] for run in own)
        row: dict[str, Any] = {"variant": name, "final_loss": fmean(losses)}
        row |= {f"{what}_to_target": float(value) for what, value in reached.items()}
        row |= {"ms_a_step": milliseconds, "target": target, "steps": steps, "seeds": seeds}
        rows.append(row)
    report(f"NGD-T on {task}, one choice changed at a time", rows, f"ablate_ngdt_{task}")


def damping() -> None:
    """The table of dampings."""
    rows = []
    for size, steps in LENGTHS.items():
        methods: list[tuple[str, str, dict[str, Any]]] = [
            (f"NGD-T, damping {value or 'default'}", "NGD-T", {"damping": value})
            for value in DAMPINGS
        ]
        for label, method, fixed in [*methods, ("AdamW", "AdamW", {})]:
            row: dict[str, Any] = {"batch": size, "steps": steps, "method": label}
            tried = BUDGETS if method == "NGD-T" else RATES
            for place, value in enumerate(tried, start=1):
                settings = fixed | {"budget" if method == "NGD-T" else "lr": value}
                own = trained("digits", {"batch_size": size}, method, settings, 2, steps)
                row[f"setting {place}"] = fmean(run.found["final_loss"] for run in own)
            rows.append(row)
    tried_by = f"budgets {', '.join(map(str, BUDGETS))}; AdamW's rates {', '.join(map(str, RATES))}"
    report(f"Final probe loss on digits ({tried_by})", rows, "damping")


def main(arguments: list[str]) -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        prog="analysis ablate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=[*STUDIES, "damping"])
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.task == "damping":
        return damping()
    names = options.variants.split(",")
    return ablate(options.task, names, options.seeds, options.steps, options.data)
