"""What a study's recorded runs say: targets, a row a run, a row a method, and the frontier that no
run may cross."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import thermo_opt as to
from analysis import tuning
from analysis.methods import METHODS
from analysis.training import Trial, result
from thermo_opt.fronts.front import ParetoFront
from thermo_opt.fronts.trajectory import Trajectory, read_trajectory

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
_ROUNDING = 1e-9
_RESOLUTION = 1e-20
"""Of D*²/2 where a loss is the start's but for rounding."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """A finished run: its trial, its result, its line in the speed-cost plane (None when it
    diverged at once) and the seconds its steps took."""

    trial: Trial
    found: dict[str, Any]
    track: Trajectory | None
    seconds: np.ndarray

    def seconds_at(self, step: float) -> float:
        """Seconds up to a step, which may lie between two."""
        return float(np.interp(step, np.arange(len(self.seconds)), self.seconds))


def read(trial: Trial, folder: Path) -> Recorded:
    """A finished run, its every snapshot checked to lie on or above the universal frontier."""
    run = to.load_run(folder)
    busy = run.steps["busy"].to_numpy(dtype=float) if "busy" in run.steps else np.zeros(0)
    track = None
    with contextlib.suppress(to.InputError):  # a run that diverged at once
        track = read_trajectory(run)
    if track is not None:
        assert_above_frontier(run, track)
    return Recorded(trial, result(folder), track, np.concatenate([[0.0], np.cumsum(busy)]))


def assert_above_frontier(run: to.Run, track: Trajectory) -> None:
    """AssertionError when a point of a run lies below the frontier, ``Q T < D*(loss)²/2``, D* from
    the run's starting predictions (§5)."""
    logits, targets = run.snapshots[0].load("probe/logits").double(), run.probe.targets  # type: ignore[union-attr]
    assert targets is not None
    chances = (
        torch.softmax(logits.flatten(0, -2), -1).gather(1, targets.long().reshape(-1, 1)).numpy()
    )
    for step, loss, time, spent in zip(
        track.steps, track.loss, track.time, track.dissipation, strict=True
    ):
        least = to.least_distance(chances, float(loss)) ** 2 / 2 if math.isfinite(loss) else 0.0
        if spent * time < least * (1 - _ROUNDING) - _RESOLUTION:
            raise AssertionError(
                f"{run.path} at step {step}: Q·T = {spent * time:.9g} lies below the frontier "
                f"D*²/2 = {least:.9g}"
            )


def targets_of(runs: Sequence[Recorded]) -> dict[str, float]:
    """Probe losses of the worst of these runs half-way and at the end, so that each of them reaches
    both."""
    found = dict.fromkeys(TARGETS, -math.inf)
    for run in runs:
        if run.track is not None:
            half = int(np.searchsorted(run.track.steps, run.trial.length / 2))
            found["half"] = max(
                found["half"], float(run.track.loss[min(half, len(run.track.loss) - 1)])
            )
            found["end"] = max(found["end"], float(run.track.loss[-1]))
    return found


def front_of(runs: Sequence[Recorded], targets: Mapping[str, float]) -> ParetoFront:
    """The speed-cost front of these runs, a group a method; InputError where no run reaches a
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
    runs: Sequence[Recorded],
    choices: Choices,
    front: ParetoFront | None,
    targets: Mapping[str, float],
) -> pd.DataFrame:
    """One row a run; ``best``, ``thrifty``: at that setting of its method. ``front``: None leaves
    what depends on targets unknown."""
    drawn = [run for run in runs if run.track is not None]
    crossings: dict[str, pd.DataFrame] = {}
    if front is not None:
        crossings = {
            label: front.rows(target).reset_index(drop=True) for label, target in targets.items()
        }
    rows = []
    for run in runs:
        trial, found = run.trial, run.found
        row: dict[str, Any] = {
            "method": trial.method,
            "knob": METHODS[trial.method].knob,
            "setting": trial.setting,
            "seed": trial.seed,
        }
        row |= {choice: trial.setting == choices[trial.method][choice] for choice in CHOICES}
        for label in targets:
            row |= dict.fromkeys(
                (f"{what}_{label}" for what in ("steps", "seconds", "dissipation")), math.nan
            )
            if run.track is not None and label in crossings:
                met = crossings[label].iloc[[drawn.index(run)]]
                step, spent = (float(met[name].to_numpy()[0]) for name in ("step", "dissipation"))
                row[f"steps_{label}"], row[f"dissipation_{label}"] = step, spent
                row[f"seconds_{label}"] = run.seconds_at(step) if math.isfinite(step) else math.nan
        row |= {name: found[name] for name in ("final_loss", "accuracy")}
        row["validation_loss"] = found["validation"]
        row |= {
            name: found[name]
            for name in ("dissipation", "efficiency", "straightness", "steadiness")
        }
        row |= {
            f"alignment_{edge}": found.get(f"alignment_{edge}", math.nan)
            for edge in ("lower", "upper")
        }
        row["ms_a_step"] = (
            1e3 * found["seconds"] / found["steps_done"] if found["steps_done"] else math.nan
        )
        row["memory"], row["peak_memory"] = found["memory"], found.get("peak_memory", math.nan)
        row |= {name: found[name] for name in ("steps_done", "date", "thermo_opt", "machine")}
        row["notes"] = "; ".join(_notes(found))
        rows.append(row)
    return pd.DataFrame(rows)


def _notes(found: Mapping[str, Any]) -> list[str]:
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
    """One row a method and choice, of its runs there: mean and standard deviation over seeds (a
    mean only where every seed has a value).

    ``scores``: the validation losses of its tuning trials. ``reached_<target>``: how many of its
    seeds reach it. Ratios: of means, over the best of ``reference``, their standard deviation that
    of the ratios seed by seed. Alignment and peak memory are of the best only.
    """
    base = rows[rows["best"] & (rows["method"] == reference)].set_index("seed")
    table = []
    for method, choice in ((method, choice) for choice in CHOICES for method in scores):
        tried, setting = scores[method], choices[method][choice]
        if setting is None:
            continue
        own = rows[rows[choice] & (rows["method"] == method)].set_index("seed")
        row: dict[str, Any] = {
            "method": method,
            "choice": choice,
            "knob": METHODS[method].knob,
            "setting": setting,
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
