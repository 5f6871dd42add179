"""Training tasks that the studies and benchmarks share: digits MLP, CIFAR-10, ImageNet-style
images, character transformer.

A task gives a model, an endless stream of minibatches that depends only on the seed (every method
sees the same data in the same order), and fixed held-out data. Losses are mean negative
log-likelihoods in nats (a token for the transformer).
"""

from __future__ import annotations

import string
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from analysis.images import Images, crop_and_flip, open_images
from analysis.networks import CharGPT, ConvNet, resnet18
from thermo_opt.errors import InputError

DATASETS = Path(__file__).resolve().parents[2] / "shared" / "datasets"
SPLIT_SEED = 0
"""Of the draw of held-out examples, whatever a run's seed."""

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One training problem. ``stream(generator)`` gives minibatches of the training data without
    end.

    ``probe`` is what runs are recorded and results reported on, ``validation`` what settings are
    chosen on; neither is trained on, and they are disjoint. ``test``: parts of a larger set for the
    final loss and accuracy; None: the probe serves.
    """

    name: str
    model: Callable[[], nn.Module]
    stream: Callable[[torch.Generator], Iterator[Pair]]
    probe: Pair
    validation: Pair
    batch_size: int
    test: Callable[[], Iterator[Pair]] | None = None

    def build(self, seed: int) -> nn.Module:
        """The model at its start for this seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model()

    def batches(self, seed: int) -> Iterator[Pair]:
        """An endless stream of minibatches, the same for every method given the seed."""
        return self.stream(torch.Generator().manual_seed(1000 + seed))


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats, over examples or over tokens."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _passes(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Minibatches of these rows, reshuffled at each pass; the last ones of a pass that don't fill a
    minibatch are left out."""
    size = min(batch_size, len(rows))
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from order[: len(rows) // size * size].split(size)


def digits(data: Path | None = None, batch_size: int = 128) -> Task:
    """scikit-learn's 8×8 digits (1,797 images) and a 64-64-32-10 tanh MLP.

    360 images are the probe and 180 validation, drawn at random within each class: the file's last
    images come from other writers than its first. ``batch_size`` 0: all training data at every
    step. ``data`` is not used.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    train, held = train_test_split(
        range(len(y)), test_size=540, stratify=labels, random_state=SPLIT_SEED
    )
    probe, validation = train_test_split(
        held, test_size=180, stratify=labels[held], random_state=SPLIT_SEED
    )

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
        )

    def stream(generator: torch.Generator) -> Iterator[Pair]:
        rows = torch.tensor(train)
        for batch in _passes(rows, batch_size or len(rows), generator):
            yield x[batch], y[batch]

    return Task(
        "digits",
        model,
        stream,
        (x[probe], y[probe]),
        (x[validation], y[validation]),
        batch_size or len(train),
    )


