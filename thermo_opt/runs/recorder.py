"""`Recorder`: writes a training run to disk while it happens, without changing it."""

from __future__ import annotations

import json
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt import __version__, arguments
from thermo_opt.errors import InputError
from thermo_opt.runs.adam_moments import adam_moments, optimizer_settings
from thermo_opt.runs.energy import EnergyMeter
from thermo_opt.runs.format import (
    PARTIAL,
    PROBE_FILE,
    RUN_FILE,
    SCHEMA_VERSION,
    SNAPSHOT_FOLDER,
    STEPS_FILE,
    remove_partial,
    snapshot_path,
    write_atomically,
    write_tensors,
)
from thermo_opt.runs.probe import Inputs, make_probe, probe_tensors
from thermo_opt.runs.probing import check_predictions, predict
from thermo_opt.runs.progress import Progress
from thermo_opt.runs.readers import own
from thermo_opt.runs.run import CLOCKS, LIKELIHOODS, Likelihood
from thermo_opt.runs.snapshot_schedule import Every, schedule
from thermo_opt.runs.steps_file import read_steps

_ENCODE = json.JSONEncoder(allow_nan=False).encode
_QUEUE = 4
"""Snapshots that may wait for the disk; training waits when there are more, so memory stays
bounded."""


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
    training goes on; exceptions of the training itself pass through untouched.

    Cost: a probe forward pass and a copy of the recorded tensors to the CPU per snapshot; the value
    of the loss (a device synchronisation) per step.

    Args:
        path: folder of the run; created, and refused if it already holds something (unless
            ``resume``).
        model: the module being trained.
        optimizer: any `torch.optim.Optimizer`.
        probe: ``(inputs, targets)``, fixed examples whose predictions are recorded; inputs as for
            `predict`. None: no predictions.
        every: snapshot interval in steps, or a function of the step number such as `log_spaced`.
        likelihood: how outputs are read: "categorical" or "bernoulli" logits, "gaussian" means.
        sigma2: the Gaussian variance.
        params: also record weights and buffers.
        grads: also record the gradients in ``p.grad`` when `step` is called.
        moments: also record Adam's moments.
        batch_size: loss terms per gradient, where constant.
        probe_batch_size: probe examples per forward pass.
        clock: the clock an audit uses by default.
        factory: ``package.module:factory`` that builds the architecture; a note for whoever audits.
        name: the run's name (default: the folder's).
        notes: free metadata that JSON can hold.
        resume: continue a recorded run. True: at its last logged step; a number: at that step, and
            what was recorded later is removed.
        energy: log the joules of each step (`thermo_opt.runs.energy`), probing and recording left
            out; where the machine has no meter, the run's record and one warning say why.
        log: called as ``log(scalars, step=k)`` with each snapshot after the first, scalars being a
            dictionary of plain numbers so far (`thermo_opt.runs.progress.Progress`):
            ``thermo/dissipation``, ``thermo/efficiency``, ``thermo/loss``,
            ``thermo/alignment_lower`` and, with NGDT, ``thermo/alignment``, ``thermo/realised``,
            ``thermo/kappa``. ``wandb.log``, ``mlflow.log_metrics`` and Accelerate's
            ``accelerator.log`` fit as they are.

    Raises:
        InputError: for arguments that don't fit, a folder that is taken or can't be written to, or,
            with ``resume``, another model, probe or (where it was recorded) state of the model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        probe: tuple[Inputs, Tensor | None] | None,
        every: Every = 1,
        likelihood: Likelihood = "categorical",
        sigma2: float | None = None,
        params: bool = False,
        grads: bool = False,
        moments: bool = False,
        batch_size: int | None = None,
        probe_batch_size: int = 256,
        clock: str = "step",
        factory: str | None = None,
        name: str | None = None,
        notes: Mapping[str, Any] | None = None,
        resume: bool | int = False,
        energy: bool = False,
        log: Callable[..., Any] | None = None,
    ) -> None:
        self.path = arguments.path("path", path)
        if not isinstance(model, nn.Module):
            raise InputError(f"model is of type {type(model).__name__}; give a torch.nn.Module")
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
        self._likelihood = likelihood
        if likelihood not in LIKELIHOODS:
            raise InputError(f"likelihood is {likelihood!r}; use one of {', '.join(LIKELIHOODS)}")
        if clock not in CLOCKS:
            raise InputError(f"clock is {clock!r}; use one of {', '.join(CLOCKS)}")
        if likelihood == "gaussian" and sigma2 is None:
            sigma2 = 1.0
        if sigma2 is not None:
            sigma2 = arguments.positive("sigma2", sigma2)
        if batch_size is not None:
            batch_size = arguments.whole("batch_size", batch_size)
        self._probe_batch_size = arguments.whole("probe_batch_size", probe_batch_size)
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
        self._probe = None
        if probe is not None:
            if not isinstance(probe, tuple) or len(probe) != 2 or probe[0] is None:
                raise InputError("probe must be a pair (inputs, targets)")
            self._probe = make_probe(*_checked_probe(*probe))
        if log is not None and not callable(log):
            raise InputError(
                f"log is {log!r}; give a function of (scalars, step), such as wandb.log"
            )
        self._show = log
        self._progress = Progress(
            None if self._probe is None else self._probe.targets, likelihood, sigma2
        )
        self._names = {id(parameter): key for key, parameter in model.named_parameters()}
        self._header: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "thermo_opt": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "name": name,
            "optimizer": type(optimizer).__name__,
            "settings": optimizer_settings(optimizer.param_groups),
            "clock": clock,
            "likelihood": likelihood,
            "sigma2": sigma2,
            "batch_size": batch_size,
            "model": factory,
            "parameters": [
                {
                    "name": key,
                    "shape": list(p.shape),
                    "dtype": str(p.dtype).removeprefix("torch."),
                    "trainable": p.requires_grad,
                }
                for key, p in model.named_parameters()
            ],
            "tied": {
                key: self._names[id(p)]
                for key, p in model.named_parameters(remove_duplicate=False)
                if key != self._names[id(p)]
            },
            "probe_fingerprint": self._probe.fingerprint if self._probe else None,
            "notes": dict(notes or {}),
        }
        self._meter: EnergyMeter | None = None
        if energy:
            try:
                self._meter = EnergyMeter()
                self._header["energy"] = {"devices": self._meter.devices}
            except InputError as reason:
                self._header["energy"] = {"devices": [], "reason": str(reason)}
                warnings.warn(f"{reason}; recording goes on without", stacklevel=2)
        try:
            json.dumps(self._header, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"notes can't be written as JSON ({error}); give plain finite values"
            ) from None
        self._count = 0
        self._snapshotted = -1
        self._wall_before = 0.0
        self._entered = False
        self._stopped: str | None = None
        self._warned = False
        self._writer: _Writer | None = None
        self._log: Any = None

    @property
    def steps_done(self) -> int:
        """Number of recorded optimizer steps so far, earlier sessions of a resumed run included."""
        return self._count

    def __enter__(self) -> Recorder:
        if self._entered:
            raise InputError(
                "a Recorder can be entered once; make a new one, with resume=True to continue its "
                "run"
            )
        self._entered = True
        tensors, metadata = (
            self._capture()
        )  # before anything is written: a probe that doesn't fit leaves no trace
        continued = self._prepare_folder(tensors)
        try:
            if (
                not continued
            ):  # first of all, so that from its first instant the folder is a readable run
                write_atomically(
                    self.path / RUN_FILE,
                    json.dumps(self._header, indent=2, ensure_ascii=False).encode() + b"\n",
                )
            (self.path / SNAPSHOT_FOLDER).mkdir(exist_ok=True)
            if self._probe is not None and not (self.path / PROBE_FILE).exists():
                write_tensors(
                    self.path / PROBE_FILE, probe_tensors(self._probe.inputs, self._probe.targets)
                )
            if continued:
                tensors, metadata = self._capture()
                self._retrace()
            elif self._show is not None and "probe/logits" in tensors:
                self._progress.add(0, tensors["probe/logits"])
            target = snapshot_path(self.path, self._count)
            if not target.exists():
                write_tensors(target, tensors, metadata)
            self._log = open(self.path / STEPS_FILE, "a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self._snapshotted = self._count
        self._writer = _Writer()
        if self._meter is not None:
            self._meter.restart()
        self._start = time.perf_counter()
        return self

    def step(
        self,
        *,
        loss: float | Tensor | None = None,
        lr: float | None = None,
        examples: int | None = None,
        tokens: int | None = None,
        **extra: Any,
    ) -> None:
        """Log one optimizer step, after ``optimizer.step()``, and take a snapshot if one is due.

        Entries of ``optimizer.last_step`` (a dict of scalars), where there is one, are logged too.
        Not-a-number and infinities are logged as null.

        Args:
            loss: mean loss of the minibatch before the step, nats.
            lr: learning rate; default: the first parameter group's.
            examples: examples seen in this step.
            tokens: tokens seen in this step.
            **extra: other scalars, by name.
        """
        if self._writer is None:
            raise InputError("Recorder.step outside its `with` block; call it inside")
        self._count += 1
        if self._stopped is None:
            try:
                self._log_row(loss, lr, examples, tokens, extra)
                if self._writer.error is not None:
                    raise self._writer.error
                if self._due(self._count):
                    self._snapshot()
                if self._meter is not None:
                    self._meter.restart()
            except Exception as error:  # whatever fails in recording must not end the training
                self._stop(error)
        self._warn()

    def close(self, *, final_snapshot: bool = True) -> None:
        """Record the last step if it is missing, and close; done on leaving `with`.

        Args:
            final_snapshot: False leaves the last step's snapshot out, as after an exception.
        """
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
            self._log.close()
        except OSError as error:
            self._stop(error)
        self._writer = None
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
        """Make the folder ready; True if a recorded run is being continued. ``tensors``: the
        model's present state."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{self.path} is a file; record into a new folder")
            self.path.mkdir(parents=True, exist_ok=True)
            unborn = (
                RUN_FILE + PARTIAL
            )  # all that a run leaves which is killed while its first file is written
            taken = any(entry.name != unborn for entry in self.path.iterdir())
            if taken and self._resume is False:
                raise InputError(
                    f"{self.path} already holds something; record into a new folder, or continue "
                    "its run with "
                    "resume=True"
                )
            continued = (self.path / RUN_FILE).exists()
            if taken and not continued:
                raise InputError(
                    f"{self.path} holds no run to resume ({RUN_FILE} is missing); record into a "
                    "new folder"
                )
            if continued:
                self._continue(tensors)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        return continued

    def _continue(self, tensors: Mapping[str, Tensor]) -> None:
        run = own.read(self.path)
        if run.info.parameters != self._header["parameters"]:
            raise InputError(
                f"{self.path} records a model with other parameters than this one; record into a "
                "new folder"
            )
        if run.info.probe_fingerprint != self._header["probe_fingerprint"]:
            raise InputError(
                f"{self.path} was recorded with another probe; give the same one, or record into a "
                "new folder"
            )
        logged = int(run.steps.index[-1]) if len(run.steps) else 0
        self._count = logged if self._resume is True else int(self._resume)
        if not 0 <= self._count <= logged:
            raise InputError(
                f"{self.path} has {logged} recorded steps; it can't be resumed at step "
                f"{self._count}"
            )
        if (recorded := snapshot_path(self.path, self._count)).exists():
            self._check_same_state(recorded, tensors)
        remove_partial(
            self.path
        )  # from here on the folder is changed, so every refusal comes before
        remove_partial(self.path / SNAPSHOT_FOLDER)
        for snapshot in run.snapshots:
            if snapshot.step > self._count:
                snapshot.path.unlink()
        steps = self.path / STEPS_FILE
        if steps.exists():
            kept = [
                line
                for line in steps.read_bytes().split(b"\n")[:-1]
                if line.strip() and json.loads(line)["step"] <= self._count
            ]
            write_atomically(steps, b"".join(line + b"\n" for line in kept))
            wall = read_steps(steps).get("wall")
            if wall is not None and wall.notna().any():
                self._wall_before = float(wall.dropna().iloc[-1])

    def _check_same_state(self, recorded: Path, tensors: Mapping[str, Tensor]) -> None:
        from thermo_opt.runs.tensors import SafetensorsFile

        file = SafetensorsFile(recorded)
        for name in ("probe/logits", *(name for name in tensors if name.startswith("params/"))):
            if name not in tensors or name not in file.shapes:
                continue
            was, now = file.load(name).double(), tensors[name].double()
            scale = float(was.abs().max()) if was.numel() else 0.0
            if was.shape != now.shape or not torch.allclose(
                was, now, rtol=1e-3, atol=1e-3 * scale, equal_nan=True
            ):
                raise InputError(
                    f"{recorded}: {name} at step {self._count} isn't the present model's; load the "
                    "model's state of "
                    "that step "
                    "before recording on, or give resume=<its step>"
                )

    def _capture(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors: dict[str, Tensor] = {}
        metadata = {"step": str(self._count)}
        if self._probe is not None:
            assert self._probe.inputs is not None
            logits = predict(self._model, self._probe.inputs, self._probe_batch_size)
            if self._snapshotted < 0:
                check_predictions(logits, self._probe.targets, self._likelihood)
            tensors["probe/logits"] = logits
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
                warnings.warn(
                    f"moments=True, but {type(self._optimizer).__name__} keeps no exp_avg and "
                    "exp_avg_sq; recording "
                    "goes on without",
                    stacklevel=4,
                )
        return tensors, metadata

    def _snapshot(self) -> None:
        assert self._writer is not None
        tensors, metadata = self._capture()
        self._writer.put(snapshot_path(self.path, self._count), tensors, metadata)
        self._snapshotted = self._count
        if self._show is not None:
            if "probe/logits" in tensors:
                self._progress.add(self._count, tensors["probe/logits"])
            self._show(self._progress.scalars, step=self._count)

    def _retrace(self) -> None:
        """Take up the live scalars of a resumed run from the snapshots it has."""
        if self._show is None or self._probe is None:
            return
        for snapshot in own.read(self.path).snapshots:
            self._progress.add(snapshot.step, snapshot.load("probe/logits"))

    def _log_row(
        self,
        loss: float | Tensor | None,
        lr: float | None,
        examples: int | None,
        tokens: int | None,
        extra: dict[str, Any],
    ) -> None:
        wall = self._wall_before + time.perf_counter() - self._start
        if lr is None:
            lr = self._optimizer.param_groups[0].get("lr")
        row: dict[str, Any] = {
            "loss": loss,
            "lr": lr,
            "wall": round(wall, 6),
            "examples": examples,
            "tokens": tokens,
            "energy": None if self._meter is None else self._meter.read(),
        }
        diagnostics = getattr(self._optimizer, "last_step", None)
        self._progress.hear(diagnostics)
        if isinstance(diagnostics, Mapping):
            row = {**{key: value for key, value in diagnostics.items() if _is_scalar(value)}, **row}
        row |= extra
        plain = {
            key: _plain(value) for key, value in row.items() if value is not None and key != "step"
        }
        self._log.write(_ENCODE({"step": self._count, **plain}) + "\n")
        self._log.flush()

    def _stop(self, error: BaseException) -> None:
        if self._stopped is None:
            self._stopped = str(error) or type(error).__name__

    def _warn(self) -> None:
        if self._stopped is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"recording to {self.path} stopped at step {self._count} ({self._stopped}); "
                "training goes on, and "
                "what was recorded "
                "until then is readable",
                stacklevel=3,
            )


class _Writer:
    """A thread that writes snapshots in order; ``put`` waits when `_QUEUE` of them are pending,
    ``error`` is its first failure.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._queue: queue.Queue[tuple[Path, dict[str, Tensor], dict[str, str]] | None] = (
            queue.Queue(maxsize=_QUEUE)
        )
        self._thread = threading.Thread(target=self._work, name="thermo-opt recorder", daemon=True)
        self._thread.start()

    def put(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        self._queue.put((path, tensors, metadata))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if self.error is None:
                try:
                    write_tensors(*item)
                except BaseException as error:  # handed to the training thread, which warns
                    self.error = error


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool | int):
        return number
    number = float(number)
    return number if math.isfinite(number) else None


def _checked_probe(inputs: Any, targets: Any) -> tuple[Inputs, Tensor | None]:
    """The two, each of a type that can be recorded."""
    parts = (
        list(inputs.values())
        if isinstance(inputs, dict)
        else inputs
        if isinstance(inputs, tuple)
        else [inputs]
    )
    if not parts or not all(isinstance(part, Tensor) for part in parts):
        raise InputError(
            f"probe: inputs are of type {type(inputs).__name__}; give a tensor, or a tuple or "
            "dictionary of tensors"
        )
    if targets is not None and not isinstance(targets, Tensor):
        raise InputError(f"probe: targets are of type {type(targets).__name__}; give a tensor")
    return inputs, targets


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float | np.number) or (
        isinstance(value, Tensor) and value.numel() == 1
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"{path} can't be written to ({error.strerror or error}); choose a folder where you may "
        "write, on a disk "
        "with room"
    )
