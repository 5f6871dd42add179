"""The README's figures: ``python -m analysis.readme_figure [--jobs 2]``.

readme.png: where four recorded digits runs' dissipation went. readme_front.png: NGD-T swept by its
budget and Adam by its learning rate on digits, two seeds a setting, with the frontier that no run
can cross; its runs are recorded under analysis/runs/readme and not repeated: remove that folder
after a change of either optimizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import thermo_opt as to
from analysis.study import RUNS
from analysis.study_figures import join_settings
from analysis.timing import RESULTS
from thermo_opt import plots
from thermo_opt.plots.palette import look
from thermo_opt.sweep import Method, Sweep, run_sweep
from thermo_opt.sweep.config import Training

DATA = Path(__file__).parents[1] / "data"
SWEEP = Sweep(
    output=RUNS / "readme",
    task="digits",
    likelihood="categorical",
    training=Training(steps=300, batch_size=128, every=1, schedule="cosine"),
    seeds=(0, 1),
    methods=(
        Method(
            "NGD-T, swept by its budget",
            "NGDT",
            grid={"budget": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]},
        ),
        Method(
            "Adam, swept by its learning rate",
            "Adam",
            grid={"lr": [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]},
        ),
    ),
    target_loss=(0.5, 0.2),
)


def paths() -> Path:
    """Audit the four digits runs through the outputs lens and draw their map and decompositions."""
    audits = [to.audit(path, lens="outputs") for path in sorted(DATA.glob("digits-*"))]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, 4.2), width_ratios=[1, 1.2], layout="constrained"
    )
    plots.trajectory_map(audits, left)
    plots.decomposition_bars(audits, right)
    figure.savefig(RESULTS / "readme.png", dpi=130)
    return RESULTS / "readme.png"


def fronts(jobs: int) -> Path:
    """Sweep both optimizers, and draw each setting's runs in the speed-cost plane, neighbouring
    settings joined."""
    front = run_sweep(SWEEP, jobs=jobs).front
    settings = {trial.name: next(iter(trial.settings.values())) for trial in SWEEP.trials()}
    figure, axes = plt.subplots(1, len(front.targets), figsize=(11.5, 4.6), layout="constrained")
    for axis, target in zip(axes, front.targets, strict=True):
        front.plot(axis, target.target_loss)
        for hull in list(axis.patches):
            hull.remove()  # the joined settings say more
        rows = front.rows(target.target_loss)
        rows = rows.assign(setting=rows["run"].map(settings))
        for index, group in enumerate(front.groups):
            join_settings(axis, rows[rows["group"] == group], look(index).hex)
    figure.savefig(RESULTS / "readme_front.png", dpi=130)
    return RESULTS / "readme_front.png"


def main() -> None:
    """Draw both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    print(paths())
    print(fronts(options.jobs))


if __name__ == "__main__":
    main()