def _image_task(
    name: str,
    train: Images,
    held: Images,
    model: Callable[[], nn.Module],
    batch_size: int,
    augment: bool,
    limit: int | None,
    probe: int,
    validation: int,
    whole_test: bool,
    moments: tuple[tuple[float, ...], tuple[float, ...]],
) -> Task:
    """A task on images: validation and training rows drawn from the training split, the probe from
    the held-out one."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(train), generator=generator)
    drawn = torch.randperm(len(held), generator=generator)[:probe]
    if len(order) <= validation:
        raise InputError(
            f"{name}: {len(order)} training images can't spare {validation} for validation: give "
            "more"
        )
    rows = order[validation:][:limit]
    mean, deviation = (torch.tensor(m)[:, None, None] for m in moments)

    def read(images: Images, chosen: Tensor) -> Pair:
        x, y = images.batch(chosen)
        return (x - mean) / deviation, y

    def stream(generator: torch.Generator) -> Iterator[Pair]:
        for batch in _passes(rows, batch_size, generator):
            x, y = read(train, batch)
            yield (crop_and_flip(x, generator) if augment else x), y

    def test() -> Iterator[Pair]:
        for part in torch.arange(len(held)).split(500):
            yield read(held, part)

    return Task(
        name,
        model,
        stream,
        read(held, drawn),
        read(train, order[:validation]),
        min(batch_size, len(rows)),
        test if whole_test else None,
    )


def cifar10(
    data: Path | None = None,
    batch_size: int = 128,
    limit: int | None = None,
    probe: int = 1000,
    validation: int = 1000,
    network: str = "cnn",
    width: int | None = None,
    augment: bool = False,
    whole_test: bool = False,
) -> Task:
    """CIFAR-10 and a three-convolution network of 151 k parameters ("cnn") or ResNet-18
    ("resnet18"); ``limit``: images trained on."""
    folder = data or DATASETS / "cifar10"
    source = (
        "https://www.cs.toronto.edu/~kriz/cifar.html, as Parquet uoft-cs/cifar10 on "
        "the Hugging Face hub"
    )
    train = open_images(folder, ("train",), 32, source)
    held = open_images(folder, ("test",), 32, source, train.classes)

    def model() -> nn.Module:
        return ConvNet(width=width or 32) if network == "cnn" else resnet18(width=width or 64)

    moments = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    return _image_task(
        "cifar10",
        train,
        held,
        model,
        batch_size,
        augment,
        limit,
        probe,
        validation,
        whole_test,
        moments,
    )


def imagenet(
    data: Path | None = None,
    batch_size: int = 128,
    limit: int | None = None,
    probe: int = 1000,
    validation: int = 1000,
    width: int = 64,
    stem: str = "small",
    size: int = 64,
    classes: int | None = None,
    augment: bool = True,
) -> Task:
    """ImageNet-style images at ``size`` × ``size`` pixels and ResNet-18; ``classes``: only the
    first so many. By default Tiny-ImageNet's 50."""
    folder = data or DATASETS / "tiny-imagenet-50"
    source = "Tiny-ImageNet: http://cs231n.stanford.edu/tiny-imagenet-200.zip; ImageNet: https://image-net.org"
    train = open_images(folder, ("train",), size, source)
    held = open_images(folder, ("val", "valid", "test"), size, source, train.classes)
    known = 1 + int(train.labels.max())
    if int(held.labels.max()) >= known:
        raise InputError(
            f"{folder}: the held-out images have classes that the training images lack: give all "
            "of them"
        )
    count = min(classes or known, known)
    if count < known:
        train, held = (_first_classes(images, count) for images in (train, held))

    moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return _image_task(
        "imagenet",
        train,
        held,
        lambda: resnet18(count, width, stem),
        batch_size,
        augment,
        limit,
        probe,
        validation,
        True,
        moments,
    )


def _first_classes(images: Images, count: int) -> Images:
    rows = torch.nonzero(images.labels < count).flatten().tolist()
    names = [images.names[row] for row in rows]
    return Images(names, images.labels[rows].tolist(), lambda i: images.read(rows[i]), images.size)


def _read_text(data: Path | None) -> str:
    """The text at `data` (or its input.txt), or a megabyte of the standard library's own source,
    which is always at hand."""
    if data is not None:
        path = data / "input.txt" if data.is_dir() else data
        if not path.is_file():
            raise InputError(
                f"{path} does not exist: pass a text file (tiny Shakespeare's input.txt, "
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                "input.txt, "
                "or any other)."
            )
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(
                f"{path} is no text in UTF-8: convert it, or give another file"
            ) from None
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
    heads: int = 4,
    dropout: float = 0.0,
    probe: int = 128,
    text: str = "stdlib",
) -> Task:
    """A character transformer on `data` (a text file or its folder), on the standard library's
    source ("stdlib") or on tiny Shakespeare.

    The last tenth of the text is held out: probe and validation are windows of it, in turns.
    """
    if data is None and text == "shakespeare":
        data = DATASETS / "tinyshakespeare"
    content = _read_text(data)
    letters = sorted(set(content))
    index = {c: i for i, c in enumerate(letters)}
    ids = torch.tensor([index[c] for c in content])
    train, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    if len(held_out) < 2 * (context + 1):
        raise InputError(
            f"a text of {len(ids)} characters is too short for a context of {context}: give a "
            "longer one"
        )
    window = torch.arange(context + 1)

    def stream(generator: torch.Generator) -> Iterator[Pair]:
        while True:
            starts = torch.randint(len(train) - context - 1, (batch_size,), generator=generator)
            rows = train[starts[:, None] + window]
            yield rows[:, :-1], rows[:, 1:]

    starts = torch.linspace(0, len(held_out) - context - 2, 2 * probe).long()
    rows = held_out[starts[:, None] + window]
    return Task(
        "transformer",
        lambda: CharGPT(len(letters), layers, width, context, heads, dropout),
        stream,
        (rows[::2, :-1], rows[::2, 1:]),
        (rows[1::2, :-1], rows[1::2, 1:]),
        batch_size,
    )


TASKS: dict[str, Callable[..., Task]] = {
    "digits": digits,
    "cifar10": cifar10,
    "imagenet": imagenet,
    "transformer": characters,
}
