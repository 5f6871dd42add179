"""One training of a sweep: built from its trial alone, stepped, recorded, and put in place only
when it is whole.

Every training that the project records goes through here; studies add what they measure beside the
record by `train`'s hooks.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import likelihood as named_likelihood
from thermo_opt.models import outputs_of, working_directory_last
from thermo_opt.runs import Recorder, load_run
from thermo_opt.sweep.config import Trial, nearest
from thermo_opt.sweep.records import RESULT, UNFINISHED, finished, seal, write_json
from thermo_opt.sweep.tasks import Pair, build_task, load_function, minibatches


class Step(NamedTuple):
    """One optimizer step: the minibatch's mean loss before it (nats), the seconds of forward pass,
    backward pass and optimizer step, and the examples of the minibatch."""

    loss: float
    seconds: float
    examples: int


class Trainer:
    """A trial's model, optimizer and data at the start of training; iterating takes the steps.

    Ends early where a loss isn't finite, without that step. Seconds are processor seconds of this
    thread on a CPU (of all its threads where torch uses several), wall seconds on a GPU. The
    caller keeps the random states it wants to keep.

    Attributes:
        trial: what is trained.
        task: its task for the trial's seed.
        model, optimizer: being trained; the model is in training mode.
        steps_done: optimizer steps taken.
        seconds: those of the steps taken.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.task = build_task(trial.task, trial.seed, trial.options)
        try:
            self.model = self.task.model.to(trial.training.device).train()
        except (RuntimeError, AssertionError) as error:
            raise InputError(
                f"[training] device {trial.training.device!r} can't be used: {error}"
            ) from None
        self.optimizer = build_optimizer(trial, self.model)
        self.steps_done, self.seconds = 0, 0.0

    def __iter__(self) -> Iterator[Step]:
        settings, clock, data = self.trial.training, self._clock(), self.batches()
        torch.manual_seed(self.trial.seed)
        scheduler = schedule(
            self.optimizer,
            settings.schedule,
            settings.steps,
            settings.warmup_steps,
            settings.min_lr_rate,
        )
        for _ in range(settings.steps):
            x, y = (part.to(settings.device) for part in next(data))
            start = clock()
            with torch.autocast(
                torch.device(settings.device).type,
                dtype=torch.bfloat16,
                enabled=settings.precision == "bfloat16",
            ):
                loss = loss_of(outputs_of(self.model(x)), y, self.trial.likelihood)
            self.optimizer.zero_grad()
            value = float(loss.detach())
            if not math.isfinite(value):
                return  # diverged: nothing after this can be audited
            loss.backward()
            self.optimizer.step()
            seconds = clock() - start
            scheduler.step()
            self.steps_done += 1
            self.seconds += seconds
            yield Step(value, seconds, len(x))

    def batches(self) -> Iterator[Pair]:
        """The minibatches of the training, from the first on."""
        generator = torch.Generator().manual_seed(self.trial.seed)
        return minibatches(self.task.train, self.trial.training.batch_size, generator)

    def evaluate(self, parts: Iterable[Pair]) -> tuple[float, float]:
        """Mean loss (nats per example, or per counted position) and accuracy over held-out data;
        the accuracy of outputs that are no class scores is NaN."""
        categorical = self.trial.likelihood == "categorical"
        loss, right, count = 0.0, 0, 0
        self.model.eval()
        with torch.no_grad():
            for inputs, labels in parts:
                x, y = (part.to(self.trial.training.device) for part in (inputs, labels))
                outputs = outputs_of(self.model(x))
                size = y.numel() if categorical else len(x)
                loss += float(loss_of(outputs, y, self.trial.likelihood)) * size
                right += int((outputs.argmax(-1) == y).sum()) if categorical else 0
                count += size
        self.model.train()
        return loss / count, right / count if categorical else math.nan

    def _clock(self) -> Callable[[], float]:
        if self.trial.training.device != "cpu":

            def synchronised() -> float:
                torch.cuda.synchronize()
                return time.perf_counter()

            return synchronised
        return time.thread_time if torch.get_num_threads() == 1 else time.process_time


Watch: TypeAlias = Callable[[Trainer, Path], AbstractContextManager[Callable[[Step], None]]]
"""A context around a recorded training; what it gives is called after each step."""


