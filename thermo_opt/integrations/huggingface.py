"""A callback that records a Hugging Face ``Trainer``'s run and shows its dissipation live."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from thermo_opt.errors import InputError
from thermo_opt.integrations.evaluation import first_batch, labelled, refuse_sharded
from thermo_opt.runs import Recorder
from thermo_opt.runs.probe import Inputs


class ThermoCallback(TrainerCallback):
    """Record a ``Trainer``'s run from step 0 and log ``thermo/…`` scalars through its loggers.

        trainer = Trainer(model, arguments, train_dataset=…, eval_dataset=…)
        trainer.add_callback(ThermoCallback(trainer, "my-run"))
        trainer.train()

    Whenever the trainer logs, it logs the scalars of ``Recorder(log=…)`` too, so that W&B,
    TensorBoard, MLflow and ``trainer.state.log_history`` have them (the first two put ``train/``
    before every name). Training stays bit for bit what it is without the callback. A run continued
    with ``resume_from_checkpoint`` continues its record at the checkpoint's step. Under
    DistributedDataParallel the first process records.

    Args:
        trainer: the trainer that the callback is added to.
        path: folder of the recorded run.
        probe: ``(inputs, targets)`` as for `thermo_opt.Recorder`. Default: the first
            ``probe_examples`` of the trainer's evaluation set, through its data collator; the
            labels are put where the model's own loss puts them.
        probe_examples: size of the default probe.
        recording: options of `thermo_opt.Recorder`, such as ``every``, ``params``, ``likelihood``.

    Raises:
        InputError: when training begins, before a weight moves: no evaluation set and no probe, a
            loss that is no negative log-likelihood of logits and labels, sharded parameters, or
            what `thermo_opt.Recorder` refuses.
    """

    def __init__(
        self,
        trainer: Trainer,
        path: str | os.PathLike[str],
        probe: tuple[Inputs, Tensor | None] | None = None,
        probe_examples: int = 256,
        **recording: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise InputError(
                f"trainer is of type {type(trainer).__name__}; give the transformers.Trainer that "
                "the callback is added to"
            )
        self.trainer, self.path, self.probe = trainer, path, probe
        self.probe_examples, self.recording = probe_examples, recording
        self._recorder: Recorder | None = None
        self._losses: list[Tensor] = []
        self._training_step: Callable[..., Tensor] | None = None
        self._scalars: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._end(final_snapshot=False)  # of a run that an exception ended
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        refuse_sharded(model)
        if not state.is_world_process_zero:
            return
        optimizer = self.trainer.optimizer
        assert optimizer is not None  # the trainer has made one by now
        options = dict(self.recording)
        probe = self.probe
        if probe is None:
            found = labelled(model, self._evaluation_batch(model))
            probe = (found.inputs, found.targets)
            options.setdefault("likelihood", found.likelihood)
        recorder = Recorder(
            self.path,
            model=model,
            optimizer=optimizer,
            probe=probe,
            resume=state.global_step if state.global_step else False,
            log=self._keep,
            **options,
        )
        self._recorder = recorder.__enter__()
        self._training_step = self.trainer.training_step
        self.trainer.training_step = self._observed_step  # type: ignore[method-assign]

    def _evaluation_batch(self, model: torch.nn.Module) -> Any:
        data = self.trainer.eval_dataset
        if isinstance(data, dict):
            data = next(iter(data.values()), None)
        if data is None:
            raise InputError(
                "the Trainer has no eval_dataset to take a probe from; give it one, or the "
                "callback probe=(inputs, targets)"
            )
        return first_batch(self.trainer.get_eval_dataloader(data), self.probe_examples, model)

    def _keep(self, scalars: dict[str, float], step: int) -> None:
        self._scalars = scalars

    def _observed_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own ``training_step``, its loss (a part of the step's) noted."""
        assert self._training_step is not None
        loss = self._training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._recorder is not None:
            loss = sum(self._losses) if self._losses else None
            self._losses = []
            self._recorder.step(loss=loss)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._recorder is not None and control.should_log and self._scalars:
            self.trainer.log(dict(self._scalars))
            control.should_log = True  # the trainer's own numbers are still to be logged

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._end()

    def _end(self, final_snapshot: bool = True) -> None:
        if self._recorder is not None:
            self._recorder.close(final_snapshot=final_snapshot)
            del self.trainer.training_step  # the class's own again
        self._recorder = None
        self._losses, self._scalars = [], {}
