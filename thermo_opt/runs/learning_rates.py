"""Learning rates that steps really used, whenever the training calls its scheduler."""

from __future__ import annotations

from typing import Any

import torch

_SAME = 1e-6
"""Relative difference below which two learning rates are one."""

Rates = tuple[float, ...]


class UsedRates:
    """Sees the learning rates with which an optimizer's steps begin.

    A replica of the coming step is taken before that step, and a scheduler called in between gives
    the step itself other rates: without this, a schedule would pass for noise.

    Args:
        optimizer: What is watched, until `stop`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._begun: Rates | None = None
        self._hook = optimizer.register_step_pre_hook(self._begin)

    def _begin(self, *_: Any) -> None:
        self._begun = self.present

    @property
    def present(self) -> Rates:
        """One per parameter group, as they are now."""
        return tuple(float(group.get("lr", 1.0)) for group in self._optimizer.param_groups)

    def taken(self) -> Rates | None:
        """Those of the last step, told once; None where no step was seen since."""
        begun, self._begun = self._begun, None
        return begun

    def forget(self) -> None:
        """Count the steps seen so far as none."""
        self._begun = None

    def stop(self) -> None:
        """Watch no longer."""
        self._hook.remove()


def ratio(used: Rates, replica: Rates) -> float | None:
    """How much longer a step at these rates is than one at the replica's; None where no one number
    says so: groups that changed apart, or a replica that stood still."""
    if len(used) != len(replica):
        return None
    found = [1.0 if a == b else a / b if b else None for a, b in zip(used, replica, strict=True)]
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return None
    low, high = min(known), max(known)
    return high if high - low <= _SAME * abs(high) else None