def train(
    trial: Trial,
    output: Path,
    *,
    watch: Watch | None = None,
    result: Callable[[Trainer, Path], dict[str, Any]] | None = None,
) -> None:
    """Train and record a trial, from its seed on the same numbers every time. A loss that isn't
    finite ends it early.

    Recorded under `UNFINISHED` and renamed when whole and sealed, so that a killed sweep leaves no
    half a run where a run should be.

    Args:
        trial: what is trained; the folder has its name.
        output: the sweep's folder.
        watch: entered around the training, given the trainer and the folder of the record; called
            after each step.
        result: what is to be known of the run beside its record, given the trainer after the last
            step and the folder; kept as JSON, null for what isn't finite.

    Raises:
        InputError: the run couldn't be recorded to its end, or the user's task, model or optimizer
            failed midway.
    """
    (output / UNFINISHED).mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{trial.name[:100]}.", dir=output / UNFINISHED))
    run, threads = scratch / "run", torch.get_num_threads()
    try:
        torch.set_num_threads(trial.training.threads)
        with torch.random.fork_rng():
            trainer = Trainer(trial)
            try:
                _record(trainer, run, watch)
            except InputError:
                raise
            except Exception as error:  # the user's model, data or optimizer
                raise InputError(
                    f"{trial.name} failed at step {trainer.steps_done + 1} "
                    f"({type(error).__name__}: {error}); finished runs are kept"
                ) from error
            found = None if result is None else result(trainer, run)
    finally:
        torch.set_num_threads(threads)
    snapshots = load_run(run).snapshots
    if not snapshots or snapshots[-1].step != trainer.steps_done:
        raise InputError(
            f"{output}: {trial.name} could not be recorded to its end: make room on the disk and "
            "run it again"
        )
    if found is not None:
        write_json(run / RESULT, found)
    seal(trial, run, trainer.steps_done)
    try:
        os.rename(run, output / trial.name)
    except OSError:
        if not finished(trial, output):  # a twin started before a kill may have come first
            raise
    shutil.rmtree(scratch, ignore_errors=True)


def check(trial: Trial, step: bool) -> str:
    """Build a trial, and take one optimizer step where ``step``: InputError if it can't be; returns
    its probe's fingerprint."""
    from thermo_opt.runs.probe import make_probe

    with torch.random.fork_rng():
        trainer = Trainer(trial)
        if step:
            try:
                next(iter(trainer), None)
            except InputError:
                raise
            except Exception as error:  # the user's model or optimizer
                raise InputError(
                    f"{trial.method} can't take a step ({type(error).__name__}: {error})"
                ) from error
    return make_probe(*trainer.task.probe).fingerprint


def build_optimizer(trial: Trial, model: nn.Module) -> torch.optim.Optimizer:
    """The trial's optimizer on this model; InputError names the method and what is wrong with its
    settings."""
    try:
        if trial.optimizer == "NGDT":
            return _ngdt(trial, model)
        if ":" in trial.optimizer:
            function = load_function(trial.optimizer, f"{trial.method}: optimizer")
            with working_directory_last():
                made = function(model, **trial.settings)
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


def _ngdt(trial: Trial, model: nn.Module) -> torch.optim.Optimizer:
    """NGD-T; ``metric`` may be a table of a kind and its options."""
    from thermo_opt.optim import EKFAC, KFAC, NGDT, Minibatch

    settings = dict(trial.settings)
    if isinstance(table := settings.get("metric"), dict):
        options = dict(table)
        kind = options.pop("kind", "kfac")
        layered = {"kfac": KFAC, "ekfac": EKFAC}
        made = layered[kind](**options) if kind in layered else Minibatch(kind, **options)
        settings["metric"] = made
    return NGDT(model, likelihood=trial.likelihood, **settings)


def _torch_optimizer(name: str) -> Any:
    known = {key: value for key, value in vars(torch.optim).items() if isinstance(value, type)}
    known = {
        k: v for k, v in known.items() if issubclass(v, torch.optim.Optimizer) and k != "Optimizer"
    }
    if name not in known:
        raise InputError(f"optimizer {name!r} is unknown: {nearest(name, ['NGDT', *known])}")
    return known[name]


def schedule(
    optimizer: torch.optim.Optimizer,
    kind: str,
    steps: int,
    warmup_steps: int = 0,
    min_lr_rate: float = 0.0,
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate's course, stepped after each optimizer step: a linear rise over
    ``warmup_steps``, times a cosine from 1 to ``min_lr_rate`` over all ``steps`` ("cosine") or 1
    ("constant")."""

    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        if kind == "constant":
            return rising
        half = (1 - min_lr_rate) / 2
        return rising * (min_lr_rate + half * (1 + math.cos(math.pi * min(step / steps, 1.0))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def loss_of(outputs: Tensor, targets: Tensor, likelihood: str) -> Tensor:
    """Mean negative log-likelihood, nats per example (per counted position, for sequences);
    Gaussian: of variance 1."""
    family = named_likelihood(likelihood)
    f = family.outputs(outputs, targets)
    y = family.targets(f, targets)
    if likelihood != "categorical":
        return family.nll(f, y).sum() / len(f)
    mask = family.mask(y)
    return family.nll(f, y).sum() / (y.numel() if mask is None else mask.sum())


def _record(trainer: Trainer, path: Path, watch: Watch | None) -> None:
    trial = trainer.trial
    recorder = Recorder(
        path,
        model=trainer.model,
        optimizer=trainer.optimizer,
        probe=trainer.task.probe,
        every=trial.training.every,
        likelihood=trial.likelihood,  # type: ignore[arg-type]
        sigma2=1.0 if trial.likelihood == "gaussian" else None,  # as in the loss
        batch_size=trial.training.batch_size or None,
        name=trial.name,
        notes={"sweep": trial.facts(), "method": trial.method},
    )
    with recorder, watch(trainer, path) if watch else nullcontext() as watched:
        for step in trainer:
            recorder.step(loss=step.loss, busy=step.seconds, examples=step.examples)
            if watched is not None:
                watched(step)
