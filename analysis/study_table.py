"""A study's tables: targets, one row per run, one row per method, all studies' ratios together, and
whether a re-run agrees with them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import thermo_opt as to
from analysis import tuning
from analysis.methods import knob, setting
from analysis.timing import RESULTS
from analysis.trials import Recorded
from thermo_opt.fronts import ParetoFront

REFERENCE = "AdamW"
"""Its runs set the targets, and ratios are over its values."""
CHOICES = ("best", "thrifty")
"""Settings of a method that have a row of their own: the lowest validation loss, and the smallest
setting that ends no higher than the reference's best, where that is another one."""
Choices = Mapping[str, Mapping[str, float | None]]
"""By method, the setting of each of `CHOICES`."""
TARGETS = ("half", "end")
REACHED = tuple(
    f"{what}_{label}" for label in TARGETS for what in ("steps", "seconds", "dissipation")
)
MEASURES = (
    *REACHED,
    *("final_loss", "accuracy", "validation_loss"),
    *(
        "dissipation",
        "efficiency",
        "straightness",
        "steadiness",
        "alignment_lower",
        "alignment_upper",
    ),
    *("ms_a_step", "memory", "peak_memory"),
)
"""Columns that both tables have; the methods' has their means over seeds, and ``<column>_std``.
``memory``: of the optimizer, over the parameters'; ``peak_memory``: of training steps, MiB."""
RATIOS = (*REACHED, "ms_a_step")
"""Columns that are also given over the reference's: ``<column>_ratio``."""


def targets_of(runs: Sequence[Recorded]) -> dict[str, float]:
    """Probe losses of the worst of these runs half-way and at the end, so that each of them reaches
    both."""
    found = dict.fromkeys(TARGETS, -math.inf)
    for run in runs:
        if run.track is not None:
            half = int(np.searchsorted(run.track.steps, run.trial.training.steps / 2))
            found["half"] = max(
                found["half"], float(run.track.loss[min(half, len(run.track.loss) - 1)])
            )
            found["end"] = max(found["end"], float(run.track.loss[-1]))
    return found


def front_of(runs: Sequence[Recorded], targets: Mapping[str, float]) -> ParetoFront:
    """The speed-cost front of these runs, one group per method; InputError where no run reaches a
    target."""
    tracks = [run.track for run in runs if run.track is not None]
    groups = [run.trial.method for run in runs if run.track is not None]
    return to.pareto(tracks, target_loss=list(targets.values()), groups=groups)


def choices_of(scores: Mapping[str, Mapping[float, float]], reference: str) -> Choices:
    """The setting of each of `CHOICES`, by method, from its tuning trials' validation losses."""
    return {
        method: {"best": tuning.best(tried), "thrifty": tuning.thrifty(tried, scores[reference])}
        for method, tried in scores.items()
    }


def rows_of_runs(
    runs: Sequence[Recorded], choices: Choices, targets: Mapping[str, float]
) -> pd.DataFrame:
    """One row per run; ``best``, ``thrifty``: at that setting of its method."""
    rows = []
    for run in runs:
        method, found = run.trial.method, run.found
        row: dict[str, Any] = {
            "method": method,
            "knob": knob(method),
            "setting": setting(run.trial),
            "seed": run.trial.seed,
        }
        row |= {choice: row["setting"] == choices[method][choice] for choice in CHOICES}
        for label, target in targets.items():
            reached = run.reached(target)
            row |= {f"{what}_{label}": value for what, value in reached.items()}
        row |= {name: found[name] for name in ("final_loss", "accuracy")}
        row["validation_loss"] = found["validation"]
        for name in ("dissipation", "efficiency", "straightness", "steadiness"):
            row[name] = found[name]
        for edge in ("lower", "upper"):
            row[f"alignment_{edge}"] = found.get(f"alignment_{edge}", math.nan)
        steps = found["steps_done"]
        row["ms_a_step"] = 1e3 * found["seconds"] / steps if steps else math.nan
        row["memory"], row["peak_memory"] = found["memory"], found.get("peak_memory", math.nan)
        row |= {name: found[name] for name in ("steps_done", "date", "thermo_opt", "machine")}
        rows.append(row | {"notes": "; ".join(notes(found))})
    return pd.DataFrame(rows)


def notes(found: Mapping[str, Any]) -> list[str]:
    """How a run's alignment was had, and why a value isn't known."""
    notes = []
    aligned = found.get("alignment", {})
    if aligned.get("steps"):
        notes.append(
            f"alignment at λ = {aligned['damping']:g}, {len(aligned['steps'])} steps a run, "
            f"{aligned['examples']} examples of each one's minibatch"
        )
    if aligned.get("frozen"):
        notes.append("batch normalisation frozen there at the minibatch's statistics")
    reasons = {"alignment": "alignment_reason", "peak memory": "peak_memory_reason"}
    return notes + [
        f"{what} unknown: {found[key]}" for what, key in reasons.items() if key in found
    ]


