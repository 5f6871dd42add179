"""What NGD-T's result hinges on: one choice changed at a time, everything else at its default.

    python -m analysis.ablate_ngdt [--task digits|cifar10|imagenet|transformer] [--data PATH]
    [--steps N] [--seeds 1] [--variants A,B]

Tasks (a study's first variant at small scale), data order and schedule of `analysis.study`, fixed
budget. Columns: steps, processor seconds and nats to the target (the default's own probe loss two
thirds into its run), final probe loss. Writes ablate_ngdt_<task>.csv.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.methods import ngdt
from analysis.race import STUDIES
from analysis.tasks import TASKS
from analysis.timing import report
from analysis.training import STRIDE, curve, first_reach
from thermo_opt.optim import KFAC

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
    "fresh curvature at every step": {"metric": KFAC(max_refresh_interval=1)},
    "stale curvature (every 64)": {"metric": KFAC(max_refresh_interval=64)},
    "128 rows": {"metric": KFAC(max_rows=128)},
    "all rows": {"metric": KFAC(max_rows=None)},
    "whole factors": {"metric": KFAC(max_solve_overhead=math.inf)},
    "factor memory 0.8": {"metric": KFAC(factor_decay=0.8)},
    "labels from the model": {"metric": KFAC(fisher_type="mc")},
    "eigenbasis and exact damping": {"metric": KFAC(inverse="pseudo"), "damping": 1e-4},
    "EKFAC": {"metric": "ekfac"},
    "reduce setting": {"metric": KFAC(kfac_approx="reduce")},
    "no calibration": {"calibration": None, "budget": 1e-3},
}


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="transformer", choices=list(STUDIES))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    scale = STUDIES[options.task].scales["small"]
    steps = options.steps or scale.length
    task = TASKS[options.task](options.data, **next(iter(scale.variants.values())))
    names = ["default", *(n for n in options.variants.split(",") if n != "default")]
    runs: dict[str, list[pd.DataFrame]] = {}
    for seed in range(options.seeds):
        for name in names:
            runs.setdefault(name, []).append(curve(task, ngdt(**VARIANTS[name]), 0.03, seed, steps))
            print(f"{name}: {runs[name][-1]['loss'].iloc[-1]:.4f}", flush=True)
    place = 2 * steps // 3 // STRIDE
    target = max(float(run["loss"].iloc[: place + 1].min()) for run in runs["default"])
    rows = []
    for name, frames in runs.items():
        reached = pd.DataFrame([first_reach(f, target) for f in frames])
        row: dict[str, Any] = {
            "variant": name,
            "final_loss": sum(float(f["loss"].iloc[-1]) for f in frames) / len(frames),
        }
        row |= {f"{c}_to_target": float(reached[c].mean(skipna=False)) for c in reached}
        row["ms_a_step"] = (
            1e3
            * sum(float(f["seconds"].iloc[-1] / f["step"].iloc[-1]) for f in frames)
            / len(frames)
        )
        rows.append(row | {"target": target, "steps": steps, "seeds": options.seeds})
    report(
        f"NGD-T on {options.task}, one choice changed at a time",
        rows,
        f"ablate_ngdt_{options.task}",
    )


if __name__ == "__main__":
    main()
