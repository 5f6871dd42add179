"""Training a task with a method: the loop that every study shares, watched (`curve`) or recorded
(`record`)."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import thermo_opt as to
from analysis.memory import state_size
from analysis.methods import METHODS, Method, cosine
from analysis.tasks import TASKS, Task, cross_entropy
from analysis.timing import machine
from thermo_opt.arguments import jsonable

STRIDE = 10
"""Steps between rows of a `curve`."""
RESULT = "study.json"
"""What a finished run holds beside its record."""
WEIGHTS = "weights"
"""Sub-folder of a run: weights around a few moments, for the parameter lens."""
MOMENTS = (0.1, 0.3, 0.5, 0.8)
"""Where in a run the parameter lens looks, as fractions of its length."""
UNFINISHED = ".unfinished"


class Training:
    """A task, its model at the start and a method's optimizer; iterating takes the steps.

    Each gives the minibatch's loss before it (nats) and the seconds that forward, backward and
    optimizer step took: processor seconds of this thread on a CPU (of all its threads if torch uses
    several), wall seconds on a GPU. Ends early when a loss isn't finite.
    """

    def __init__(
        self,
        task: Task,
        method: Method,
        setting: float,
        seed: int,
        length: int,
        device: str = "cpu",
        decay: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.task, self.length, self.device = task, length, device
        self.model = task.build(seed).to(device)
        self.optimizer = method.make(self.model, setting)
        if decay:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = method.weight_decay
        self._data = task.batches(seed)
        self._scheduler = cosine(self.optimizer, length)
        self.steps_done = 0

    def __iter__(self) -> Iterator[tuple[float, float]]:
        clock = self._clock()
        for _ in range(self.length):
            x, y = (part.to(self.device) for part in next(self._data))
            start = clock()
            loss = cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            value = float(loss.detach())
            if not math.isfinite(value):
                return
            self.optimizer.step()
            seconds = clock() - start
            self._scheduler.step()
            self.steps_done += 1
            yield value, seconds

    def evaluate(self, parts: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean loss (nats) and accuracy over held-out data."""
        self.model.eval()
        loss, right, count = 0.0, 0, 0
        with torch.no_grad():
            for x, y in parts:
                outputs, targets = self.model(x.to(self.device)), y.to(self.device)
                loss += float(cross_entropy(outputs, targets)) * targets.numel()
                right += int((outputs.argmax(-1) == targets).sum())
                count += targets.numel()
        self.model.train()
        return loss / count, right / count

    def _clock(self) -> Callable[[], float]:
        if self.device != "cpu":

            def synchronised() -> float:
                torch.cuda.synchronize()
                return time.perf_counter()

            return synchronised
        return time.thread_time if torch.get_num_threads() == 1 else time.process_time


def curve(task: Task, method: Method, setting: float, seed: int, length: int) -> pd.DataFrame:
    """One unrecorded run: a row every `STRIDE` steps with step, seconds, dissipation so far
    (outputs lens), probe loss and mean training loss since the last row; ``attrs["validation"]``:
    final loss on the validation data.
    """
    training = Training(task, method, setting, seed, length)
    x, y = task.probe

    def predictions() -> tuple[Tensor, float]:
        training.model.eval()
        with torch.no_grad():
            outputs = training.model(x)
        training.model.train()
        return outputs.flatten(0, -2), float(cross_entropy(outputs, y))

    before, loss = predictions()
    rows = [{"step": 0, "seconds": 0.0, "dissipation": 0.0, "loss": loss, "train_loss": math.nan}]
    seconds, dissipation, recent = 0.0, 0.0, []
    for value, spent in training:
        seconds += spent
        recent.append(value)
        if training.steps_done % STRIDE == 0:
            after, loss = predictions()
            if not math.isfinite(loss):
                break
            distance = to.fisher_rao(before.double().numpy(), after.double().numpy(), kind="logits")
            dissipation += float(distance) ** 2 / (2 * STRIDE)
            before = after
            rows.append(
                {
                    "step": training.steps_done,
                    "seconds": seconds,
                    "dissipation": dissipation,
                    "loss": loss,
                    "train_loss": float(np.mean(recent)),
                }
            )
            recent = []
    frame = pd.DataFrame(rows)
    frame.attrs["validation"] = training.evaluate(iter([task.validation]))[0]
    return frame


def first_reach(run: pd.DataFrame, target: float) -> dict[str, float]:
    """Step, seconds and dissipation at which a `curve` first reaches the target (linear between
    rows); NaN when it never does."""
    below = np.flatnonzero(run["loss"].to_numpy() <= target)
    if not len(below) or below[0] == 0:
        return dict.fromkeys(("steps", "seconds", "dissipation"), math.nan)
    i = int(below[0])
    left, right = run.iloc[i - 1], run.iloc[i]
    t = (left["loss"] - target) / (left["loss"] - right["loss"])
    return {
        name: float(left[column] + t * (right[column] - left[column]))
        for name, column in (
            ("steps", "step"),
            ("seconds", "seconds"),
            ("dissipation", "dissipation"),
        )
    }


