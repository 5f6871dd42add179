"""What a sweep trains: a model, training data and a probe, by name or from the user's own function.

A task is a function ``(seed, **options)`` that returns a `Task`, or the first three of its parts as
a tuple ``(model, train, probe)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.models import load_factory, working_directory_last

Pair: TypeAlias = tuple[Tensor, Tensor]
Stream: TypeAlias = Callable[[int, torch.Generator], Iterator[Pair]]

_DATA_SEED = 0
"""Of the built-in tasks' data and split, whatever the run's seed."""


@dataclass(frozen=True, eq=False)
class Task:
    """One training problem, for one seed.

    Attributes:
        model: the network at its start; its weights depend on the seed.
        train: a pair of tensors (inputs, targets), a map-style dataset of such pairs, or a function
            ``(batch_size, generator)`` that gives minibatches without end, ``batch_size`` 0 meaning
            all data at once.
        probe: a pair of tensors that runs are recorded on, the same for every seed and never
            trained on.
        validation: a pair that settings are chosen on, apart from both; None where the task has
            none.
        test: gives the parts of a larger held-out set; None: the probe serves.
    """

    model: nn.Module
    train: Any
    probe: Pair
    validation: Pair | None = None
    test: Callable[[], Iterable[Pair]] | None = None


def digits(seed: int) -> Task:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, 64-64-10 tanh network; 360 of them, drawn once,
    are the probe."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "the task 'digits' needs scikit-learn: pip install scikit-learn, or use 'blobs'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_DATA_SEED))
    x, y = x[order], y[order]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    return Task(model, (x[360:], y[360:]), (x[:360], y[:360]))


def blobs(seed: int) -> Task:
    """Four overlapping Gaussian clouds in 8 dimensions, 512 points each to train on, 50 in the
    probe; 8-32-4 tanh network."""
    generator = torch.Generator().manual_seed(_DATA_SEED)
    centres = 1.5 * torch.randn(4, 8, generator=generator)
    y = torch.arange(4).repeat(562)
    x = centres[y] + torch.randn(len(y), 8, generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    return Task(model, (x[200:], y[200:]), (x[:200], y[:200]))


TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "blobs": blobs}
"""Tasks by name."""


def build_task(task: str, seed: int, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a name or function for a seed; InputError when its function gives something
    else."""
    function = TASKS[task] if task in TASKS else load_function(task, "[task] factory")
    torch.manual_seed(seed)
    try:
        with working_directory_last():
            made = function(seed, **(options or {}))
    except InputError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise InputError(
            f"[task] {task} failed for seed {seed} ({type(error).__name__}: {error})"
        ) from error
    if isinstance(made, tuple) and len(made) == 3:
        made = Task(*made)
    if not (isinstance(made, Task) and isinstance(made.model, nn.Module) and is_pair(made.probe)):
        raise InputError(
            f"[task] {task} must return (model, train, probe), train and probe pairs (inputs, "
            "targets)"
        )
    train = made.train
    sized = is_pair(train) or (hasattr(train, "__len__") and hasattr(train, "__getitem__"))
    if not sized and not callable(train):
        raise InputError(
            f"[task] {task}: training data must be a pair of tensors, a dataset with a length, or "
            "a function (batch_size, generator) that gives minibatches"
        )
    if sized and len(train[0] if is_pair(train) else train) == 0:
        raise InputError(f"[task] {task}: there are no training data")
    return made


def minibatches(train: Any, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
    """Minibatches of a task's training data without end: shuffled passes, of which the last
    examples that don't fill a minibatch are left out; all data at once where ``batch_size`` is 0 or
    larger than they are many."""
    from torch.utils.data import default_collate

    tensors = is_pair(train)
    if not tensors and not hasattr(train, "__getitem__"):
        yield from train(batch_size, generator)
        return
    count = len(train[0]) if tensors else len(train)
    size = min(batch_size or count, count)
    while True:
        order = torch.randperm(count, generator=generator) if size < count else torch.arange(count)
        for rows in order[: count // size * size].split(size):
            x, y = (
                (part[rows] for part in train)
                if tensors
                else default_collate([train[int(i)] for i in rows])
            )
            yield x, y


def load_function(spec: str, what: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` names, looked for from the working directory
    too."""
    function = load_factory(spec, what)
    if not callable(function):
        raise InputError(f"{what} {spec!r} is no function")
    return function


def is_pair(value: Any) -> bool:
    """Whether training data or a probe are two tensors rather than a dataset."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(part, Tensor) for part in value)
    )
