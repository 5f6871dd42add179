"""Training tasks that studies and benchmarks share: digits MLP, CIFAR-10, ImageNet-style images,
character transformer.

Each is a task of `thermo_opt.sweep`: a function of the seed, and of options, that gives a model, a
stream of minibatches that depends only on the seed (every method sees the same data in the same
order), and fixed held-out data. Losses are mean negative log-likelihoods in nats (per token for the
transformer).
"""

from __future__ import annotations

import functools
import string
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from analysis.images import Images, crop_and_flip, open_images
from analysis.networks import CharGPT, ConvNet, resnet18
from thermo_opt.errors import InputError
from thermo_opt.sweep import Task

DATASETS = Path(__file__).resolve().parents[2] / "shared" / "datasets"
Pair = tuple[Tensor, Tensor]
SPLIT_SEED = 0
"""Of the draw of held-out examples, whatever a run's seed."""


def _passes(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Minibatches of these rows, reshuffled at each pass; the last ones of a pass that don't fill a
    minibatch are left out. The generator goes on from a seed of its own, so that the order of the
    data and the weights' start don't share one."""
    generator.manual_seed(1000 + generator.initial_seed())
    size = min(batch_size or len(rows), len(rows))
    while True:
        order = rows[torch.randperm(len(rows), generator=generator)]
        yield from order[: len(rows) // size * size].split(size)


@functools.cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pixels, labels, and the rows of the training, probe and validation parts."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, held = train_test_split(
        range(len(labels)), test_size=540, stratify=labels, random_state=SPLIT_SEED
    )
    probe, validation = train_test_split(
        held, test_size=180, stratify=labels[held], random_state=SPLIT_SEED
    )
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    return x, y, torch.tensor(train), torch.tensor(probe), torch.tensor(validation)


def digits(seed: int) -> Task:
    """scikit-learn's 8×8 digits (1,797 images) and a 64-64-32-10 tanh MLP.

    360 images are the probe and 180 validation, drawn at random within each class: the file's last
    images come from other writers than its first.
    """
    x, y, train, probe, validation = _digits()

    def stream(batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        for batch in _passes(train, batch_size, generator):
            yield x[batch], y[batch]

    model = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
    )
    return Task(model, stream, (x[probe], y[probe]), (x[validation], y[validation]))


def _image_task(
    model: nn.Module,
    train: Images,
    held: Images,
    *,
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
            f"{len(order)} training images can't spare {validation} for validation: give more"
        )
    rows = order[validation:][:limit]
    mean, deviation = (torch.tensor(m)[:, None, None] for m in moments)

    def read(images: Images, chosen: Tensor) -> Pair:
        x, y = images.batch(chosen)
        return (x - mean) / deviation, y

    def stream(batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        for batch in _passes(rows, batch_size, generator):
            x, y = read(train, batch)
            yield (crop_and_flip(x, generator) if augment else x), y

    def test() -> Iterator[Pair]:
        for part in torch.arange(len(held)).split(500):
            yield read(held, part)

    parts = read(held, drawn), read(train, order[:validation])
    return Task(model, stream, *parts, test if whole_test else None)


def cifar10(
    seed: int,
    data: str | None = None,
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
    source = (
        "https://www.cs.toronto.edu/~kriz/cifar.html, as Parquet uoft-cs/cifar10 on "
        "the Hugging Face hub"
    )
    folder = Path(data) if data else DATASETS / "cifar10"
    train, held = _opened(folder, ("test",), 32, source)
    model = ConvNet(width=width or 32) if network == "cnn" else resnet18(width=width or 64)
    return _image_task(
        model,
        train,
        held,
        augment=augment,
        limit=limit,
        probe=probe,
        validation=validation,
        whole_test=whole_test,
        moments=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    )


def imagenet(
    seed: int,
    data: str | None = None,
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
    source = (
        "Tiny-ImageNet: http://cs231n.stanford.edu/tiny-imagenet-200.zip; ImageNet: "
        "https://image-net.org"
    )
    folder = Path(data) if data else DATASETS / "tiny-imagenet-50"
    train, held = _opened(folder, ("val", "valid", "test"), size, source, classes)
    return _image_task(
        resnet18(1 + int(train.labels.max()), width, stem),
        train,
        held,
        augment=augment,
        limit=limit,
        probe=probe,
        validation=validation,
        whole_test=True,
        moments=((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )


@functools.lru_cache(maxsize=2)
def _opened(
    folder: Path, held_splits: tuple[str, ...], size: int, source: str, classes: int | None = None
) -> tuple[Images, Images]:
    """Training and held-out images of the first ``classes`` classes; they stay open, and what was
    decoded of them in memory, from run to run of a process."""
    train = open_images(folder, ("train",), size, source)
    held = open_images(folder, held_splits, size, source, train.classes)
    known = 1 + int(train.labels.max())
    if int(held.labels.max()) >= known:
        raise InputError(
            f"{folder}: the held-out images have classes that the training images lack: give all "
            "of them"
        )
    count = min(classes or known, known)
    return (train, held) if count == known else (_first(train, count), _first(held, count))


def _first(images: Images, count: int) -> Images:
    rows = torch.nonzero(images.labels < count).flatten().tolist()
    names = [images.names[row] for row in rows]
    return Images(names, images.labels[rows].tolist(), lambda i: images.read(rows[i]), images.size)


@functools.lru_cache(maxsize=2)
def _text(data: Path | None) -> tuple[Tensor, int]:
    """Character numbers, and how many there are, of the text at `data` (or its input.txt), or of a
    megabyte of the standard library's own source, which is always at hand."""
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
            return _numbered(path.read_text(encoding="utf-8"))
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
    return _numbered(text)


def _numbered(text: str) -> tuple[Tensor, int]:
    letters = sorted(set(text))
    index = {c: i for i, c in enumerate(letters)}
    return torch.tensor([index[c] for c in text]), len(letters)


def transformer(
    seed: int,
    data: str | None = None,
    layers: int = 4,
    width: int = 128,
    context: int = 64,
    heads: int = 4,
    dropout: float = 0.0,
    probe: int = 128,
    text: str = "stdlib",
    test: int = 0,
) -> Task:
    """A character transformer on `data` (a text file or its folder), on the standard library's
    source ("stdlib") or on tiny Shakespeare.

    The last tenth of the text is held out: probe and validation are windows of it, in turns.
    ``test``: so many windows between theirs, for the final loss (0: the probe serves).
    """
    if data is None and text == "shakespeare":
        data = str(DATASETS / "tinyshakespeare")
    ids, letters = _text(None if data is None else Path(data))
    train, held_out = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    if len(held_out) < 2 * (context + 1):
        raise InputError(
            f"a text of {len(ids)} characters is too short for a context of {context}: give a "
            "longer one"
        )
    window = torch.arange(context + 1)

    def stream(batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        generator.manual_seed(1000 + generator.initial_seed())
        while True:
            starts = torch.randint(len(train) - context - 1, (batch_size,), generator=generator)
            rows = train[starts[:, None] + window]
            yield rows[:, :-1], rows[:, 1:]

    starts = torch.linspace(0, len(held_out) - context - 2, 2 * probe + test).long()
    rows = held_out[starts[:, None] + window]
    part = torch.arange(len(rows)) * 2 * probe // len(rows)  # as many of each, evenly spread
    first = torch.diff(part, prepend=torch.tensor([-1])) > 0
    rows, others = rows[first], rows[~first]

    def tested() -> Iterator[Pair]:
        for some in others.split(64):
            yield some[:, :-1], some[:, 1:]

    return Task(
        CharGPT(letters, layers, width, context, heads, dropout),
        stream,
        (rows[::2, :-1], rows[::2, 1:]),
        (rows[1::2, :-1], rows[1::2, 1:]),
        tested if test else None,
    )
