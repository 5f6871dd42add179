"""Which passes a step's loss was computed from: of the model, or of the part of it that is called.

Training code may call a part of the model that the optimizer was given (a LightningModule's
``self.net``), or get a loss instead of predictions from it. So until predictions have been found,
every module is watched, and the outermost calls that returned predictions are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from thermo_opt.errors import InputError
from thermo_opt.models import device_of, outputs_of, random_states
from thermo_opt.optim.forward_pass import ForwardPass, autocast_now
from thermo_opt.optim.hooks import WeakHook, after_forward, on_source_gradients


class PassRecorder:
    """Records training passes of a model since the last `clear`. Its hooks are there while it is
    armed.

    Attributes:
        model: the module that the optimizer was given.
        target: the module whose passes are recorded, once found: the model, or its one part that
            is called.
        params: parameters; once the gradients of all of them are gone, the passes that made them
            are forgotten, and ``on_abandoned`` is called.
        parallel: the DistributedDataParallel inside whose forward the last pass ran, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter] = (),
        on_abandoned: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.params, self.on_abandoned = params, on_abandoned
        self.target: nn.Module | None = None
        self.parallel: DistributedDataParallel | None = None
        self._passes: list[ForwardPass] = []
        self._open: list[tuple[nn.Module, int, Callable[[], None]]] = []
        self._handles: list[RemovableHandle] = []
        self._watched: nn.Module | None = None

    def arm(self) -> None:
        """Attach the hooks."""
        if self._handles and self._watched is self.target:
            return
        self.disarm()
        self._watched = self.target
        for module in self.model.modules() if self.target is None else (self.target,):
            before = module.register_forward_pre_hook(WeakHook(self._before))
            self._handles += [before, after_forward(module, self._after)]

    def disarm(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forget_used(self) -> None:
        """Forget the passes that took part in a backward pass."""
        self._passes = [seen for seen in self._passes if not seen.used]

    def clear(self) -> None:
        """Forget all passes."""
        self._passes, self._open = [], []

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A training pass begins."""
        if _recomputing():
            return
        backward = not self._open and any(seen.used for seen in self._passes)
        if backward and all(p.grad is None for p in self.params):  # none of the coming step
            self.forget_used()
            self.on_abandoned()
        self._open.append((module, len(self._passes), random_states()))

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A training pass ends."""
        if _recomputing():
            return
        while self._open and self._open[-1][0] is not module:
            self._open.pop()  # calls that an exception ended
        if not self._open:
            return
        _, inner, restore = self._open.pop()
        try:
            outputs = outputs_of(output)
        except InputError:
            return  # something else than predictions: those of an inner call stay
        if outputs.dim() == 0:
            return  # a loss
        autocast = autocast_now(device_of(module))
        seen = ForwardPass(module, args, kwargs, outputs.detach(), autocast, restore)
        if on_source_gradients(outputs, seen.receive):
            self._passes[inner:] = [seen]
            active = getattr(DistributedDataParallel, "_active_ddp_module", None)
            self.parallel = active if active is not None else self.parallel

    def used(self) -> list[ForwardPass]:
        """The passes that took part in a backward pass.

        Raises:
            InputError: where several parts of the model were called one after the other, so that
                none gave the predictions by itself.
        """
        used = [seen for seen in self._passes if seen.used]
        if self.target is None and used:
            called = list(dict.fromkeys(seen.module for seen in used))
            if self.model in called:
                called = [self.model]
            if len(called) > 1:
                names = {module: name for name, module in self.model.named_modules()}
                parts = ", ".join(repr(names[module]) for module in called)
                raise InputError(
                    f"backward came through several parts of the model ({parts}), so that NGDT "
                    "can't tell its predictions: call the model that NGDT was given, and let its "
                    "forward return them (a tensor, or a dictionary with 'logits')"
                )
            self.target = called[0]
        return [seen for seen in used if seen.module is self.target]


def _recomputing() -> bool:
    """Whether a backward pass is running: a call in it is a checkpointed layer's second one."""
    return torch._C._current_graph_task_id() != -1
