"""Training tasks that the studies and benchmarks share: digits MLP, CIFAR-10 CNN, character transformer.

A task gives a model, an endless stream of minibatches that depends only on the seed (every method sees the same data in the same order),
and fixed held-out data. Losses are mean negative log-likelihoods in nats (a token for the transformer).
"""

from __future__ import annotations

import io
import string
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from thermo_opt.errors import InputError

DATASETS = Path(__file__).resolve().parents[2] / "shared" / "datasets"


@dataclass(frozen=True)
class Task:
    """One training problem. `sample(generator)` draws a minibatch from the training set.

    ``probe`` is what results are reported on, ``validation`` what settings are chosen on; neither is trained on, and they are disjoint.
    """

    name: str
    model: Callable[[], nn.Module]
    sample: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    probe: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    batch_size: int

    def build(self, seed: int) -> nn.Module:
        """The model at its start for this seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model()

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An endless stream of minibatches, the same for every method given the seed."""
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            yield self.sample(generator)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, over examples or over tokens."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _from_arrays(x: Tensor, y: Tensor, batch_size: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (batch_size,), generator=generator)
        return x[rows], y[rows]

    return sample


def digits(data: Path | None = None, batch_size: int = 128) -> Task:
    """scikit-learn's 8×8 digits (1,797 images) and a 64-64-32-10 tanh MLP; the last 360 images are validation and probe. `data` is not used."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.data / 16.0, dtype=torch.float32)
    y = torch.tensor(bunch.target)

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    sample = _from_arrays(x[:-360], y[:-360], batch_size)
    return Task("digits", model, sample, (x[-180:], y[-180:]), (x[-360:-180], y[-360:-180]), batch_size)


def _read_images(path: Path, limit: int) -> tuple[Tensor, Tensor]:
    import pyarrow.parquet as parquet
    from PIL import Image

    if not path.is_file():
        raise InputError(
            f"{path} does not exist: pass --data a folder with CIFAR-10's train.parquet and test.parquet (columns img, label)."
        )
    table = parquet.read_table(path).slice(0, limit)
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table.column("img").to_pylist()]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    return (x - mean[:, None, None]) / std[:, None, None], torch.tensor(table.column("label").to_pylist())


class ConvNet(nn.Sequential):
    """Three 3×3 convolutions with pooling and a linear read-out: 151,290 parameters."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)),
            *(nn.Flatten(), nn.Linear(512, 112), nn.ReLU(), nn.Linear(112, 10)),
        )


def cifar10(data: Path | None = None, batch_size: int = 128, limit: int = 50_000, probe: int = 1000) -> Task:
    """CIFAR-10 without augmentation and a three-convolution network of 152 k parameters; the test set's head is the probe, what follows it validation."""
    folder = data or DATASETS / "cifar10"
    x, y = _read_images(folder / "train.parquet", limit)
    held, labels = _read_images(folder / "test.parquet", 2 * probe)
    sample = _from_arrays(x, y, batch_size)
    return Task("cifar10", ConvNet, sample, (held[:probe], labels[:probe]), (held[probe:], labels[probe:]), batch_size)


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class CharGPT(nn.Module):
    """A decoder-only character transformer with learned positions and an untied read-out."""

    def __init__(self, vocabulary: int, layers: int = 4, width: int = 128, context: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.02 / (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 0.02
                )

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions(places))))


def _read_text(data: Path | None) -> str:
    """The text at `data` (or its input.txt), or a megabyte of the standard library's own source, which is always at hand."""
    if data is not None:
        path = data / "input.txt" if data.is_dir() else data
        if not path.is_file():
            raise InputError(
                f"{path} does not exist: pass --data a text file (tiny Shakespeare's input.txt, or any other)."
            )
        return path.read_text()
    folder = Path(sysconfig.get_paths()["stdlib"])
    keep = set(string.printable)
    text = ""
    for path in sorted(folder.glob("*.py")):
        text += "".join(c for c in path.read_text(errors="ignore") if c in keep)
        if len(text) > 1_100_000:
            break
    return text


def characters(
    data: Path | None = None,
    batch_size: int = 32,
    layers: int = 4,
    width: int = 128,
    context: int = 64,
    probe: int = 128,
) -> Task:
    """A character transformer on `data` (a text file or its folder), or on the standard library's source; the last tenth of the text is held out."""
    text = _read_text(data)
    letters = sorted(set(text))
    index = {c: i for i, c in enumerate(letters)}
    ids = torch.tensor([index[c] for c in text])
    train, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    window = torch.arange(context + 1)

    def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(train) - context - 1, (batch_size,), generator=generator)
        rows = train[starts[:, None] + window]
        return rows[:, :-1], rows[:, 1:]

    starts = torch.linspace(0, len(held_out) - context - 2, 2 * probe).long()
    rows = held_out[starts[:, None] + window]
    return Task(
        "transformer",
        lambda: CharGPT(len(letters), layers, width, context),
        sample,
        (rows[::2, :-1], rows[::2, 1:]),
        (rows[1::2, :-1], rows[1::2, 1:]),
        batch_size,
    )


TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "cifar10": cifar10, "transformer": characters}
