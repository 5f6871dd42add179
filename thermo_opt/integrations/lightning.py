"""A callback that records a Lightning ``Trainer``'s run and shows its dissipation live."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thermo_opt.errors import InputError
from thermo_opt.integrations.evaluation import first_batch, labelled, refuse_sharded
from thermo_opt.runs import Recorder
from thermo_opt.runs.probe import Inputs


class ThermoCallback(lightning.Callback):
    """Record a Lightning run from step 0 and log ``thermo/…`` scalars through its loggers.

        trainer = lightning.Trainer(callbacks=[ThermoCallback("my-run")])
        trainer.fit(module, train_loader, validation_loader)

    The scalars of ``Recorder(log=…)`` go through ``module.log``: the trainer's loggers have them at
    its ``log_every_n_steps``, and ``trainer.callback_metrics`` always (to stop or to keep
    checkpoints by). Automatic and manual optimization. Training stays bit for bit what it is
    without the callback. A run continued with ``ckpt_path`` continues its record where the
    checkpoint was written. Under DistributedDataParallel the first process records.

    Args:
        path: folder of the recorded run.
        probe: ``(inputs, targets)`` as for `thermo_opt.Recorder`. Default: the first
            ``probe_examples`` behind the first validation loader: of a tuple, the last part is the
            targets; of a dictionary, ``labels`` as a Hugging Face model's loss reads them.
        probe_examples: size of the default probe.
        model: which part of the LightningModule is called on the probe's inputs, as a function of
            the module. Default: the module's own ``forward``.
        optimizer: which optimizer's steps are recorded, where there are several.
        recording: options of `thermo_opt.Recorder`, such as ``every``, ``params``, ``likelihood``.

    Raises:
        InputError: when training begins, before a weight moves: no validation loader and no probe,
            a module without ``forward``, sharded parameters, or what `thermo_opt.Recorder` refuses.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        probe: tuple[Inputs, Tensor | None] | None = None,
        probe_examples: int = 256,
        model: Callable[[Any], nn.Module] | None = None,
        optimizer: int = 0,
        **recording: Any,
    ) -> None:
        self.path, self.probe, self.probe_examples = path, probe, probe_examples
        self.model, self.optimizer, self.recording = model, optimizer, recording
        self._recorder: Recorder | None = None
        self._resume: int | None = None
        self._scalars: dict[str, float] = {}
        self._loss: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        refuse_sharded(pl_module)
        if not trainer.is_global_zero:
            return
        model = self._predictor(pl_module)
        optimizer = trainer.optimizers[self.optimizer]
        options = dict(self.recording)
        probe = self.probe
        if probe is None:
            inputs, targets, likelihood = self._evaluation(trainer, model)
            probe = (inputs, targets)
            if likelihood is not None:
                options.setdefault("likelihood", likelihood)
        recorder = Recorder(
            self.path,
            model=model,
            optimizer=optimizer,
            probe=probe,
            resume=False if self._resume is None else self._resume,
            log=self._keep,
            **options,
        )
        self._recorder = recorder.__enter__()
        self._handle = optimizer.register_step_post_hook(self._stepped)

    def _predictor(self, module: lightning.LightningModule) -> nn.Module:
        if self.model is not None:
            return self.model(module)
        if type(module).forward is lightning.LightningModule.forward:
            raise InputError(
                f"{type(module).__name__} has no forward to call on the probe; give "
                "ThermoCallback model=, for example model=lambda module: module.net"
            )
        return module

    def _evaluation(
        self, trainer: lightning.Trainer, model: nn.Module
    ) -> tuple[Inputs, Tensor | None, str | None]:
        loaders = trainer.val_dataloaders
        while isinstance(loaders, list | tuple | Mapping) and loaders:
            loaders = next(iter(loaders.values() if isinstance(loaders, Mapping) else loaders))
        if not isinstance(loaders, torch.utils.data.DataLoader):
            raise InputError(
                "fit was given no validation DataLoader to take a probe from; give it one, or "
                "ThermoCallback probe=(inputs, targets)"
            )
        batch = first_batch(loaders, self.probe_examples, model)
        if isinstance(batch, Mapping):
            found = labelled(model, batch)
            return found.inputs, found.targets, found.likelihood
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            raise InputError(
                f"a validation batch is of type {type(batch).__name__}, not (inputs, targets); "
                "give ThermoCallback probe=(inputs, targets)"
            )
        *inputs, targets = batch
        return inputs[0] if len(inputs) == 1 else tuple(inputs), targets, None

    def _keep(self, scalars: dict[str, float], step: int) -> None:
        self._scalars = scalars

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor
    ) -> None:
        if self._recorder is not None:  # a step's loss is the sum of its accumulated parts
            part = loss.detach()
            self._loss = part if self._loss is None else self._loss + part

    def _stepped(self, *_: Any) -> None:
        if self._recorder is not None:
            self._recorder.step(loss=self._loss)
            self._loss = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any
    ) -> None:
        if self._recorder is not None and self._scalars:
            pl_module.log_dict(self._scalars, rank_zero_only=True)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        self._end(final_snapshot=True)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,
    ) -> None:
        self._end(final_snapshot=False)

    def _end(self, final_snapshot: bool) -> None:
        if self._handle is not None:
            self._handle.remove()
        if self._recorder is not None:
            self._recorder.close(final_snapshot=final_snapshot)
        self._recorder = self._handle = self._loss = self._resume = None
        self._scalars = {}

    def state_dict(self) -> dict[str, Any]:
        """The number of steps recorded, for the checkpoint that a run is continued from."""
        return {"steps": None if self._recorder is None else self._recorder.steps_done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the record at the checkpoint's step."""
        self._resume = state_dict["steps"]