def rows_of_methods(
    rows: pd.DataFrame,
    scores: Mapping[str, Mapping[float, float]],
    choices: Choices,
    reference: str,
) -> pd.DataFrame:
    """One row per method and choice, of its runs there: mean and standard deviation over seeds (a
    mean only where every seed has a value).

    ``scores``: the validation losses of its tuning trials. ``reached_<target>``: how many of its
    seeds reach it. Ratios: of means, over the best of ``reference``, their standard deviation that
    of the ratios seed by seed. Alignment and peak memory are of the best only.
    """
    base = rows[rows["best"] & (rows["method"] == reference)].set_index("seed")
    table = []
    for method, choice in ((method, choice) for choice in CHOICES for method in scores):
        tried, chosen = scores[method], choices[method][choice]
        if chosen is None:
            continue
        own = rows[rows[choice] & (rows["method"] == method)].set_index("seed")
        row: dict[str, Any] = {
            "method": method,
            "choice": choice,
            "knob": knob(method),
            "setting": chosen,
            "trials": len(tried),
            "tried": " ".join(f"{value:g}" for value in sorted(tried)),
            "bracketed": tuning.bracketed(tried),
            "seeds": len(own),
        }
        row |= {f"reached_{label}": int(own[f"steps_{label}"].notna().sum()) for label in TARGETS}
        for name in MEASURES:
            row[name] = own[name].mean(skipna=False)
            row[f"{name}_std"] = own[name].std(skipna=False)
        for name in RATIOS:
            row[f"{name}_ratio"] = own[name].mean(skipna=False) / base[name].mean(skipna=False)
            row[f"{name}_ratio_std"] = (own[name] / base[name]).std(skipna=False)
        notes = dict.fromkeys(note for run in own["notes"] for note in run.split("; ") if note)
        table.append(row | {"reference": reference, "notes": "; ".join(notes)})
    return pd.DataFrame(table)


TOGETHER = (
    *("method", "choice", "knob", "setting", "bracketed", "seeds"),
    *("final_loss", "final_loss_std", "accuracy"),
    *(f"{name}_ratio" for name in RATIOS),
    *("date", "machine"),
)
"""Columns of the studies' tables that stand in their common one."""


def together(names: Sequence[str], scale: str, folder: Path) -> Path:
    """Gather the methods' rows of several studies from the tables they left; returns the path of
    race_<scale>.csv."""
    tables = []
    for name in names:
        path = folder / f"{name}_{scale}.csv"
        if not path.is_file():
            raise to.InputError(
                f"{path} does not exist: run python -m analysis study {name} --scale {scale} first"
            )
        table = pd.read_csv(path)
        task = f"{name}, " + table["variant"] if "variant" in table else name
        tables.append(table[list(TOGETHER)].assign(task=task)[["task", *TOGETHER]])
    gathered = pd.concat(tables, ignore_index=True)
    gathered.to_csv(folder / f"race_{scale}.csv", index=False, float_format="%.6g")
    shown = gathered.drop(columns=["knob", "seeds", "final_loss_std", "date", "machine"])
    print(shown.to_string(index=False, float_format="%.3f"))
    return folder / f"race_{scale}.csv"


_SPREADS = 2.0
"""Standard deviations over seeds by which a re-run's mean may differ."""
_RELATIVE = 0.02
"""Allowed besides, of the value: other builds of the libraries round sums differently."""
_TIMES_RELATIVE = 0.25
"""The same for times over the reference's; bare seconds belong to a machine and aren't compared."""
_MEMORY_RELATIVE = 0.1
"""The same for peak memory: it depends on the libraries' builds and on the system's allocator."""
_MEMORY_PAGES = 0.5
"""Allowed besides, in MiB: what pages of libraries and allocator add by chance."""


def differences(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """What of a re-run's methods' table lies outside the spread that the first one stated: one row
    each, empty when all agrees.

    Columns that the first table doesn't have yet are not compared.
    """
    if "choice" in after and "choice" not in before:
        after = after[after["choice"] == "best"]
    keys = [key for key in ("variant", "method", "choice") if key in before and key in after]
    first, second = before.set_index(keys), after.set_index(keys)
    rows: list[dict[str, Any]] = []
    for key in first.index:
        where = dict(zip(keys, key if isinstance(key, tuple) else (key,), strict=True))
        if key not in second.index:
            rows.append(
                {**where, "column": "method", "before": "run", "after": "not run", "allowed": ""}
            )
            continue
        old, new = first.loc[key], second.loc[key]
        if not math.isclose(old["setting"], new["setting"], rel_tol=1e-3):
            rows.append(
                {
                    **where,
                    "column": "setting",
                    "before": old["setting"],
                    "after": new["setting"],
                    "allowed": 0,
                }
            )
        for column in (*MEASURES, *(f"{name}_ratio" for name in RATIOS)):
            timed = column.startswith(("seconds", "ms"))
            if (timed and not column.endswith("_ratio")) or column not in old:
                continue
            was, now = float(old[column]), float(new[column])
            measured = column == "peak_memory"  # nothing to compare where one system couldn't
            if (math.isnan(was) and math.isnan(now)) or (
                measured and (math.isnan(was) or math.isnan(now))
            ):
                continue
            spread = float(old.get(f"{column}_std", math.nan))
            allowed = _SPREADS * (0.0 if math.isnan(spread) else spread)
            allowed += (
                _TIMES_RELATIVE if timed else _MEMORY_RELATIVE if measured else _RELATIVE
            ) * abs(was)
            allowed += _MEMORY_PAGES if measured else 0.0
            if not abs(now - was) <= allowed:
                rows.append(
                    {**where, "column": column, "before": was, "after": now, "allowed": allowed}
                )
    return pd.DataFrame(rows, columns=[*keys, "column", "before", "after", "allowed"])


def main(arguments: list[str]) -> None:
    """Gather the studies' ratios to AdamW in one table, from the tables they left."""
    parser = argparse.ArgumentParser(prog="analysis table", description=main.__doc__)
    parser.add_argument("--studies", default="digits,cifar10,imagenet,transformer")
    parser.add_argument("--scale", default="small", choices=["small", "full", "tiny"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    print(together(options.studies.split(","), options.scale, options.results))
