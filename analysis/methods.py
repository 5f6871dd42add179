"""The optimizers that races and benchmarks compare, each with one knob and one grid of settings to tune it on."""

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
    """An optimizer family: ``make(model, knob)``, the knob's name and its tuning grid (the same number of trials for all)."""

    make: Callable[[nn.Module, float], torch.optim.Optimizer]
    knob: str
    grid: tuple[float, ...]


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _soap(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    optimizer: torch.optim.Optimizer = SOAP(model.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=10)
    return optimizer


def _shampoo(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import Shampoo

    optimizer: torch.optim.Optimizer = Shampoo(model.parameters(), lr=lr, preconditioning_compute_steps=10)
    return optimizer


def _muon(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Muon on hidden weight matrices; its AdamW (0.15 of the rate) on embeddings, the read-out and vectors, as its authors advise."""
    from pytorch_optimizer import Muon

    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hidden = {id(m.weight) for m in matrices[:-1]}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if (id(p) in hidden) == use], "use_muon": use}
        for use in (True, False)
    ]
    optimizer: torch.optim.Optimizer = Muon(groups, lr=lr, adamw_lr=0.15 * lr, weight_decay=0.0)
    return optimizer


METHODS = {
    "NGD-T": Method(lambda model, budget: to.NGDT(model, budget=budget), "budget", (0.003, 0.01, 0.03, 0.1)),
    "AdamW": Method(_adamw, "lr", (1e-3, 3e-3, 6e-3, 1e-2)),
    "SGD": Method(_sgd, "lr", (0.03, 0.1, 0.3, 1.0)),
    "SOAP": Method(_soap, "lr", (1e-3, 3e-3, 6e-3, 1e-2)),
    "Muon": Method(_muon, "lr", (3e-3, 1e-2, 3e-2, 1e-1)),
    "Shampoo": Method(_shampoo, "lr", (0.03, 0.1, 0.3, 1.0)),
}


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 20) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule all methods share: linear warm-up, then a cosine to 5 % of the full rate."""

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.475 * (1 + math.cos(math.pi * min(step / steps, 1.0))))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
