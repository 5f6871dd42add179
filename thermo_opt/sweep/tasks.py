"""What a sweep trains: a model, training data and a probe, by name or from the user's own function.

A task is a function ``(seed) -> (model, train, probe)``: a `torch.nn.Module` whose weights depend
on the seed; ``train``, a pair of tensors (inputs, targets) or a map-style dataset of such pairs;
``probe``, a pair of tensors, the same for every seed and never trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.models import load_factory

Pair = tuple[Tensor, Tensor]
Task = Callable[[int], tuple[nn.Module, Any, Pair]]

_DATA_SEED = 0
"""Of the built-in tasks' data and split, whatever the run's seed."""


def digits(seed: int) -> tuple[nn.Module, Pair, Pair]:
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
    return model, (x[360:], y[360:]), (x[:360], y[:360])


def blobs(seed: int) -> tuple[nn.Module, Pair, Pair]:
    """Four overlapping Gaussian clouds in 8 dimensions, 512 points each to train on, 50 in the
    probe; 8-32-4 tanh network."""
    generator = torch.Generator().manual_seed(_DATA_SEED)
    centres = 1.5 * torch.randn(4, 8, generator=generator)
    y = torch.arange(4).repeat(562)
    x = centres[y] + torch.randn(len(y), 8, generator=generator)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    return model, (x[200:], y[200:]), (x[:200], y[:200])


TASKS: dict[str, Task] = {"digits": digits, "blobs": blobs}
"""Tasks by name."""


def build_task(task: str, seed: int) -> tuple[nn.Module, Any, Pair]:
    """The model, training data and probe of a task for a seed; InputError when its function gives
    something else."""
    function = TASKS[task] if task in TASKS else load_function(task, "[task] factory")
    torch.manual_seed(seed)
    try:
        made = function(seed)
    except InputError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise InputError(
            f"[task] {task} failed for seed {seed} ({type(error).__name__}: {error})"
        ) from error
    if not (
        isinstance(made, tuple)
        and len(made) == 3
        and isinstance(made[0], nn.Module)
        and is_pair(made[2])
    ):
        raise InputError(
            f"[task] {task} must return (model, train, probe), train and probe pairs (inputs, "
            "targets)"
        )
    train = made[1]
    if not is_pair(train) and not (hasattr(train, "__len__") and hasattr(train, "__getitem__")):
        raise InputError(
            f"[task] {task}: training data must be a pair of tensors or a dataset with a length"
        )
    if len(train[0] if is_pair(train) else train) == 0:
        raise InputError(f"[task] {task}: there are no training data")
    return made


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
