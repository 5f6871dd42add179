"""Twelve small training tasks of different kinds, all synthetic or scikit-learn's, for measuring
how an optimizer behaves.

Each trains in seconds on one thread. They are no benchmark: they are there so that a promise is
checked on many shapes of network, output and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_digits, make_classification, make_friedman1
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class SmallTask:
    """One task: ``build(seed)`` a network, endless ``batches(seed)`` of (input, target), the mean
    ``loss`` and its likelihood."""

    name: str
    build: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[Tensor, Tensor], Tensor]
    validation: Callable[[], Batch]
    likelihood: str = "categorical"


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(f.flatten(0, -2), y.flatten())


def half_squares(f: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (f - y).square().sum(-1).mean()


def binary(f: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(f, y, reduction="none").sum(-1).mean()


def draws(x: Any, y: Tensor, size: int) -> Callable[[int], Iterator[Batch]]:
    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(y), generator=generator)
            for k in order.split(size):
                if len(k) == size:
                    yield x[k], y[k]

    return batches


def seeded(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make()

    return build


def split(x: Tensor, y: Tensor, size: int, held: int) -> tuple[Any, Any]:
    return draws(x[held:], y[held:], size), lambda: (x[:held], y[:held])


def g(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- images


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=g(0))
    return torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1, torch.tensor(
        found.target
    )[order]


def gelu_cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU()),
        *(nn.Conv2d(32, 32, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(128, 10)),
    )


class ViT(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList([Block(width, 4, causal=False) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).mT + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


class Block(nn.Module):
    def __init__(
        self, width: int, heads: int, causal: bool, dropout: float = 0.0, cross: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.n1, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.n2, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )
        if cross:
            self.n3, self.q = nn.LayerNorm(width), nn.Linear(width, width)
            self.kv, self.cross_out = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        drop = self.dropout if self.training else 0.0
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=drop)
        return out.transpose(1, 2).flatten(2)

    def forward(self, h: Tensor, memory: Tensor | None = None) -> Tensor:
        h = h + self.out(self.attend(*self.qkv(self.n1(h)).chunk(3, -1), self.causal))
        if memory is not None:
            h = h + self.cross_out(
                self.attend(self.q(self.n3(h)), *self.kv(memory).chunk(2, -1), False)
            )
        up = functional.gelu(self.up(self.n2(h)))
        return h + functional.dropout(self.down(up), self.dropout, self.training)


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def two(i: int, o: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(i, o, 3, 1, 1), nn.ReLU(), nn.Conv2d(o, o, 3, 1, 1), nn.ReLU()
            )

        self.down1, self.down2, self.mid = (
            two(1, width),
            two(width, 2 * width),
            two(2 * width, 2 * width),
        )
        self.up2, self.up1, self.head = (
            two(4 * width, width),
            two(2 * width, width),
            nn.Conv2d(width, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        c = functional.interpolate(self.mid(functional.max_pool2d(b, 2)), scale_factor=2)
        d = functional.interpolate(self.up2(torch.cat([b, c], 1)), scale_factor=2)
        return self.head(self.up1(torch.cat([a, d], 1))).movedim(1, -1)


def shapes(count: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Noisy images of a disc and a square; each pixel's class is background, disc or square."""
    r = g(1)
    grid = torch.arange(side).float()
    c = 3 + (side - 6) * torch.rand(count, 4, 1, 1, generator=r)
    size = 2 + 2 * torch.rand(count, 2, 1, 1, generator=r)
    yy, xx = grid[:, None], grid[None, :]
    disc = (yy - c[:, 0]) ** 2 + (xx - c[:, 1]) ** 2 < size[:, 0] ** 2
    square = ((yy - c[:, 2]).abs() < size[:, 1]) & ((xx - c[:, 3]).abs() < size[:, 1])
    y = torch.where(square, 2, disc.long())
    return ((y > 0).float() + 0.5 * torch.randn(count, side, side, generator=r))[:, None], y


# ---- tables


