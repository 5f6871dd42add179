"""Thirteen more small training tasks, of other kinds than those of `analysis.small_tasks`.

NGD-T's rules were chosen while looking at `small_tasks`; those of `LOOKED_AT` were seen before the
last change of the rules, those of `APART` after it. The text is that of Python's own help pages and
sources.
"""

from __future__ import annotations

import inspect
import pydoc_data.topics
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, make_friedman2
from torch import Tensor, nn
from torch.nn import functional

from analysis.small_tasks import (
    Block,
    SmallTask,
    binary,
    cross_entropy,
    digits,
    g,
    half_squares,
    mlp,
    seeded,
    split,
)
from thermo_opt.sweep import Task


def poisson(f: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of counts, summed over outputs."""
    return functional.poisson_nll_loss(f, y, reduction="none", full=True).sum(-1).mean()


# ---- looked at while rules were chosen


def counts() -> tuple[Tensor, Tensor]:
    r = g(20)
    x = torch.randn(2400, 12, generator=r)
    a, b = torch.randn(12, 8, generator=r) / 12**0.5, torch.randn(8, 3, generator=r) / 8**0.5
    return x, torch.poisson((torch.tanh(2 * x @ a) @ b + 0.5).exp(), generator=r)


def characters(text: str, length: int, kept: int = 48) -> tuple[Tensor, Tensor]:
    """Windows of a text in its most frequent characters (all others: one more), and the characters
    that follow."""
    frequent = sorted(set(text), key=lambda c: (-text.count(c), c))[:kept]
    place = {c: k for k, c in enumerate(frequent)}
    codes = torch.tensor([place.get(c, kept) for c in text])
    windows = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
    windows = windows[torch.randperm(len(windows), generator=g(21))]
    return windows[:, :-1], windows[:, 1:]


def help_pages() -> str:
    pages = pydoc_data.topics.topics
    return "".join(pages[name] for name in sorted(pages))[:80_000]


class GRU(nn.Module):
    def __init__(self, words: int = 49, width: int = 64) -> None:
        super().__init__()
        self.word, self.core = nn.Embedding(words, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.word(x))[0])


def lorenz(count: int = 2400, length: int = 48) -> tuple[Tensor, Tensor]:
    """Noisy windows of one coordinate of Lorenz's system, and its values four samples later."""
    state, seen = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64), []
    for _ in range(20 * count + 2000):
        x, y, z = state
        state = state + 0.004 * torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])
        seen.append(float(state[0]))
    series = torch.tensor(seen[1000::6], dtype=torch.float32) / 8
    noisy = series + 0.1 * torch.randn(len(series), generator=g(22))
    starts = torch.randperm(len(series) - length - 4, generator=g(23))[:count]
    steps = torch.arange(length)
    return noisy[starts[:, None] + steps][:, None], series[starts[:, None] + steps + 4][..., None]


class Dilated(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 2, dilation=2**k) for k in range(4))
        self.last = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for k, layer in enumerate(self.layers):
            h = h + functional.silu(layer(functional.pad(h, (2**k, 0))))
        return self.last(h).mT


def black_and_white() -> tuple[Tensor, Tensor]:
    x, _ = digits()
    y = (x.flatten(1) > 0).float()
    return 2 * y - 1, y


def tumours() -> tuple[Tensor, Tensor]:
    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(y), generator=g(24))
    found = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    return found[order], torch.tensor(y)[order]


def gratings(count: int = 1600, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy gratings in six directions with any wavelength, phase and contrast."""
    r = g(25)
    y = torch.randint(6, (count,), generator=r)
    angle = y * torch.pi / 6 + 0.15 * torch.randn(count, generator=r)
    k, phase = 0.6 + torch.rand(count, generator=r), 6.3 * torch.rand(count, generator=r)
    contrast = 0.3 + torch.rand(count, generator=r)
    grid = torch.arange(side).float()
    along = grid[:, None] * angle.sin()[:, None, None] + grid * angle.cos()[:, None, None]
    x = contrast[:, None, None] * torch.sin(k[:, None, None] * along + phase[:, None, None])
    return (x + 0.7 * torch.randn(count, side, side, generator=r))[:, None], y


class ConvNext(nn.Module):
    """Depthwise convolutions, GroupNorm and wide pointwise layers around residual connections."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, width, 4, 2, 1), nn.Linear(width, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GroupNorm(1, width)),
                *(nn.Conv2d(width, 4 * width, 1), nn.GELU(), nn.Conv2d(4 * width, width, 1)),
            )
            for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h.mean((2, 3)))