@dataclass(frozen=True)
class Trial:
    """One run of a study: everything its result depends on, in plain values.

    ``every``: steps between recorded predictions. ``aligned``: examples of a minibatch that the
    parameter lens will read (0: no weights are kept). ``decay``: with the methods' weight decay.
    """

    task: str
    options: dict[str, Any]
    data: str | None
    method: str
    setting: float
    seed: int
    length: int
    every: int = STRIDE
    aligned: int = 0
    device: str = "cpu"
    decay: bool = False

    @property
    def name(self) -> str:
        """The run's folder: what it is in words, and a fingerprint of all it depends on, the code
        that trains it included."""
        facts = json.dumps(
            {**asdict(self), "code": _code(self.method.startswith("NGD-T"))}, sort_keys=True
        )
        digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
        label = f"{self.method}-{METHODS[self.method].knob}={self.setting:g}-seed={self.seed}"
        return f"{label}-{digest}".replace(" ", "_")


@functools.cache
def _code(ngdt: bool) -> str:
    """Fingerprint of the modules that determine a run, comments and layout aside; NGD-T's own count
    only for its runs."""
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in ("images", "methods", "networks", "tasks")]
    if ngdt:
        package = Path(to.__file__).parent
        files += sorted(
            [*(package / "optim").glob("*.py"), *(package / "fisher" / "kronecker").glob("*.py")]
        )
        files += [package / "fisher" / "spectral.py", package / "fisher" / "likelihoods.py"]
    parts = [ast.dump(ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_task(trial: Trial) -> Task:
    """The trial's task; the last one is kept, since a process trains many methods on it."""
    return _load_task(trial.task, json.dumps(trial.options), trial.data)


@functools.lru_cache(maxsize=1)
def _load_task(name: str, options: str, data: str | None) -> Task:
    return TASKS[name](None if data is None else Path(data), **json.loads(options))


def is_finished(folder: Path) -> bool:
    """Whether a run is recorded there, whole and with its result."""
    return (folder / RESULT).is_file()


def record(trial: Trial, folder: Path) -> Trial:
    """Train and record a trial into a folder (named by `Trial.name`), unless that is done; returns
    the trial.

    Written under `UNFINISHED` beside it and renamed when whole: a killed study leaves no half a run
    where a run should be.
    """
    if is_finished(folder):
        return trial
    if trial.device == "cpu":
        torch.set_num_threads(1)
    task = load_task(trial)
    (folder.parent / UNFINISHED).mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="run.", dir=folder.parent / UNFINISHED))
    run = scratch / "run"
    training = Training(
        task,
        METHODS[trial.method],
        trial.setting,
        trial.seed,
        trial.length,
        trial.device,
        trial.decay,
    )
    found: dict[str, Any] = {"trial": {k: v for k, v in asdict(trial).items() if k != "data"}}
    seconds = _train_recorded(trial, task, training, run)
    diverged = training.steps_done < trial.length
    found |= {
        "steps_done": training.steps_done,
        "seconds": seconds,
        "memory": state_size(training.optimizer)
        / sum(p.nbytes for p in training.model.parameters()),
        "validation": math.nan if diverged else training.evaluate(iter([task.validation]))[0],
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "thermo_opt": to.__version__,
    }
    tested = (math.nan, math.nan)
    if not diverged:
        tested = training.evaluate(iter([task.probe]) if task.test is None else task.test())
    found["final_loss"], found["accuracy"] = tested
    found |= _audited(run)
    (run / RESULT).write_text(
        json.dumps(jsonable(found), indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    try:
        os.rename(run, folder)
    except OSError:
        if not is_finished(folder):  # a twin, started before a kill, may have come first
            raise
    shutil.rmtree(scratch, ignore_errors=True)
    return trial


def _train_recorded(trial: Trial, task: Task, training: Training, folder: Path) -> float:
    """Train with a recorder of the probe's predictions, and one of the weights where wanted; total
    seconds of the steps."""
    common: dict[str, Any] = {"model": training.model, "optimizer": training.optimizer}
    outputs = to.Recorder(
        folder,
        **common,
        probe=task.probe,
        every=trial.every,
        batch_size=task.batch_size,
        name=f"{trial.method}, {METHODS[trial.method].knob} {trial.setting:g}, seed {trial.seed}",
    )
    weights = None
    if trial.aligned:
        wanted = {k for m in MOMENTS for k in around(m, trial.length)}
        weights = to.Recorder(
            folder / WEIGHTS, **common, probe=None, every=lambda k: k in wanted, params=True
        )
    total = 0.0
    with outputs:
        if weights is not None:
            weights.__enter__()
        try:
            for loss, seconds in training:
                total += seconds
                outputs.step(loss=loss, busy=seconds, examples=task.batch_size)
                if weights is not None:
                    weights.step(loss=loss)
        finally:
            if weights is not None:
                weights.close(final_snapshot=False)
    return total


def around(moment: float, length: int) -> tuple[int, int]:
    """The step of a moment and the one after it."""
    first = max(1, min(round(moment * length), length - 1))
    return first, first + 1


def _audited(folder: Path) -> dict[str, Any]:
    """What the outputs lens says of a recorded run; NaN where it has no path, because it diverged
    at once."""
    keys = (
        "dissipation",
        "length",
        "distance",
        "least_distance",
        "duration",
        "efficiency",
        "straightness",
        "steadiness",
    )
    try:
        summary = to.audit(folder, lens="outputs").summary
    except to.InputError:
        return dict.fromkeys(keys, math.nan)
    return {key: summary[key] for key in keys}


def result(folder: Path) -> dict[str, Any]:
    """A finished run's result; NaN for what couldn't be known."""
    found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return {key: math.nan if value is None else value for key, value in found.items()}


def add_to_result(folder: Path, what: dict[str, Any]) -> None:
    """Add values to a finished run's result, or replace them; all at once, whenever the process may
    be killed."""
    path = folder / RESULT
    found = json.loads(path.read_text(encoding="utf-8")) | jsonable(what)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
