"""A task and an optimizer of one's own for `thermo-opt sweep`: see sweep_own_task.toml."""

import torch
from torch import Tensor, nn


def circles(seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Inside or outside a circle: 600 noisy points in the plane, 200 of them the probe; 2-24-1 tanh
    network, one logit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=generator)
    y = (
        (x + 0.2 * torch.randn(600, 2, generator=generator)).norm(dim=1, keepdim=True) > 1.2
    ).float()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 1))
    return model, (x[200:], y[200:]), (x[:200], y[:200])


def rmsprop(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """RMSprop that decays matrices, not biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.RMSprop(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors}], lr=lr
    )