# ---- kept apart


def clouds(count: int = 1600, points: int = 40) -> tuple[Tensor, Tensor]:
    """Noisy points on a sphere, a cube, a helix or a torus, turned at random."""
    r = g(30)
    u, t = torch.randn(count, points, 3, generator=r), torch.rand(count, points, generator=r) * 6.3
    s = torch.rand(count, points, generator=r) * 6.3
    sphere = functional.normalize(u, dim=-1)
    cube = u / u.abs().amax(-1, keepdim=True)
    helix = torch.stack([t.cos(), t.sin(), (t - 3.1) / 3], -1)
    torus = torch.stack(
        [(1 + 0.4 * s.cos()) * t.cos(), (1 + 0.4 * s.cos()) * t.sin(), 0.4 * s.sin()], -1
    )
    y = torch.randint(4, (count,), generator=r)
    x = torch.stack([sphere, cube, helix, torus], 1)[torch.arange(count), y]
    turn = torch.linalg.qr(torch.randn(count, 3, 3, generator=r))[0]
    return x @ turn + 0.15 * torch.randn(count, points, 3, generator=r), y


class DeepSet(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.each = mlp(3, width, width, width)
        self.all = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.each(x)
        return self.all(torch.cat([h.amax(1), h.mean(1)], 1))


def sources() -> str:
    return (inspect.getsource(textwrap) + inspect.getsource(inspect))[:80_000]


class Gated(nn.Module):
    """A causal transformer with RMSNorm, gated layers and tied words."""

    def __init__(self, words: int = 49, length: int = 40, width: int = 48) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width)
        nn.init.normal_(self.word.weight, std=width**-0.5)
        self.position = nn.Parameter(0.05 * torch.randn(length, width))
        self.attention = nn.ModuleList(Block(width, 4, causal=True) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.word(x) + self.position
        for k, block in enumerate(self.attention):
            h = block(h)
            a, b = self.gates[k](self.norms[k](h)).chunk(2, -1)
            h = h + self.downs[k](functional.silu(a) * b)
        return self.norms[2](h) @ self.word.weight.T


def spirals() -> tuple[Tensor, Tensor]:
    r = g(31)
    y = torch.randint(3, (900,), generator=r)
    t = 0.3 + 2.7 * torch.rand(900, generator=r)
    angle = 2 * t + y * 2.1 + 0.15 * torch.randn(900, generator=r)
    return torch.stack([t * angle.cos(), t * angle.sin()], 1), y


def deep_tanh() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(2, 32), nn.Tanh()]
    for _ in range(4):
        layers += [nn.Linear(32, 32), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(32, 3))


