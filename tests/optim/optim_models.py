"""Small models and data for the optimizer's tests."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Token and position tables, two blocks, a read-out."""

    def __init__(self, vocabulary: int = 32, width: int = 16, context: int = 16) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(Attention(width), Attention(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(
            self.norm(
                self.blocks(
                    self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
                )
            )
        )


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10)
    )


def cnn(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)),
    )


def transformer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Transformer()


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)


def noisy(data: tuple[Tensor, Tensor], share: float = 0.3) -> tuple[Tensor, Tensor]:
    """The same inputs with a share of the labels drawn at random, so that no model gets certain of
    them all."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(10, data[1].shape, generator=generator)
    return data[0], torch.where(
        torch.rand(data[1].shape, generator=generator) < share, random, data[1]
    )


def images() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x.unflatten(1, (8, 8)), y


def text() -> tuple[Tensor, Tensor]:
    """Next-character windows of the standard library's own words, letters folded into 32 codes."""
    source = Path(textwrap.__file__).read_text()
    codes = torch.tensor([ord(c) % 32 for c in source])
    rows = codes[torch.arange(0, len(codes) - 17, 5)[:, None] + torch.arange(17)]
    return rows[:, :-1], rows[:, 1:]


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood over predictions."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def minibatch(data: tuple[Tensor, Tensor], step: int, size: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(len(data[0]), (size,), generator=torch.Generator().manual_seed(step))
    return data[0][rows], data[1][rows]
