"""A study's runs: what each is, what is measured of it, and where it is recorded.

They are trained by `thermo_opt.sweep`; this adds names that change with all that a run's result
depends on, weights around a few moments, and the result.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import thermo_opt as to
from analysis.methods import METHODS, WEIGHT_DECAY
from analysis.study_memory import state_size
from analysis.timing import machine
from thermo_opt.fronts import Trajectory, read_trajectory
from thermo_opt.sweep import Step, Trainer, Training, Trial, finished, read_result, train

RUNS = Path(__file__).parent / "runs"
WEIGHTS = "weights"
"""Sub-folder of a run: weights around a few moments, for the parameter lens."""
MOMENTS = (0.1, 0.3, 0.5, 0.8)
"""Where in a run the parameter lens looks, as fractions of its length."""
SUMMARY = (
    *("dissipation", "length", "distance", "least_distance"),
    *("duration", "efficiency", "straightness", "steadiness"),
)


def trial_of(
    task: str,
    options: Mapping[str, Any],
    method: str,
    settings: Mapping[str, Any],
    seed: int,
    length: int,
    *,
    every: int = 10,
    device: str = "cpu",
    decay: bool = False,
    data: str | None = None,
    aligned: int = 0,
    min_lr_rate: float = 0.05,
    precision: str = "float32",
) -> Trial:
    """One run of a method of `METHODS` on a task of `analysis.tasks`, or of "module:function".

    All share the schedule: a linear warm-up (20 steps; a fiftieth of long runs), then a cosine to
    ``min_lr_rate``. ``settings`` go over the method's own, but for ``warmup_steps``, which is the
    schedule's. ``aligned`` above 0 keeps weights.
    """
    own = METHODS[method]
    chosen = {**own.settings, **settings}
    if decay and "weight_decay" not in settings:
        chosen["weight_decay"] = WEIGHT_DECAY[method]
    warmup = chosen.pop("warmup_steps", max(min(20, length // 5), length // 50, 1))
    passed = {**options, **({} if data is None else {"data": data})}
    training = Training(
        steps=length,
        batch_size=passed.pop("batch_size", 128),
        every=every,
        schedule="cosine",
        device=device,
        warmup_steps=warmup,
        min_lr_rate=min_lr_rate,
        precision=precision,
    )
    trial = Trial(
        "",
        method,
        task if ":" in task else f"analysis.tasks:{task}",
        "categorical",
        training,
        own.optimizer,
        chosen,
        seed,
        passed,
    )
    tuned = [key for key in settings if key in own.grid] or list(settings)
    shown = {key: chosen.get(key, warmup) for key in tuned}
    knobs = [f"{k}={v if v is None else format(v, '.4g')}" for k, v in shown.items()]
    label = "-".join([method, *knobs, f"seed={seed}"])
    facts = {**trial.facts(), "aligned": aligned, "code": _code(own.optimizer == "NGDT")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]
    return replace(trial, name=f"{label}-{digest}".replace(" ", "_"))


@functools.cache
def _code(ngdt: bool) -> str:
    """Fingerprint of the modules that determine a run, comments and layout aside; NGD-T's own count
    only for its runs."""
    here, package = Path(__file__).parent, Path(to.__file__).parent
    files = [here / f"{name}.py" for name in ("images", "methods", "networks", "tasks")]
    files.append(package / "sweep" / "training.py")
    if ngdt:
        for folder in ("optim", "fisher/kronecker"):
            files += sorted((package / folder).rglob("*.py"))
    parts = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def record(trial: Trial, folder: Path, aligned: int = 0) -> Trial:
    """Train and record a trial into a folder of its name, with its result, unless that is done;
    returns the trial."""
    if not finished(trial, folder):
        train(trial, folder, watch=keep_weights if aligned else None, result=measured)
    return trial


@contextlib.contextmanager
def keep_weights(trainer: Trainer, folder: Path) -> Iterator[Any]:
    """Record the weights before and after the steps at `MOMENTS`."""
    length = trainer.trial.training.steps
    wanted = {step for moment in MOMENTS for step in around(moment, length)}
    recorder = to.Recorder(
        folder / WEIGHTS,
        model=trainer.model,
        optimizer=trainer.optimizer,
        probe=None,
        every=lambda step: step in wanted,
        params=True,
    )

    def watched(step: Step) -> None:
        recorder.step(loss=step.loss)

    recorder.__enter__()
    try:
        yield watched
    finally:
        recorder.close(final_snapshot=False)


def around(moment: float, length: int) -> tuple[int, int]:
    """The step of a moment and the one after it."""
    first = max(1, min(round(moment * length), length - 1))
    return first, first + 1


def measured(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """A run's result: what it cost, its losses on validation and test data (NaN when it diverged),
    and what the outputs lens says (NaN where it has no path)."""
    task = trainer.task
    diverged = trainer.steps_done < trainer.trial.training.steps
    parts = [task.probe] if task.test is None else task.test()
    loss, accuracy = (math.nan, math.nan) if diverged else trainer.evaluate(parts)
    validation = math.nan
    if not diverged and task.validation is not None:
        validation = trainer.evaluate([task.validation])[0]
    weights = sum(p.nbytes for p in trainer.model.parameters())
    try:
        summary = to.audit(folder, lens="outputs").summary
    except to.InputError:  # it diverged at once
        summary = dict.fromkeys(SUMMARY, math.nan)
    return {
        "trial": asdict(trainer.trial),
        "steps_done": trainer.steps_done,
        "seconds": trainer.seconds,
        "memory": state_size(trainer.optimizer) / weights,
        "validation": validation,
        "final_loss": loss,
        "accuracy": accuracy,
        **{key: summary[key] for key in SUMMARY},
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "thermo_opt": to.__version__,
    }


def batches(trial: Trial) -> Iterator[tuple[Tensor, Tensor]]:
    """The minibatches that a trial is trained on, in order."""
    return Trainer(trial).batches()


@dataclass(frozen=True, eq=False)
class Recorded:
    """A finished run: its trial, its result, its line in the speed-cost plane (None when it
    diverged at once) and the seconds its steps took."""

    trial: Trial
    found: dict[str, Any]
    track: Trajectory | None
    seconds: np.ndarray

    def seconds_at(self, step: float) -> float:
        """Seconds up to a step, which may lie between two; NaN for none."""
        if math.isnan(step):
            return math.nan
        return float(np.interp(step, np.arange(len(self.seconds)), self.seconds))

    def reached(self, target: float) -> dict[str, float]:
        """Steps, seconds and dissipation to a probe loss; NaN where it is never met, or was at the
        start."""
        crossing = None
        if self.track is not None and self.track.loss[0] > target:
            crossing = self.track.crossing(target)
        if crossing is None or not crossing.reached:
            return dict.fromkeys(("steps", "seconds", "dissipation"), math.nan)
        return {
            "steps": crossing.step,
            "seconds": self.seconds_at(crossing.step),
            "dissipation": crossing.dissipation,
        }


def read(trial: Trial, folder: Path) -> Recorded:
    """A finished run, its every snapshot checked to lie on or above the universal frontier."""
    run = to.load_run(folder / trial.name)
    busy = run.steps["busy"].to_numpy(dtype=float) if "busy" in run.steps else np.zeros(0)
    track = None
    with contextlib.suppress(to.InputError):  # a run that diverged at once
        track = read_trajectory(run)
    if track is not None:
        assert_above_frontier(run, track)
    seconds = np.concatenate([[0.0], np.cumsum(busy)])
    return Recorded(trial, read_result(folder / trial.name), track, seconds)


def assert_above_frontier(run: to.Run, track: Trajectory) -> None:
    """AssertionError when a point of a run lies below the frontier, ``Q T < D*(loss)²/2``, D* from
    the run's starting predictions (§5)."""
    logits, targets = run.snapshots[0].load("probe/logits").double(), run.probe.targets  # type: ignore[union-attr]
    assert targets is not None
    rows: Tensor = torch.softmax(logits.flatten(0, -2), -1)
    chances = rows.gather(1, targets.long().reshape(-1, 1)).numpy()
    points: Iterable[Any] = zip(track.steps, track.loss, track.time, track.dissipation, strict=True)
    for step, loss, time, spent in points:
        least = to.least_distance(chances, float(loss)) ** 2 / 2 if math.isfinite(loss) else 0.0
        # Q T and D*²/2 are known to a relative rounding; D* of a loss that is the start's, to 1e-10
        if spent * time < least * (1 - 1e-9) - 1e-20:
            raise AssertionError(
                f"{run.path} at step {step}: Q·T = {spent * time:.9g} lies below the frontier "
                f"D*²/2 = {least:.9g}"
            )
