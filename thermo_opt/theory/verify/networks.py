"""Small networks on data made by a formula: digit-like 8 × 8 images, for claims that need a real
model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn


def images(examples: int, classes: int = 10, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy, shifted copies of one smooth random prototype a class: (examples, size²) in [0, 1]
    float64, and labels."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, size)
    waves = np.stack([np.cos(np.pi * k * (axis + 1) / 2) for k in range(4)])
    prototypes = np.einsum("cij,ix,jy->cxy", rng.standard_normal((classes, 4, 4)), waves, waves)
    y = rng.integers(classes, size=examples)
    shifts = rng.integers(-1, 2, size=(examples, 2))
    x = np.stack(
        [
            np.roll(prototypes[label], shift, axis=(0, 1))
            for label, shift in zip(y, shifts, strict=True)
        ]
    )
    x = 1 / (1 + np.exp(-x - 0.5 * rng.standard_normal(x.shape)))
    return torch.as_tensor(x.reshape(examples, -1)), torch.as_tensor(y)


def mlp(inputs: int, hidden: int, classes: int, seed: int = 0) -> nn.Sequential:
    """Two layers with tanh, float64, from a fixed seed without touching the global generator."""
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter.shape[-1] if parameter.dim() > 1 else hidden
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / fan**0.5
            )
    return model


def flat(tensors: Iterable[Tensor]) -> np.ndarray:
    """All entries in one float64 vector."""
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors])


def classifier(
    examples: int = 24, classes: int = 4, hidden: int = 5
) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small MLP on 4 × 4 images, with its batch: (model, x, y)."""
    x, y = images(examples, classes, size=4)
    return mlp(16, hidden, classes), x, y
