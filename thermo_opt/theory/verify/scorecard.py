"""A user's optimizer through the claims that make sense for one, beside SGD, Adam and NGD-T.

All train the same small classifier on the same images by full batches, and are measured from
outside: from the weights before and after each step, the exact Fisher metric and the predictions,
whatever the optimizer says of itself.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from thermo_opt import fisher, thermodynamics
from thermo_opt.errors import InputError
from thermo_opt.manifold import fisher_rao
from thermo_opt.models import load_factory, working_directory_last
from thermo_opt.optim import NGDT
from thermo_opt.theory.verify.networks import flat, images, mlp

Factory = Callable[[nn.Module], torch.optim.Optimizer]
Array = np.ndarray

DAMPING = 1e-3
"""λ of the metric F + λI in which a, d and Δ are measured."""


@dataclass(frozen=True)
class Score:
    """How one optimizer fared; dissipation in nats, one unit of time per step.

    A value is None where the run did not get there.

    Attributes:
        optimizer: its name.
        bound: largest ``d²/(aΔ)`` of any step; at most 1 by theory (§3).
        alignment: mean ε, weighted by dissipation.
        budget_mean: mean ½a per step on the way to the target.
        budget_spread: its standard deviation over its mean (0: a budget is kept).
        invariance: Fisher–Rao distance between the end predictions of two parametrizations, over
            the distance gone (0: invariant).
        descent: fraction of steps on which the loss fell.
        steps_to_target: steps to half the first loss.
        dissipation_to_target: dissipation to half the first loss, in outputs.
        loss: the last one.
    """

    optimizer: str
    bound: float | None
    alignment: float | None
    budget_mean: float | None
    budget_spread: float | None
    invariance: float | None
    descent: float | None
    steps_to_target: int | None
    dissipation_to_target: float | None
    loss: float | None

    def to_dict(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


def scorecard(factory: str | Factory, seed: int = 0, steps: int = 60) -> list[Score]:
    """Scores of the user's optimizer, SGD, Adam and NGD-T on one problem.

    SGD has lr 0.5, Adam lr 0.02, NGD-T the budget 0.03 and the exact metric. Cost: two short runs
    per optimizer, seconds.

    Args:
        factory: a callable from a model to a ``torch.optim.Optimizer``, an Optimizer class, or
            "package.module:name" of either.
        seed: of the problem.
        steps: steps per run.

    Raises:
        InputError: when it can't be imported or does not make an optimizer.
    """
    name, make = _resolve(factory)
    entrants: list[tuple[str, Factory]] = [
        (name, make),
        ("SGD", lambda model: torch.optim.SGD(model.parameters(), lr=0.5)),
        ("Adam", lambda model: torch.optim.Adam(model.parameters(), lr=0.02)),
        ("NGD-T", lambda model: NGDT(model, 0.03, metric="exact", momentum=0.0, damping=DAMPING)),
    ]
    return [_score(label, entrant, seed, steps) for label, entrant in entrants]


def _score(name: str, make: Factory, seed: int, steps: int) -> Score:
    run = _run(make, seed, steps, scale=1.0)
    twin = _run(make, seed, steps, scale=3.0)
    a, d, delta = np.array(run.rows).T
    finite = bool(np.isfinite(run.losses).all() and np.isfinite(run.rows).all())
    q = a / 2 if finite else np.full(len(a), math.nan)
    gone = float(fisher_rao(run.first, run.last)) if finite else math.nan
    same = finite and bool(np.isfinite(twin.last).all())
    # a metric of its own could push |ε| past 1, where thermodynamics.alignment rightly refuses;
    # `bound` shows it
    ratio = d * np.abs(d) / (a * delta) if finite and (a > 0).all() else np.full(len(a), math.nan)
    falls = np.diff(run.losses) < 0
    target = 0.5 * run.losses[0]
    hit = next((k for k, loss in enumerate(run.losses) if loss <= target), None)
    q = q[:hit] if hit else q
    return Score(
        optimizer=name,
        bound=_number(np.abs(ratio).max()),
        alignment=thermodynamics.mean_alignment(ratio, a / 2) if finite else None,
        budget_mean=_number(q.mean()),
        budget_spread=_number(q.std() / q.mean()) if q.mean() > 0 else None,
        invariance=_number(float(fisher_rao(run.last, twin.last)) / gone)
        if same and gone > 0
        else None,
        descent=_number(falls.mean()),
        steps_to_target=hit,
        dissipation_to_target=None if hit is None else _number(run.output_dissipation[:hit].sum()),
        loss=_number(run.losses[-1]),
    )


@dataclass(frozen=True)
class _Run:
    rows: list[tuple[float, float, float]]
    losses: Array
    output_dissipation: Array
    first: Array
    last: Array


def _run(make: Factory, seed: int, steps: int, scale: float) -> _Run:
    """Train with inputs times ``scale`` and first-layer weights over ``scale``: the same function
    in other coordinates.
    """
    x, y = images(64, 4, size=4, seed=seed)
    x = x * scale
    model = mlp(16, 6, 4, seed=seed)
    with torch.no_grad():
        next(model.parameters()).div_(scale)
    witness = copy.deepcopy(
        model
    )  # measurements run on a copy, which no optimizer has attached hooks to
    try:
        with working_directory_last():
            optimizer = make(model)
    except Exception as error:  # whatever the user's code raises is about the user's code
        raise InputError(
            f"the optimizer factory failed on a small nn.Sequential: {error}"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"the optimizer factory returned {type(optimizer).__name__}; it must return a torch "
            "Optimizer"
        )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), y)
        value.backward()
        return value

    rows, losses, costs, predictions = [], [], [], [_predict(witness, x)]
    for _ in range(steps):
        matrix = np.asarray(fisher.make("dense", witness, (x, y), damping=DAMPING).dense())
        before = flat(model.parameters())
        losses.append(float(loss().detach()))
        g = flat(p.grad for p in model.parameters() if p.grad is not None)
        _step(optimizer, lambda: float(loss().detach()))
        step = flat(model.parameters()) - before
        with np.errstate(over="ignore", invalid="ignore"):
            rows.append(
                (
                    float(step @ matrix @ step),
                    float(-g @ step),
                    float(g @ np.linalg.solve(matrix, g)),
                )
            )
        witness.load_state_dict(model.state_dict())
        predictions.append(_predict(witness, x))
        if not np.isfinite(predictions[-1]).all():
            losses += [math.nan]
            break
        costs.append(float(fisher_rao(*predictions[-2:])) ** 2 / 2)
    else:
        losses.append(float(loss().detach()))
    return _Run(rows, np.array(losses), np.array(costs), predictions[0], predictions[-1])


def _step(optimizer: torch.optim.Optimizer, closure: Callable[[], float]) -> None:
    needs = inspect.signature(optimizer.step).parameters.get("closure")
    try:
        if needs is not None and needs.default is inspect.Parameter.empty:  # LBFGS and its like
            optimizer.step(closure)
        else:
            optimizer.step()
    except Exception as error:  # whatever the user's code raises is about the user's code
        raise InputError(
            f"the optimizer's step failed on a small nn.Sequential: {error}"
        ) from error


def _predict(model: nn.Module, x: torch.Tensor) -> Array:
    with torch.no_grad():
        return torch.softmax(model(x), dim=-1).numpy()


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _resolve(factory: str | Factory) -> tuple[str, Factory]:
    made: Any = factory
    name = getattr(factory, "__name__", type(factory).__name__)
    if isinstance(factory, str):
        made = load_factory(factory, "--optimizer")
        name = factory.partition(":")[2]
    if not callable(made):
        raise InputError(f"--optimizer {factory!r} is no factory: it must be callable with a model")
    if inspect.isclass(made):
        if not issubclass(made, torch.optim.Optimizer):
            raise InputError(f"--optimizer {factory!r} is a class, but no torch Optimizer")
        if not issubclass(made, NGDT):
            return name, lambda model: made(model.parameters())  # type: ignore[call-arg]
    return name, made
