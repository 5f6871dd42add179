"""The methods that studies compare, as methods of `thermo_opt.sweep`: an optimizer, its fixed
settings, and the one knob with the three settings where tuning starts (`analysis.tuning`)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from thermo_opt.sweep import Method, Trial


def _decayed(optimizer: Any, weight_decay: float) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay
    return cast(torch.optim.Optimizer, optimizer)


def soap(model: nn.Module, lr: float, weight_decay: float = 0.0, **options: Any) -> Any:
    """SOAP, its bases renewed every 10 steps."""
    from pytorch_optimizer import SOAP

    chosen = {"precondition_frequency": 10, **options}
    return _decayed(SOAP(model.parameters(), lr=lr, **chosen), weight_decay)


def shampoo(model: nn.Module, lr: float, weight_decay: float = 0.0) -> Any:
    """Shampoo, its roots renewed every 10 steps."""
    from pytorch_optimizer import Shampoo

    optimizer = Shampoo(model.parameters(), lr=lr, preconditioning_compute_steps=10)
    return _decayed(optimizer, weight_decay)


def muon(model: nn.Module, lr: float, weight_decay: float = 0.0, **options: Any) -> Any:
    """Muon on hidden weight matrices; its AdamW (0.15 of the rate) on embeddings, the read-out and
    vectors, as its authors advise."""
    from pytorch_optimizer import Muon

    matrices = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hidden = {id(m.weight) for m in matrices[:-1]}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if (id(p) in hidden) == use], "use_muon": use}
        for use in (True, False)
    ]
    return _decayed(Muon(groups, lr=lr, adamw_lr=0.15 * lr, **options), weight_decay)


BUDGETS = [0.01, 0.03, 0.1]
METHODS = {
    method.name: method
    for method in (
        Method("NGD-T", "NGDT", {"weight_decay": 0.0}, {"budget": BUDGETS}),
        Method(
            "NGD-T EKFAC",
            "NGDT",
            {"metric": "ekfac", "weight_decay": 0.0},
            {"budget": BUDGETS},
        ),
        Method(
            "K-FAC, KL clip",
            "NGDT",
            {"regulator": "kl-clip", "calibration": None, "weight_decay": 0.0},
            {"budget": [1e-3, 3e-3, 0.01]},
        ),
        Method(
            "AdamW",
            "AdamW",
            {"betas": [0.9, 0.95], "weight_decay": 0.0},
            {"lr": [3e-3, 1e-2, 3e-2]},
        ),
        Method("SGD", "SGD", {"momentum": 0.9}, {"lr": [0.1, 0.3, 1.0]}),
        Method("SOAP", "analysis.methods:soap", {}, {"lr": [3e-3, 1e-2, 3e-2]}),
        Method("Muon", "analysis.methods:muon", {}, {"lr": [1e-2, 3e-2, 1e-1]}),
        Method("Shampoo", "analysis.methods:shampoo", {}, {"lr": [0.03, 0.1, 0.3]}),
    )
}
WEIGHT_DECAY = {
    name: 5e-4 if name.startswith(("NGD-T", "K-FAC", "SGD")) else 0.05 for name in METHODS
}
"""Used at full scale only, where regularisation decides the final accuracy; in each family's own
unit, not tuned."""


def knob(method: str) -> str:
    """The name of the setting that is tuned."""
    return next(iter(METHODS[method].grid))


def grid(method: str) -> list[float]:
    """The settings where tuning starts."""
    return METHODS[method].grid[knob(method)]


def setting(trial: Trial) -> float:
    """The value of the tuned setting of a trial."""
    return float(trial.settings[knob(trial.method)])
