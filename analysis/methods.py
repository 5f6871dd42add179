"""The optimizers that studies and benchmarks compare, each with one knob and the settings where its
tuning starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import thermo_opt as to


@dataclass(frozen=True)
class Method:
    """An optimizer family: ``make(model, setting)``, its knob's name and the settings where tuning
    starts (`analysis.tuning`).

    ``weight_decay``: used at full scale only, where regularisation decides the final accuracy; in
    each family's own unit, not tuned.
    """

    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    knob: str
    grid: tuple[float, ...]
    weight_decay: float = 0.0


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    optimizer: torch.optim.Optimizer = SOAP(
        model.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=10
    )
    return optimizer


def _shampoo(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import Shampoo

    optimizer: torch.optim.Optimizer = Shampoo(
        model.parameters(), lr=lr, preconditioning_compute_steps=10
    )
    return optimizer


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Muon on hidden weight matrices; its AdamW (0.15 of the rate) on embeddings, the read-out and
    vectors, as its authors advise."""
    from pytorch_optimizer import Muon

    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hidden = {id(m.weight) for m in matrices[:-1]}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if (id(p) in hidden) == use], "use_muon": use}
        for use in (True, False)
    ]
    optimizer: torch.optim.Optimizer = Muon(groups, lr=lr, adamw_lr=0.15 * lr, weight_decay=0.0)
    return optimizer


def ngdt(grid: tuple[float, ...] = (), weight_decay: float = 0.0, **options: Any) -> Method:
    """NGD-T with these options, swept by its budget where they don't set one."""

    def make(model: nn.Module, budget: float) -> torch.optim.Optimizer:
        return to.NGDT(model, **{"budget": budget, **options})

    return Method(make, "budget", grid, weight_decay)


METHODS = {
    "NGD-T": ngdt((0.01, 0.03, 0.1), 5e-4),
    "NGD-T EKFAC": ngdt((0.01, 0.03, 0.1), 5e-4, metric="ekfac"),
    "AdamW": Method(_adamw, "lr", (3e-3, 1e-2, 3e-2), 0.05),
    "SGD": Method(_sgd, "lr", (0.1, 0.3, 1.0), 5e-4),
    "SOAP": Method(_soap, "lr", (3e-3, 1e-2, 3e-2), 0.05),
    "Muon": Method(_muon, "lr", (1e-2, 3e-2, 1e-1), 0.05),
    "Shampoo": Method(_shampoo, "lr", (0.03, 0.1, 0.3), 0.05),
}


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule all methods share: linear warm-up (20 steps; a fiftieth of long runs), then a
    cosine to 5 % of the full rate."""
    warmup = max(min(20, steps // 5), steps // 50, 1)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (
            0.05 + 0.475 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
        )

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
