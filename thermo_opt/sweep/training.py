"""One run of a sweep: built from its trial alone, trained, recorded, and put in place only when it
is whole."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from thermo_opt.errors import InputError
from thermo_opt.models import outputs_of
from thermo_opt.runs import Recorder, load_run
from thermo_opt.runs.format import RUN_FILE, read_run_file
from thermo_opt.sweep.config import Trial, nearest
from thermo_opt.sweep.tasks import build_task, is_pair, load_function

UNFINISHED = ".unfinished"
"""Folder of the runs being trained: a run's own folder exists only when the run is whole."""


def finished(trial: Trial, output: Path) -> bool:
    """Whether the trial's run is recorded already; InputError when another trial's lies in its
    place."""
    folder = output / trial.name
    if not (folder / RUN_FILE).is_file():
        if folder.exists():
            raise InputError(
                f"{folder} exists and holds no run of this sweep: move it, or choose another output"
            )
        return False
    was = read_run_file(folder).get("notes", {}).get("sweep")
    now = trial.facts()
    if was != now:
        changed = next(
            (k for k in now if not isinstance(was, dict) or was.get(k) != now[k]), "settings"
        )
        raise InputError(
            f"{folder} was trained with another {changed} than the sweep now says: choose another "
            "output, or remove it"
        )
    return True


def train(trial: Trial, output: Path) -> None:
    """Train and record a trial, from its seed on the same numbers every time. A loss that isn't
    finite ends it early.

    Recorded under `UNFINISHED` and renamed when whole, so that a killed sweep leaves no half a run
    where a run should be.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f"{trial.name}.", dir=output / UNFINISHED))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(trial.training.threads)
        with torch.random.fork_rng():
            done = _record(trial, scratch / "run")
    finally:
        torch.set_num_threads(threads)
    snapshots = load_run(scratch / "run").snapshots
    if not snapshots or snapshots[-1].step != done:
        raise InputError(
            f"{output}: {trial.name} could not be recorded to its end: make room on the disk and "
            "run it again"
        )
    try:
        os.rename(scratch / "run", output / trial.name)
    except OSError:
        if not finished(trial, output):  # a twin started before a kill may have come first
            raise
    shutil.rmtree(scratch, ignore_errors=True)


def check(trial: Trial, step: bool) -> str:
    """Build a trial, and take one optimizer step where ``step``: InputError if it can't be; returns
    its probe's fingerprint."""
    from thermo_opt.runs.probe import make_probe

    with torch.random.fork_rng():
        model, data, probe = build_task(trial.task, trial.seed)
        try:
            model.to(trial.training.device).train()
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"[training] device {trial.training.device!r} can't be used: {error}"
            ) from None
        optimizer = build_optimizer(trial, model)
        if step:
            try:
                x, y = next(batches(data, trial))
                loss_of(outputs_of(model(x)), y, trial.likelihood).backward()
                optimizer.step()
            except InputError:
                raise
            except Exception as error:  # the user's model or optimizer
                raise InputError(
                    f"{trial.method} can't take a step ({type(error).__name__}: {error})"
                ) from error
    return make_probe(*probe).fingerprint


def build_optimizer(trial: Trial, model: nn.Module) -> torch.optim.Optimizer:
    """The trial's optimizer on this model; InputError names the method and what is wrong with its
    settings."""
    try:
        if trial.optimizer == "NGDT":
            from thermo_opt.optim import NGDT

            return NGDT(model, likelihood=trial.likelihood, **trial.settings)
        if ":" in trial.optimizer:
            made = load_function(trial.optimizer, f"{trial.method}: optimizer")(
                model, **trial.settings
            )
        else:
            made = _torch_optimizer(trial.optimizer)(model.parameters(), **trial.settings)
    except (TypeError, ValueError, KeyError) as error:  # InputError is a ValueError
        raise InputError(f"{trial.method} with {trial.settings}: {error}") from None
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(
            f"{trial.method}: {trial.optimizer} returned {type(made).__name__}, not a torch "
            "Optimizer"
        )
    return made


def _torch_optimizer(name: str) -> Any:
    known = {key: value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    known = {
        k: v for k, v in known.items() if issubclass(v, torch.optim.Optimizer) and k != "Optimizer"
    }
    if name not in known:
        raise InputError(f"optimizer {name!r} is unknown: {nearest(name, ['NGDT', *known])}")
    return known[name]


def batches(data: Any, trial: Trial) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled passes over the training data without end, in an order that depends on the seed
    alone."""
    from torch.utils.data import default_collate

    tensors = is_pair(data)
    count = len(data[0]) if tensors else len(data)
    size = min(trial.training.batch_size or count, count)
    generator = torch.Generator().manual_seed(trial.seed)
    device = trial.training.device
    while True:
        order = torch.randperm(count, generator=generator) if size < count else torch.arange(count)
        for rows in order[: count // size * size].split(size):
            x, y = (
                (part[rows] for part in data)
                if tensors
                else default_collate([data[int(i)] for i in rows])
            )
            yield x.to(device), y.to(device)


def loss_of(outputs: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """Mean negative log-likelihood, nats an example (a counted position, for sequences); Gaussian:
    of variance 1."""
    if likelihood == "categorical":
        return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())
    targets = targets.reshape(outputs.shape).to(outputs.dtype)
    if likelihood == "bernoulli":
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(
            outputs
        )
    constant = 0.5 * math.log(2 * math.pi) * outputs[0].numel()
    return 0.5 * (outputs - targets).square().sum() / len(outputs) + constant


def _record(trial: Trial, path: Path) -> int:
    """Train and record; returns the number of steps taken."""
    model, data, probe = build_task(trial.task, trial.seed)
    model.to(trial.training.device).train()
    optimizer = build_optimizer(trial, model)
    steps = trial.training.steps
    scheduler = None
    if trial.training.schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(trial.seed)
    recorder = Recorder(
        path,
        model=model,
        optimizer=optimizer,
        probe=probe,
        every=trial.training.every,
        likelihood=trial.likelihood,  # type: ignore[arg-type]
        batch_size=trial.training.batch_size or None,
        name=trial.name,
        notes={"sweep": trial.facts(), "method": trial.method},
    )
    with recorder:
        for _, (x, y) in zip(range(steps), batches(data, trial), strict=False):
            optimizer.zero_grad()
            loss = loss_of(outputs_of(model(x)), y, trial.likelihood)
            if not math.isfinite(float(loss.detach())):
                break  # diverged: nothing after this can be audited
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            recorder.step(loss=loss, examples=len(x))
    return recorder.steps_done
