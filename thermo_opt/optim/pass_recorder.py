"""Which passes a step's loss was computed from: of the model, or of the part of it that is called.

Training code may call a part of the model that the optimizer was given (a LightningModule's
``self.net``), several parts one after the other, or get a loss instead of predictions from it. So
until predictions have been found, every module is watched, and the outermost calls that returned
predictions are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from thermo_opt.errors import InputError
from thermo_opt.models import device_of, random_states
from thermo_opt.optim.chains import Origins, chained
from thermo_opt.optim.forward_pass import (
    NO_BACKWARD,
    ForwardPass,
    autocast_now,
    current_backward,
)
from thermo_opt.optim.heads import Heads, found, parts_of
from thermo_opt.optim.hooks import WeakHook, after_forward, on_source_gradients


class PassRecorder:
    """Records training passes of a model since the last `clear`. Its hooks are there while it is
    armed.

    Attributes:
        model: the module that the optimizer was given.
        called: the modules whose passes are recorded, once found: the model, or the parts of it
            that are called.
        params: parameters; once the gradients of all of them are gone, the passes that made them
            are forgotten, and ``on_abandoned`` is called.
        classes: whether predictions have classes.
        parallel: the DistributedDataParallel inside whose forward the last pass ran, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter] = (),
        on_abandoned: Callable[[], None] = lambda: None,
        classes: bool = True,
    ) -> None:
        self.classes = classes
        self.model = model
        self.params, self.on_abandoned = params, on_abandoned
        self.called: tuple[nn.Module, ...] = ()
        self.parallel: DistributedDataParallel | None = None
        self._heads: dict[Any, Heads] = {}
        self._passes: list[ForwardPass] = []
        self._open: list[tuple[nn.Module, int, Callable[[], None], dict[int, Any]]] = []
        self._handles: list[RemovableHandle] = []
        self._watched: tuple[nn.Module, ...] = ()
        self._origins = Origins()

    def arm(self) -> None:
        """Attach the hooks."""
        if self._handles and self._watched == self.called:
            return
        self.disarm()
        self._watched = self.called
        for module in self._to_watch():
            before = module.register_forward_pre_hook(WeakHook(self._before), with_kwargs=True)
            self._handles += [before, after_forward(module, self._after)]

    def _to_watch(self) -> list[nn.Module]:
        """The one module that is called; of several, whatever may be called beside them."""
        if len(self.called) == 1:
            return list(self.called)
        inner = {m for part in self.called for m in part.modules() if m not in self.called}
        return [m for m in self.model.modules() if m not in inner]

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
        self._passes, self._open, self._origins = [], [], Origins()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A training pass begins."""
        if _recomputing():
            return
        backward = not self._open and any(seen.used for seen in self._passes)
        if backward and all(p.grad is None for p in self.params):  # none of the coming step
            self.forget_used()
            self.on_abandoned()
        origins = {} if len(self.called) == 1 else self._origins.of((args, kwargs))
        self._open.append((module, len(self._passes), random_states(), origins))

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
        _, inner, restore, origins = self._open.pop()
        heads = self._heads_of(module, output)
        try:
            each = heads.each(output)
        except InputError:
            return  # something else than predictions: those of an inner call stay
        if each[0].dim() == 0:
            return  # a loss
        outputs = heads.together([head.detach() for head in each])
        autocast = autocast_now(device_of(module))
        seen = ForwardPass(module, args, kwargs, outputs, autocast, restore, heads, origins)
        for k in heads.rest:
            on_source_gradients(parts_of(output)[k], seen.miss)
        if _watched(each, seen):
            self._passes[inner:] = [seen]
            if len(self.called) != 1:
                self._origins.add(seen, output)
            active = getattr(DistributedDataParallel, "_active_ddp_module", None)
            self.parallel = active if active is not None else self.parallel

    def _heads_of(self, module: nn.Module, output: Any) -> Heads:
        """Found once for each module and form of what it returns."""
        if not isinstance(output, Mapping | tuple | list):
            return found(output, self.classes)
        key = module, tuple(t.requires_grad for t in parts_of(output))
        if key not in self._heads:
            self._heads[key] = found(output, self.classes)
        return self._heads[key]

    def used(self) -> list[ForwardPass]:
        """The passes that took part in a backward pass; those of several parts put together.

        Raises:
            InputError: where parts of the model were called one after the other and can't be put
                together, so that nothing gave the predictions by itself.
        """
        used = self._used()
        heads = {k for seen in used for k in seen.sources}
        for seen in used:
            seen.used_heads = heads
        return used

    def _used(self) -> list[ForwardPass]:
        used = [seen for seen in self._passes if seen.used]
        if len(self.called) != 1 and used:
            called = tuple(dict.fromkeys(seen.module for seen in used))
            called = (self.model,) if self.model in called else called
            if len(called) > 1 or self.called:
                names = {module: name for name, module in self.model.named_modules()}
                used = chained(used, names, self.classes)
                self.called = tuple(dict.fromkeys((*self.called, *called)))
                return used
            self.called = called
        return [seen for seen in used if seen.module in self.called]


def _watched(heads: Sequence[Tensor], seen: ForwardPass) -> bool:
    """Have a pass receive the gradients at its heads; False when none takes part in autograd."""
    if len(heads) == 1:
        return on_source_gradients(heads[0], seen.receive)

    def receiver(k: int) -> Callable[[int, Tensor], None]:
        return lambda _, g: seen.receive(k, g)

    watched = [on_source_gradients(head, receiver(k)) for k, head in enumerate(heads)]
    return any(watched)


def _recomputing() -> bool:
    """Whether a backward pass is running: a call in it is a checkpointed layer's second one."""
    return current_backward() != NO_BACKWARD
