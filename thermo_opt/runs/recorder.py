"""`Recorder`: writes a training run to disk while it happens, without changing it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt import arguments, likelihoods
from thermo_opt.errors import InputError, first_line, warn_only
from thermo_opt.runs import remote
from thermo_opt.runs.adam_moments import adam_moments
from thermo_opt.runs.batches import BATCH_FOLDER, batch_path
from thermo_opt.runs.energy import EnergyMeter
from thermo_opt.runs.format import (
    PARTIAL,
    PROBE_FILE,
    RUN_FILE,
    SNAPSHOT_FOLDER,
    STEPS_FILE,
    snapshot_path,
    write_atomically,
    write_tensors,
)
from thermo_opt.runs.header import described, encoded
from thermo_opt.runs.learning_rates import Rates, UsedRates, ratio
from thermo_opt.runs.probe import Inputs, probe_tensors
from thermo_opt.runs.probing import ProbeObserver
from thermo_opt.runs.progress import Progress
from thermo_opt.runs.readers import own
from thermo_opt.runs.replicas import LR_RATIO, REPLICA_FOLDER, ReplicaSteps, replica_path
from thermo_opt.runs.resume import resume as resume_run
from thermo_opt.runs.run import CLOCKS, Likelihood
from thermo_opt.runs.snapshot_schedule import Every, schedule
from thermo_opt.runs.writer import FolderLock, SnapshotWriter, StepLog


class Recorder:
    """Record a run while it trains, without changing the training.

        with Recorder(path, model=model, optimizer=optimizer, probe=(x, y)) as recorder:
            ...
            optimizer.step()
            recorder.step(loss=loss)

    Takes snapshot 0 on entering, one whenever ``every`` says so, and one of the last step on
    leaving. Files are written by a worker thread, each by rename with fsync, so a killed run is
    readable up to its last whole snapshot. The training is bit for bit the one it would be
    unrecorded. If writing or probing fails midway (full disk), recording stops with one warning and
    training goes on; if ``log``, ``replica``, a minibatch or the energy meter fails, that is left
    out, with one warning. Exceptions of the training itself pass through untouched. A forked
    process (a data loader's worker) doesn't record, whatever it calls. Several threads may call
    `step`. Without ``with``, call `close` at the end.

    Args:
        path: folder of the run; created, and refused if it already holds something (unless
            ``resume``) or is being recorded into.
        model: what is being trained; any module.
        optimizer: any `torch.optim.Optimizer`.
        probe: ``(inputs, targets)`` or ``(inputs, targets, weights)``, fixed examples whose
            predictions are recorded; inputs as for `predict`. Weights, one per example or
            prediction, count in every mean: 0 for padding, ``class_weights[targets]`` for a
            class-weighted loss. None: no predictions.
        every: snapshot interval in steps, or a function of the step number such as `log_spaced`.
        likelihood: output family, see `thermo_opt.likelihoods`: "categorical" (targets: class
            numbers, or soft ones), "bernoulli", "gaussian", "poisson", "heteroscedastic".
        sigma2: variance of Gaussian outputs; None: an audit estimates it from the residuals, and
            says so.
        kind: what the model puts out for classes: "logits", "log-probabilities" or "probabilities".
            None: logits, and outputs that look like probabilities are refused.
        params: also record weights and buffers.
        grads: also record the gradients in ``p.grad`` when `step` is called.
        moments: also record Adam's moments.
        batch_size: loss terms per gradient, where constant.
        probe_batch_size: probe examples per forward pass.
        probe_autocast: probe in the low precision that the model's own ``torch.autocast`` gives.
            Off by default: the probe is evaluated in the precision of the weights, so that rounding
            doesn't pass for motion (§4).
        sketch: record this many random sums of √p instead of all outputs, and log p(y) exactly
            (§13): for large vocabularies. 16 gives a relative error of √(2/16)/√n over n
            predictions; at most 4,096.
        replica: a closure as for ``optimizer.step``, on an independent minibatch: at some steps a
            replica of the step is taken with it from the same state, to tell noise from drift
            (§11). Everything is put back afterwards. A scheduler may be called before or after
            `step`.
        replica_every: steps between replicas.
        clock: the clock an audit uses by default ("step").
        factory: ``package.module:factory`` that builds the architecture, so that an audit can
            replay it.
        name: the run's name (default: the folder's).
        notes: free metadata that JSON can hold.
        energy: log the joules of each step (`thermo_opt.runs.energy`), probing and recording left
            out; where the machine has no meter, the run's record and one warning say why.
        resume: continue a recorded run. True: at its last logged step; a number: at that step, what
            was recorded later is removed. Likelihood, optimizer and the like must be the same;
            other settings are noted.
        log: called as ``log(scalars, step=k)`` with each snapshot after the first, scalars being a
            dictionary of plain numbers so far (`thermo_opt.runs.progress.Progress`):
            ``thermo/dissipation``, ``thermo/efficiency``, ``thermo/loss``,
            ``thermo/alignment_lower`` and, with NGDT, ``thermo/alignment``, ``thermo/realised``,
            ``thermo/kappa``. ``wandb.log``, ``mlflow.log_metrics`` and Accelerate's
            ``accelerator.log`` fit as they are.

    Raises:
        InputError: arguments that don't fit, a folder that is taken or can't be written to, or,
            with ``resume``, another model, probe or (where it was recorded) state of the model.

    Cost: a probe forward pass and a copy of the recorded tensors to the CPU per snapshot; the
    loss's value (a device synchronisation) per step.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        probe: tuple[Inputs, Tensor | None] | tuple[Inputs, Tensor | None, Tensor | None] | None,
        every: Every = 1,
        likelihood: Likelihood = "categorical",
        sigma2: float | None = None,
        kind: str | None = None,
        params: bool = False,
        grads: bool = False,
        moments: bool = False,
        batch_size: int | None = None,
        probe_batch_size: int = 256,
        probe_autocast: bool = False,
        sketch: int | None = None,
        replica: Callable[[], Any] | None = None,
        replica_every: int = 50,
        clock: str | None = None,
        factory: str | None = None,
        name: str | None = None,
        notes: Mapping[str, Any] | None = None,
        resume: bool | int = False,
        energy: bool = False,
        log: Callable[..., Any] | None = None,
    ) -> None:
        self.path = arguments.path("path", path)
        if remote.is_remote(self.path):
            raise InputError(
                f"{self.path}: runs are recorded on this machine alone; give a folder, and copy it "
                "there afterwards"
            )
        self.path = self.path.absolute()  # the training may change the working directory
        if not isinstance(model, nn.Module):
            raise InputError(f"model is of type {type(model).__name__}; give a torch.nn.Module")
        _refuse_shapeless(model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(
                f"optimizer is of type {type(optimizer).__name__}; give a torch.optim.Optimizer"
            )
        inner = getattr(optimizer, "optimizer", None)  # under Accelerate's and Lightning's wrappers
        if isinstance(inner, torch.optim.Optimizer):
            optimizer = inner
        self._model, self._optimizer = model, optimizer
        self._due = schedule(every)
        self._params, self._grads, self._moments = params, grads, moments
        likelihoods.known(likelihood)
        if clock is not None and clock not in CLOCKS:
            raise InputError(f"clock is {clock!r}; use one of {', '.join(CLOCKS)}")
        if sigma2 is not None:
            sigma2 = arguments.positive("sigma2", sigma2)
        if batch_size is not None:
            batch_size = arguments.whole("batch_size", batch_size)
        self._resume = (
            resume if isinstance(resume, bool) else arguments.whole("resume", resume, least=None)
        )
        for argument, text in (("factory", factory), ("name", name)):
            if text is not None and not isinstance(text, str):
                raise InputError(f"{argument} is {text!r}; give text")
        if notes is not None and not isinstance(notes, Mapping):
            raise InputError(f"notes is of type {type(notes).__name__}; give a dictionary")
        if probe is None and not (params or grads or moments):
            raise InputError(
                "nothing to record: give probe=(inputs, targets), or one of params, grads, moments"
            )
        self._observer = None
        if probe is not None:
            self._observer = ProbeObserver(
                model,
                probe,
                likelihood=likelihood,
                kind=kind,
                sketch=sketch,
                batch_size=probe_batch_size,
                autocast=probe_autocast,
            )
        if log is not None and not callable(log):
            raise InputError(
                f"log is {log!r}; give a function of (scalars, step), such as wandb.log"
            )
        self._show = log
        self._progress = Progress(
            None if self._observer is None else self._observer.probe, likelihood, sigma2, kind
        )
        self._replicas, self._replica_every = None, arguments.whole("replica_every", replica_every)
        if replica is not None:
            if self._observer is None:
                raise InputError(
                    "replica needs a probe whose predictions it moves: give probe=(inputs, targets)"
                )
            self._replicas = ReplicaSteps(replica, model, optimizer)
        self._names = {id(parameter): key for key, parameter in model.named_parameters()}
        self._header = described(
            model,
            optimizer,
            name=name,
            clock=clock,
            likelihood=likelihood,
            sigma2=sigma2,
            kind=kind,
            sketch=None if self._observer is None else self._observer.sketch_record,
            batch_size=batch_size,
            model_factory=factory,
            probe_fingerprint=None if self._observer is None else self._observer.probe.fingerprint,
            notes=dict(notes or {}),
        )
        self._meter: EnergyMeter | None = None
        if energy:
            try:
                self._meter = EnergyMeter()
                self._header["energy"] = {"devices": self._meter.devices}
            except InputError as reason:
                self._header["energy"] = {"devices": [], "reason": str(reason)}
                warn_only(f"{reason}; recording goes on without", stacklevel=2)
        encoded(self._header)
        self._count = 0
        self._snapshotted = -1
        self._wall_before = 0.0
        self._entered = False
        self._stopped: str | None = None
        self._warned = False
        self._left_out: set[str] = set()
        self._turn = threading.RLock()
        self._process = os.getpid()
        self._lock: FolderLock | None = None
        self._writer: SnapshotWriter | None = None
        self._log: StepLog | None = None
        self._pending: dict[str, Tensor] | None = None
        self._rates: UsedRates | None = None
        self._replica_rates: Rates = ()

    @property
    def steps_done(self) -> int:
        """Number of recorded optimizer steps so far, earlier sessions of a resumed run included."""
        return self._count

    def __reduce__(self) -> NoReturn:
        raise InputError(
            "a Recorder can't be copied or pickled: it holds the lock on one run's folder; make "
            "another, with a path of its own"
        )

    def __enter__(self) -> Recorder:
        if self._entered:
            raise InputError(
                "a Recorder can be entered once; make a new one, with resume=True to continue its "
                "run"
            )
        self._entered = True
        self._process = os.getpid()
        tensors, metadata = (
            self._capture()
        )  # before anything is written: a probe that doesn't fit leaves no trace
        begun = made = False
        try:
            made = not self.path.exists()
            continued = self._prepare_folder(tensors)
            if not continued:
                begun = True  # the folder was empty: what lies there from here on is ours
                # first of all, so that from its first instant the folder is a readable run
                header = self._header | {"clock": self._header["clock"] or "step"}
                write_atomically(self.path / RUN_FILE, encoded(header))
            (self.path / SNAPSHOT_FOLDER).mkdir(exist_ok=True)
            if self._replicas is not None:
                (self.path / REPLICA_FOLDER).mkdir(exist_ok=True)
            if self._observer is not None and not (self.path / PROBE_FILE).exists():
                probe = self._observer.probe
                write_tensors(
                    self.path / PROBE_FILE,
                    probe_tensors(probe.inputs, probe.targets, probe.weights),
                )
            if continued:
                tensors, metadata = self._capture()
                self._retrace()
            elif self._show is not None and "probe/logits" in tensors:
                self._progress.add(0, tensors["probe/logits"])
            target = snapshot_path(self.path, self._count)
            if not target.exists():
                write_tensors(target, tensors, metadata)
            self._log = StepLog(self.path / STEPS_FILE)
        except BaseException as error:
            if begun:
                _undo(self.path, made)  # half a beginning would be in the way of the next try
            self._release()
            if isinstance(error, OSError):
                raise _unwritable(self.path, error) from None
            raise
        self._snapshotted = self._count
        self._writer = SnapshotWriter()
        self._unclosed = weakref.finalize(self, _close_late, self.path, self._writer, self._process)
        self._start = time.perf_counter()
        self._take_replica(tensors)
        self._restart_meter()
        return self

    def step(
        self,
        *,
        loss: float | Tensor | None = None,
        lr: float | None = None,
        examples: int | None = None,
        tokens: int | None = None,
        batch: tuple[Inputs, Tensor] | None = None,
        **extra: Any,
    ) -> None:
        """Log one optimizer step, after ``optimizer.step()``, and take a snapshot if one is due.

        Not-a-number and infinities are logged as null, as is, with one warning, what can't be
        logged.

        Args:
            loss: of the minibatch, before the step, nats.
            lr: default, the first parameter group's; with replicas, what it was as the step began.
            examples: examples seen in this step.
            tokens: tokens seen in this step.
            batch: the (inputs, targets) that this step was computed from, for the counterfactual
                lens; kept where snapshots are taken both before and after the step.
            **extra: other numbers or texts, by name. Entries of ``optimizer.last_step`` (a dict of
                scalars), where there is one, are logged too.
        """
        if self._writer is None:
            raise InputError("Recorder.step outside its `with` block; call it inside")
        if (
            os.getpid() != self._process
        ):  # a fork has neither the writing thread nor a right to the files
            return
        row = {"loss": loss, "lr": lr, "examples": examples, "tokens": tokens}
        with self._turn:
            self._count += 1
            if self._stopped is None:
                try:
                    self._record(row, extra, batch)
                except Exception as error:  # whatever fails in recording must not end the training
                    self._stop(error)
            self._warn()

    def _record(
        self, row: dict[str, Any], extra: Mapping[str, Any], batch: tuple[Inputs, Tensor] | None
    ) -> None:
        assert self._writer is not None
        used = None if self._rates is None else self._rates.taken()
        if row["lr"] is None and used:
            row["lr"] = used[0]
        self._log_row(row, extra)
        if self._writer.error is not None:
            raise self._writer.error
        before, due = self._snapshotted, False
        with self._or_without("every"):
            due = bool(self._due(self._count))
        taken = self._snapshot() if due else None
        if batch is not None and taken is not None and before == self._count - 1:
            with self._or_without("batch"):
                if len(batch) != 2 or not isinstance(batch[1], Tensor):
                    raise InputError("a minibatch is recorded as batch=(inputs, targets)")
                tensors = probe_tensors(*batch)
                (self.path / BATCH_FOLDER).mkdir(exist_ok=True)
                self._writer.put(batch_path(self.path, before), tensors, {"step": str(before)})
        self._finish_replica(taken, used)
        self._take_replica(taken)
        self._restart_meter()

    def close(self, *, final_snapshot: bool = True) -> None:
        """Record the last step if it is missing, and close; done on leaving `with`.

        Args:
            final_snapshot: False leaves the last step's snapshot out, as after an exception.
        """
        if self._writer is None or os.getpid() != self._process:
            return
        with self._turn:
            self._close(final_snapshot)

    def _close(self, final_snapshot: bool) -> None:
        if self._writer is None:
            return
        try:
            if final_snapshot and self._stopped is None and self._snapshotted != self._count:
                self._snapshot()
        except Exception as error:  # as in step
            self._stop(error)
        self._writer.close()
        if self._writer.error is not None:
            self._stop(self._writer.error)
        try:
            if self._log is not None:
                self._log.check()
                self._log.close()
        except OSError as error:
            self._stop(error)
        self._writer = None
        self._unclosed.detach()
        self._release()
        self._warn()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an exception the weights may be halfway through a step, so they aren't recorded as
        # the last step's.
        self.close(final_snapshot=kind is None)

    def _prepare_folder(self, tensors: Mapping[str, Tensor]) -> bool:
        """Make the folder ready and ours; True if a recorded run is being continued. ``tensors``:
        the model's state."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; record into a new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        unborn = (
            RUN_FILE + PARTIAL
        )  # all that a run leaves which is killed while its first file is written
        taken = any(entry.name != unborn for entry in self.path.iterdir())
        if taken and self._resume is False:
            raise InputError(
                f"{self.path} already holds something; record into a new folder, or continue its "
                f"run with resume=True"
            )
        continued = (self.path / RUN_FILE).exists()
        if taken and not continued:
            raise InputError(
                f"{self.path} holds no run to resume ({RUN_FILE} is missing); record into a new "
                f"folder"
            )
        if continued:
            resumed = resume_run(self.path, self._header, self._resume, tensors)
            self._count, self._wall_before = resumed.step, resumed.wall
        return continued

    def _release(self) -> None:
        if self._rates is not None:
            self._rates.stop()
            self._rates = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _capture(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors: dict[str, Tensor] = {}
        metadata = {"step": str(self._count)}
        if self._observer is not None:
            tensors |= self._observer.observe()
        if self._params:
            tensors |= {f"params/{name}": _copy(p) for name, p in self._model.named_parameters()}
            tensors |= {f"buffers/{name}": _copy(b) for name, b in self._model.named_buffers()}
        if self._grads and self._count:
            tensors |= {
                f"grad/{name}": _copy(p.grad)
                for name, p in self._model.named_parameters()
                if p.grad is not None and p.grad.layout == torch.strided
            }
        if self._moments:
            moments, meta = adam_moments(self._optimizer, self._names)
            tensors |= {name: _copy(tensor) for name, tensor in moments.items()}
            if meta is not None:
                metadata["moments"] = json.dumps(meta)
            elif self._count:
                self._moments = False
                warn_only(
                    f"moments=True, but {type(self._optimizer).__name__} keeps no exp_avg and "
                    "exp_avg_sq of this model's parameters; recording goes on without",
                    stacklevel=5,
                )
        return tensors, metadata

    def _snapshot(self) -> dict[str, Tensor]:
        assert self._writer is not None
        assert self._log is not None
        self._log.check()
        tensors, metadata = self._capture()
        self._writer.put(snapshot_path(self.path, self._count), tensors, metadata)
        self._snapshotted = self._count
        if self._show is not None:
            with self._or_without("log"):
                if "probe/logits" in tensors:
                    self._progress.add(self._count, tensors["probe/logits"])
                self._show(self._progress.scalars, step=self._count)
        return tensors

    @contextlib.contextmanager
    def _or_without(self, what: str) -> Iterator[None]:
        """What goes beside the record may fail: it is left out, and the first time said."""
        try:
            yield
        except Exception as error:  # of the user's own functions, of meters, of networks
            if what not in self._left_out:
                self._left_out.add(what)
                warn_only(
                    f"recording to {self.path} goes on without {what} at step {self._count} "
                    f"({first_line(error)}); later steps try again, and say no more",
                    stacklevel=6,
                )

    def _restart_meter(self) -> None:
        if self._meter is not None:
            with self._or_without("energy"):
                self._meter.restart()

    def _retrace(self) -> None:
        """Take up the live scalars of a resumed run from the snapshots it has."""
        if self._show is None or self._observer is None:
            return
        for snapshot in own.read(self.path).snapshots:
            if "probe/logits" in snapshot.names():
                self._progress.add(snapshot.step, snapshot.load("probe/logits"))

    def _take_replica(self, taken: Mapping[str, Tensor] | None) -> None:
        """Take a replica of the coming step if one is due. ``taken``: the present state's snapshot,
        where there is one."""
        if self._replicas is None or self._observer is None or self._count % self._replica_every:
            return
        began = time.perf_counter()
        with self._or_without("replica"):
            if self._rates is None:
                self._rates = UsedRates(self._optimizer)
            self._replica_rates = self._rates.present
            before = self._observer.of(taken) if taken else self._observer.observe()
            after = self._replicas.take(self._count, self._observer.observe)
            self._rates.forget()  # the replica's own step
            self._pending = _named("before", before) | _named("replica", after)
        self._start += time.perf_counter() - began  # the wall clock is the training's

    def _finish_replica(self, taken: Mapping[str, Tensor] | None, used: Rates | None) -> None:
        """Write the last replica with what the step itself did, and how much longer a step at the
        step's own learning rates is (``used``; None where unseen); none where no one number
        says."""
        if self._pending is None or self._observer is None or self._writer is None:
            return
        pending, self._pending = self._pending, None
        with self._or_without("replica"):
            longer = 1.0 if used is None else ratio(used, self._replica_rates)
            if longer is None:
                return
            now = self._observer.of(taken) if taken else self._observer.observe()
            before = self._count - 1
            tensors = pending | _named("step", now)
            metadata = {"step": str(before), LR_RATIO: repr(longer)}
            self._writer.put(replica_path(self.path, before), tensors, metadata)

    def _log_row(self, row: dict[str, Any], extra: Mapping[str, Any]) -> None:
        assert self._log is not None
        if row["lr"] is None:
            row["lr"] = self._optimizer.param_groups[0].get("lr")
        row["wall"] = round(self._wall_before + time.perf_counter() - self._start, 6)
        if self._meter is not None:
            with self._or_without("energy"):
                row["energy"] = self._meter.read()
        diagnostics = getattr(self._optimizer, "last_step", None)
        if self._show is not None:
            with self._or_without("log"):
                self._progress.hear(diagnostics)
        own = diagnostics if isinstance(diagnostics, Mapping) else {}
        own = {
            key: value
            for key, value in own.items()
            if isinstance(key, str) and _is_scalar(value) and key not in row
        }
        self._log.write(self._count, own | row, extra)

    def _stop(self, error: BaseException) -> None:
        if self._stopped is None:
            self._stopped = str(error) or type(error).__name__

    def _warn(self) -> None:
        if self._stopped is not None and not self._warned:
            self._warned = True
            kept = (
                "what was recorded until then is readable"
                if self.path.exists()
                else "the folder is gone"
            )
            warn_only(
                f"recording to {self.path} stopped at step {self._count} ({self._stopped}); "
                f"training goes on, and {kept}",
                stacklevel=3,
            )


def _close_late(path: Path, writer: SnapshotWriter, process: int) -> None:
    """Of a Recorder that nobody closed, at its own end or the process's: write what waits."""
    if os.getpid() == process:
        writer.close()
        warn_only(
            f"the Recorder of {path} was never closed: all that was due is written, the last "
            "step's snapshot perhaps not; use a with block, or call close()"
        )


def _refuse_shapeless(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise InputError(
                f"{name!r} of the model has no shape yet (a lazy layer); call the model once on a "
                "batch before recording"
            )
        if tensor.is_meta:
            raise InputError(
                f"{name!r} of the model is on the meta device, without values; put the model on "
                "its device before recording"
            )


def _named(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for name, tensor in tensors.items()}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float | np.number) or (
        isinstance(value, Tensor) and value.numel() == 1
    )


def _copy(tensor: Tensor) -> Tensor:
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return dense.to("cpu", copy=True).contiguous()


def _undo(path: Path, made: bool) -> None:
    """Remove what a Recorder that couldn't begin has written into an empty folder, and the folder
    if it ``made`` it."""
    with contextlib.suppress(OSError):
        for folder in (path / SNAPSHOT_FOLDER, path / REPLICA_FOLDER):
            shutil.rmtree(folder, ignore_errors=True)
        for name in (STEPS_FILE, PROBE_FILE, RUN_FILE):
            (path / name).unlink(missing_ok=True)
        if made:
            path.rmdir()


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} can't be written to ({error.strerror or error}); choose a folder where you may "
        f"write, on a disk "
        "with room"
    )