def blobs() -> tuple[Tensor, Tensor]:
    x, y = make_classification(3000, 20, n_informative=10, n_classes=5, flip_y=0.1, random_state=0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def friedman() -> tuple[Tensor, Tensor]:
    x, y = make_friedman1(2000, 10, noise=0.5, random_state=0)
    y = torch.tensor((y - y.mean()) / y.std(), dtype=torch.float32)[:, None]
    return torch.tensor(x, dtype=torch.float32) * 2 - 1, y


def many_labels() -> tuple[Tensor, Tensor]:
    r = g(2)
    x = torch.randn(2000, 30, generator=r)
    a, b = torch.randn(30, 24, generator=r) / 30**0.5, torch.randn(24, 12, generator=r) / 24**0.5
    y = torch.bernoulli((4 * torch.tanh(2 * x @ a) @ b - 1).sigmoid(), generator=r)
    return x, y


def mixed_table() -> tuple[Any, Tensor]:
    """Five categories and eight numbers; counts as targets would suit, here three classes with
    noise."""
    r = g(3)
    cats = torch.randint(8, (3000, 5), generator=r)
    nums = torch.randn(3000, 8, generator=r)
    tables = torch.randn(5, 8, 4, generator=r)
    h = sum(tables[j, cats[:, j]] for j in range(5)) + nums @ torch.randn(8, 4, generator=r)
    logits = torch.tanh(h) @ torch.randn(4, 3, generator=r) * 2
    y = (
        torch.distributions.Categorical(logits=logits)
        .logits.add(-torch.log(-torch.log(torch.rand(3000, 3, generator=r))))
        .argmax(-1)
    )
    return torch.cat([cats.float(), nums], 1), y


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(8, 6) for _ in range(5)])
        self.body = nn.Sequential(
            *(
                nn.Linear(38, 64),
                nn.ReLU(),
                nn.Dropout(0.1),
                nn.Linear(64, 64),
                nn.ReLU(),
                nn.Linear(64, 3),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = [table(x[:, j].long()) for j, table in enumerate(self.tables)]
        return self.body(torch.cat([*parts, x[:, 5:]], 1))


# ---- a graph


class GraphNet(nn.Module):
    """Two graph convolutions over a fixed graph; returns the labelled nodes in training, the others
    in evaluation."""

    def __init__(self, adjacency: Tensor, x: Tensor, labelled: Tensor, held: Tensor) -> None:
        super().__init__()
        for name, t in (("a", adjacency), ("x", x), ("labelled", labelled), ("held", held)):
            self.register_buffer(name, t, persistent=False)
        self.one, self.two = nn.Linear(x.shape[1], 32), nn.Linear(32, 4)

    def forward(self, nodes: Tensor) -> Tensor:
        h = functional.dropout(self.x, 0.5, self.training)
        h = torch.relu(self.a @ self.one(h))
        h = functional.dropout(h, 0.5, self.training)
        return (self.a @ self.two(h))[nodes]


def graph(nodes: int = 800, labels: int = 200) -> SmallTask:
    r = g(4)
    y = torch.randint(4, (nodes,), generator=r)
    same = (y[:, None] == y[None, :]).float()
    links = (
        (torch.rand(nodes, nodes, generator=r) < 0.012 * same + 0.004 * (1 - same)).float().triu(1)
    )
    links = links + links.T + torch.eye(nodes)
    scale = links.sum(1).rsqrt()
    a = scale[:, None] * links * scale[None, :]
    x = 0.35 * torch.randn(4, 100, generator=r)[y] + torch.randn(nodes, 100, generator=r)
    order = torch.randperm(nodes, generator=r)
    labelled, held = order[:labels], order[labels:]

    def batches(seed: int) -> Iterator[Batch]:
        while True:
            yield labelled, y[labelled]

    return SmallTask(
        "graph, 200 labels",
        seeded(lambda: GraphNet(a, x, labelled, held)),
        batches,
        cross_entropy,
        lambda: (held, y[held]),
    )


# ---- sequences


def language(count: int, length: int, words: int, order: int, seed: int) -> Tensor:
    """Sequences from a random Markov chain in which each word depends on the one ``order`` before
    and on the last."""
    r = g(seed)
    table = (3 * torch.randn(words, words, words, generator=r) / 1.5).softmax(-1)
    x = torch.randint(words, (count, length), generator=r)
    for t in range(order, length):
        p = table[x[:, t - order], x[:, t - 1]]
        x[:, t] = torch.multinomial(p, 1, generator=r)[:, 0]
    return x


class GPT(nn.Module):
    def __init__(
        self, words: int, length: int, width: int = 32, layers: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([Block(width, 4, True, dropout) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        h = self.word(x) + self.position(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class LSTM(nn.Module):
    def __init__(self, words: int, width: int = 48) -> None:
        super().__init__()
        self.word, self.core = nn.Embedding(words, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.word(x))[0])


class TextClassifier(nn.Module):
    """Bag of attended words with dropout: which of six topics does a sequence speak of."""

    def __init__(self, words: int, width: int = 32) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width)
        self.position = nn.Embedding(24, width)
        self.drop = nn.Dropout(0.2)
        self.blocks = nn.ModuleList([Block(width, 4, False, 0.1) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.word(x) + self.position.weight)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


def topics(count: int = 3000, words: int = 200, length: int = 24) -> tuple[Tensor, Tensor]:
    r = g(5)
    p = (1.2 * torch.randn(6, words, generator=r)).softmax(-1)
    common = torch.full((words,), 1.0 / words)
    y = torch.randint(6, (count,), generator=r)
    x = torch.multinomial((0.3 * p + 0.7 * common)[y], length, replacement=True, generator=r)
    return x, y


class Copy(nn.Module):
    """An encoder and a decoder that learns to copy: the plateau is at the entropy of a word."""

    def __init__(self, words: int = 32, length: int = 16, width: int = 32) -> None:
        super().__init__()
        self.word = nn.Embedding(words + 1, width)
        self.position = nn.Embedding(length, width)
        self.encoder = nn.ModuleList([Block(width, 4, False)])
        self.decoder = nn.ModuleList([Block(width, 4, True, cross=True)])
        self.n1, self.n2, self.head = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            nn.Linear(width, words, bias=False),
        )
        self.start = words

    def forward(self, x: Tensor) -> Tensor:
        memory = self.word(x) + self.position.weight
        for block in self.encoder:
            memory = block(memory)
        memory = self.n1(memory)
        h = torch.cat([torch.full_like(x[:, :1], self.start), x[:, :-1]], 1)
        h = self.word(h) + self.position.weight
        for block in self.decoder:
            h = block(h, memory)
        return self.head(self.n2(h))


def copying() -> SmallTask:
    def batches(seed: int) -> Iterator[Batch]:
        r = g(seed + 100)
        while True:
            x = torch.randint(32, (24, 16), generator=r)
            yield x, x

    held = torch.randint(32, (100, 16), generator=g(9))
    return SmallTask(
        "copy, encoder-decoder", seeded(Copy), batches, cross_entropy, lambda: (held, held)
    )


def sequences(name: str, make: Callable[[], nn.Module], x: Tensor, size: int) -> SmallTask:
    train, held = split(x[:, :-1], x[:, 1:], size, 100)
    return SmallTask(name, seeded(make), train, cross_entropy, held)


def tasks() -> list[SmallTask]:
    """All twelve."""
    found: list[SmallTask] = []

    def add(
        name: str,
        make: Any,
        data: Any,
        size: int,
        held: int,
        loss: Any = cross_entropy,
        lik: str = "categorical",
    ):
        train, val = split(*data, size, held)
        found.append(SmallTask(name, seeded(make), train, loss, val, lik))

    add("GELU CNN, digits", gelu_cnn, digits(), 64, 400)
    add("MLP, 5 classes", lambda: mlp(20, 64, 64, 5), blobs(), 128, 1000)
    add("small ViT, digits", ViT, digits(), 32, 300)
    found.append(
        sequences("GPT, Markov text", lambda: GPT(20, 31), language(1700, 32, 20, 2, 6), 16)
    )
    found.append(sequences("LSTM, Markov text", lambda: LSTM(16), language(1700, 32, 16, 1, 7), 16))
    add("U-Net, segmentation", UNet, shapes(600), 16, 150)
    add(
        "MLP, regression",
        lambda: mlp(10, 64, 64, 1),
        friedman(),
        128,
        600,
        half_squares,
        "gaussian",
    )
    add(
        "multi-label, BatchNorm",
        lambda: mlp(30, 64, 64, 12, nn.BatchNorm1d),
        many_labels(),
        128,
        600,
        binary,
        "bernoulli",
    )
    found.append(graph())
    add("text, dropout", lambda: TextClassifier(200), topics(), 32, 400)
    found.append(copying())
    add("table with categories", Table, mixed_table(), 128, 1000)
    return found


def mlp(
    i: int, a: int, b: int, o: int, norm: Callable[[int], nn.Module] | None = None
) -> nn.Module:
    layers: list[nn.Module] = []
    for k, w in ((i, a), (a, b)):
        layers += [nn.Linear(k, w), *([norm(w)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(b, o))
