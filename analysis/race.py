"""The short comparison: steps, seconds and nats to AdamW's losses, over AdamW's, from the studies'
tables.

    python -m analysis.race [--studies digits,cifar10,transformer] [--scale small|full] [--jobs 2]
    [--results FOLDER] [--runs FOLDER]

Reads <study>_<scale>.csv where a study has left it, and otherwise runs that study
(`analysis.study`). Writes race_<scale>.csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

import thermo_opt as to
from analysis import cifar10, digits, imagenet, transformer
from analysis.study import Plan, Study, run_study
from analysis.study_table import RATIOS
from analysis.timing import RESULTS

STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY for module in (digits, cifar10, imagenet, transformer)
}
KEPT = (
    "method",
    "choice",
    "knob",
    "setting",
    "bracketed",
    "seeds",
    "final_loss",
    "final_loss_std",
    "accuracy",
)


def race(
    names: list[str],
    scale: str,
    jobs: int = 1,
    results: Path | None = None,
    runs: Path | None = None,
) -> Path:
    """Gather the studies' rows, running what isn't there; returns the path of the table."""
    folder = results or RESULTS
    tables = []
    for name in names:
        path = folder / f"{name}_{scale}.csv"
        if path.is_file():
            table = pd.read_csv(path)
        else:
            table = run_study(Plan(STUDIES[name], scale, jobs=jobs, results=folder, runs=runs))
        rows = table[[*KEPT, *(f"{ratio}_ratio" for ratio in RATIOS), "date", "machine"]]
        task = f"{name}, " + table["variant"] if "variant" in table else name
        tables.append(rows.assign(task=task)[["task", *rows.columns]])
    gathered = pd.concat(tables, ignore_index=True)
    path = folder / f"race_{scale}.csv"
    gathered.to_csv(path, index=False, float_format="%.6g")
    shown = gathered.drop(columns=["knob", "seeds", "final_loss_std", "date", "machine"])
    print(shown.to_string(index=False, float_format="%.3f"))
    return path


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--studies", default="digits,cifar10,transformer", help=f"of {', '.join(STUDIES)}"
    )
    parser.add_argument("--scale", default="small", choices=["small", "full", "tiny"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--runs", type=Path)
    options = parser.parse_args()
    names = options.studies.split(",")
    try:
        for name in names:
            if name not in STUDIES:
                raise to.InputError(f"study {name!r} is unknown: use some of {', '.join(STUDIES)}")
        print(race(names, options.scale, options.jobs, options.results, options.runs))
    except to.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
