"""The README's figure, from the recorded digits runs: ``python -m analysis.readme_figure``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import thermo_opt as to
from analysis.timing import RESULTS
from thermo_opt import plots

DATA = Path(__file__).parents[1] / "data"


def main() -> None:
    """Audit the four digits runs through the outputs lens and draw their map and decompositions."""
    audits = [to.audit(path, lens="outputs") for path in sorted(DATA.glob("digits-*"))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), width_ratios=[1, 1.2], layout="constrained")
    plots.trajectory_map(audits, left)
    plots.decomposition_bars(audits, right)
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "readme.png", dpi=130)
    print(RESULTS / "readme.png")


if __name__ == "__main__":
    main()
