"""NGD-T's default damping against fixed ones where a minibatch is small, on digits: ``python -m
analysis.damping`` (two minutes).

Data order and schedule of `analysis.study`; two seeds a setting, probe loss at the end. None of
these batch sizes was used in choosing the default. Writes damping.csv.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from analysis.methods import METHODS, Method, ngdt
from analysis.tasks import TASKS
from analysis.timing import report
from analysis.training import curve

LENGTHS = {2: 600, 8: 400, 32: 300}
"""Steps by batch size."""
BUDGETS = (0.003, 0.01, 0.03, 0.1)
RATES = (0.001, 0.003, 0.01, 0.03)
DAMPINGS = (None, 1e-4, 1e-3, 1e-2)
SEEDS = (0, 1)


def main() -> None:
    """Train, print the table, write the CSV."""
    torch.set_num_threads(1)
    rows = []
    for size, length in LENGTHS.items():
        task = TASKS["digits"](None, batch_size=size)

        def final(method: Method, setting: float, task: Any = task, length: int = length) -> float:
            return fmean(
                float(curve(task, method, setting, seed, length)["loss"].iloc[-1]) for seed in SEEDS
            )

        for damping in DAMPINGS:
            method = ngdt(damping=damping)
            row: dict[str, Any] = {
                "batch": size,
                "steps": length,
                "method": f"NGD-T, damping {damping or 'default'}",
            }
            rows.append(
                row
                | {
                    f"setting {k}": final(method, budget)
                    for k, budget in enumerate(BUDGETS, start=1)
                }
            )
        row = {"batch": size, "steps": length, "method": "AdamW"}
        rows.append(
            row
            | {
                f"setting {k}": final(METHODS["AdamW"], rate)
                for k, rate in enumerate(RATES, start=1)
            }
        )
    settings = (
        f"budgets {', '.join(map(str, BUDGETS))}; AdamW's learning rates "
        f"{', '.join(map(str, RATES))}"
    )
    print(report(f"Final probe loss on digits ({settings})", rows, "damping"))


if __name__ == "__main__":
    main()