class Mixer(nn.Module):
    def __init__(self, width: int = 32, patches: int = 16) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(1, width, 2, 2), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.tokens = nn.ModuleList(mlp2(patches, 32, patches) for _ in range(2))
        self.channels = nn.ModuleList(mlp2(width, 64, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).mT
        for k in range(2):
            h = h + self.tokens[k](self.norms[2 * k](h).mT).mT
            h = h + self.channels[k](self.norms[2 * k + 1](h))
        return self.head(self.norms[4](h).mean(1))


def mlp2(i: int, h: int, o: int) -> nn.Module:
    return nn.Sequential(nn.Linear(i, h), nn.GELU(), nn.Dropout(0.1), nn.Linear(h, o))


def circuits() -> tuple[Tensor, Tensor]:
    """Four targets of different difficulty: an alternating-current circuit's impedance, its
    inverse, and both of another one."""
    first, a = make_friedman2(1800, noise=0.0, random_state=0)
    second, b = make_friedman2(1800, noise=0.0, random_state=1)
    x = torch.tensor((first - first.mean(0)) / first.std(0), dtype=torch.float32)
    z = torch.tensor((second - second.mean(0)) / second.std(0), dtype=torch.float32)
    y = torch.tensor([a, 1e5 / a, b, 1e5 / b], dtype=torch.float32).T.log()
    y = (y - y.mean(0)) / y.std(0)
    return torch.cat([x, z], 1), y + 0.2 * torch.randn(y.shape, generator=g(32))


class Residual(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.layers = nn.ModuleList(mlp2(width, 96, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + layer(norm(h))
        return self.last(h)


def brackets(count: int = 2000, length: int = 24) -> tuple[Tensor, Tensor]:
    """Random brackets of two kinds; for each place, how deep it is nested (at most 5)."""
    r = g(33)
    x = torch.randint(4, (count, length), generator=r)
    depth, found = torch.zeros(count, dtype=torch.long), []
    for t in range(length):
        depth = (depth + torch.where(x[:, t] < 2, 1, -1)).clamp(0, 5)
        found.append(depth)
    return x, torch.stack(found, 1)


class Tagger(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.word = nn.Embedding(4, width)
        self.core = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.word(x))[0])


def rare() -> tuple[Tensor, Tensor]:
    """One positive in fifteen."""
    r = g(34)
    x = torch.randn(4000, 16, generator=r)
    a = torch.randn(16, 6, generator=r) / 4
    h = torch.tanh(2 * x @ a).square().sum(1, keepdim=True)
    return x, torch.bernoulli((4 * (h - h.mean()) - 4).sigmoid(), generator=r)


Row = tuple[str, Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], int, int, Any, str]

LOOKED_AT: list[Row] = [
    ("counts, Poisson MLP", lambda: mlp(12, 48, 48, 3), counts, 96, 800, poisson, "poisson"),
    (
        *("GRU, help pages", GRU, lambda: characters(help_pages(), 40), 16, 200),
        *(cross_entropy, "categorical"),
    ),
    ("dilated convolutions, Lorenz", Dilated, lorenz, 32, 600, half_squares, "gaussian"),
    (
        *("autoencoder, digits", lambda: mlp(64, 64, 12, 64), black_and_white, 64, 400),
        *(binary, "bernoulli"),
    ),
    (
        "tumours, 369 rows",
        lambda: mlp(30, 32, 32, 2),
        tumours,
        64,
        200,
        *(cross_entropy, "categorical"),
    ),
    ("ConvNeXt, gratings", ConvNext, gratings, 32, 400, cross_entropy, "categorical"),
]

APART: list[Row] = [
    ("deep set, point clouds", DeepSet, clouds, 32, 400, cross_entropy, "categorical"),
    (
        *("gated transformer, source text", Gated, lambda: characters(sources(), 40), 16, 200),
        *(cross_entropy, "categorical"),
    ),
    ("deep tanh net, spirals", deep_tanh, spirals, 64, 300, cross_entropy, "categorical"),
    ("mixer, digits", Mixer, digits, 48, 400, cross_entropy, "categorical"),
    ("residual net, four targets", Residual, circuits, 64, 600, half_squares, "gaussian"),
    ("two-way LSTM, brackets", Tagger, brackets, 24, 300, cross_entropy, "categorical"),
    (
        *("rare class, BatchNorm", lambda: mlp(16, 48, 48, 1, nn.BatchNorm1d), rare, 128, 1000),
        *(binary, "bernoulli"),
    ),
]


def made(rows: list[Row]) -> list[SmallTask]:
    """The tasks of these rows."""
    found = []
    for name, make, data, size, held, loss, family in rows:
        train, validation = split(*data(), size, held)
        found.append(SmallTask(name, seeded(make), train, loss, validation, family))
    return found


def untouched(seed: int, network: str) -> Task:
    """One of `APART` as a task of `thermo_opt.sweep`, by its name; half of its held-out data are
    the probe, half the validation data."""
    (one,) = made([row for row in APART if row[0] == network])
    x, y = one.validation()
    half = len(x) // 2

    def train(_: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        return one.batches(generator.initial_seed())

    return Task(one.build(seed), train, (x[:half], y[:half]), (x[half:], y[half:]))
