"""Three small tasks for all about minibatches: networks of one hidden layer on scikit-learn's data,
so small that hundreds of runs fit into minutes of one core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from analysis.small_tasks import blobs, digits, friedman, half_squares


@dataclass(frozen=True)
class MinibatchTask:
    """One task: a network, training data, as many held-out examples, and the mean loss (nats)."""

    name: str
    make: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    held: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    likelihood: str = "categorical"

    def build(self, seed: int) -> nn.Module:
        """The network as it starts with a seed."""
        torch.manual_seed(seed)
        return self.make()

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A minibatch drawn with replacement; the whole data from their number on."""
        if size >= len(self.y):
            return self.x, self.y
        k = torch.randint(len(self.y), (size,), generator=generator)
        return self.x[k], self.y[k]

    def held_loss(self, model: nn.Module) -> float:
        """The loss on the held-out examples."""
        with torch.no_grad():
            return float(self.loss(model(self.held[0]), self.held[1]))


def _network(i: int, width: int, o: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(i, width), nn.Tanh(), nn.Linear(width, o))


def _task(
    name: str,
    make: Callable[[], nn.Module],
    data: tuple[Tensor, Tensor],
    held: int,
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    likelihood: str = "categorical",
) -> MinibatchTask:
    x, y = data
    return MinibatchTask(name, make, x[held:], y[held:], (x[:held], y[:held]), loss, likelihood)


def minibatch_tasks() -> list[MinibatchTask]:
    """Digits, five noisy classes, and a regression."""
    images, labels = digits()
    return [
        _task("digits", _network(64, 32, 10), (images.flatten(1), labels), 400),
        _task("five classes", _network(20, 48, 5), blobs(), 800),
        _task("regression", _network(10, 32, 1), friedman(), 500, half_squares, "gaussian"),
    ]
