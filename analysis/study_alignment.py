"""Alignment of steps with the natural gradient: of a study's runs (`align`), and of several
optimizers' steps at the same points (`main`).

`align`: the parameter lens's certified bracket at a few moments of a run.

The lens looks at each step on examples of the minibatch that the step was taken on, with one λ for
all methods, so that values compare. Held-out examples won't do: far fewer than parameters, they
have a natural gradient of their own, to which any step is nearly orthogonal. Batch normalisation is
frozen at that minibatch's statistics, those of the function whose gradient the step followed:
running averages lag behind it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

import thermo_opt as to
from analysis.timing import report
from analysis.trials import MOMENTS, WEIGHTS, around, batches
from thermo_opt.runs import Probe
from thermo_opt.sweep import Trial, add_to_result, build_task, minibatches, read_result

DAMPING = 1e-3
"""λ of the Fisher F + λI in which steps and the natural gradient are compared."""


class Frozen(nn.Module):
    """A batch normalisation at fixed mean and variance, whatever its running averages; its
    parameters' and buffers' names are kept."""

    def __init__(self, layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)
        self.mean, self.variance = mean, variance

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, scale and shift."""
        return functional.batch_norm(
            x,
            self.mean.to(x),
            self.variance.to(x),
            self.weight,
            self.bias,
            training=False,
            eps=self.eps,
        )


def freeze(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with each batch normalisation frozen at the statistics that it has on these inputs
    in training; changes the model."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    statistics: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def seen(_: nn.Module, inputs: tuple[Tensor]) -> None:
            others = [axis for axis in range(inputs[0].dim()) if axis != 1]
            variance, mean = torch.var_mean(inputs[0], others, correction=0)
            statistics[name] = mean, variance

        return seen

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    if layers:
        with torch.no_grad():
            model.train()(x)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Frozen(layer, *statistics[name]))
    return model


def align(trial: Trial, folder: Path, aligned: int) -> Trial:
    """Add to a finished run's result the bracket at each of `MOMENTS` and its mean ends, unless
    they are there; returns the trial.

    ``aligned``: examples of the minibatch that the lens looks at. ``alignment``: λ, examples,
    layers frozen, steps, lower and upper ends. ``alignment_lower``, ``alignment_upper``: null, with
    ``alignment_reason``, where there is no such step, because the run diverged.
    """
    if not aligned or read_result(folder).get("alignment", {}).get("damping") == DAMPING:
        return trial
    torch.set_num_threads(1)
    run, length = to.load_run(folder / WEIGHTS), trial.training.steps
    recorded = [snapshot.step for snapshot in run.snapshots]
    wanted = {first for first, after in (around(m, length) for m in MOMENTS) if after in recorded}
    what: dict[str, Any] = {"damping": DAMPING, "examples": aligned, "frozen": 0}
    what |= {"steps": [], "lower": [], "upper": []}
    reason = None if wanted else "the run diverged before the first aligned step"
    for step, (x, y) in enumerate(itertools.islice(batches(trial), max(wanted, default=-1) + 1)):
        if step not in wanted or reason:
            continue
        model = build_task(trial.task, trial.seed, trial.options).model
        weights = run.snapshots[recorded.index(step)].load_group("params")
        model.load_state_dict(weights, strict=False)
        model = freeze(model, x)
        probe = Probe(x[:aligned].clone(), y[:aligned].clone(), f"minibatch {step}")
        try:
            lens = to.audit(
                run,
                lens="parameters",
                model=model,
                probe=probe,
                steps=[recorded.index(step)],
                damping=DAMPING,
            ).lenses["parameters"]
        except to.InputError as error:  # weights that are no numbers
            reason = str(error)
            continue
        what["frozen"] = sum(isinstance(layer, Frozen) for layer in model.modules())
        what["examples"] = len(x[:aligned])
        what["steps"].append(step)
        for edge in ("lower", "upper"):
            what[edge].append(float(lens.steps[f"alignment_{edge}"].iloc[0]))
    found: dict[str, Any] = {"alignment": what}
    for edge in ("lower", "upper"):
        found[f"alignment_{edge}"] = None if reason else float(np.mean(what[edge]))
    add_to_result(folder, found | ({"alignment_reason": reason} if reason else {}))
    return trial


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "NGD-T exact, μ=0": lambda m: to.NGDT(m, metric="low-rank", momentum=0.0, damping=DAMPING),
    "NGD-T K-FAC, μ=0": lambda m: to.NGDT(m, momentum=0.0, weight_decay=0.0),
    "NGD-T EKFAC, μ=0": lambda m: to.NGDT(m, metric="ekfac", momentum=0.0, weight_decay=0.0),
    "NGD-T K-FAC, default": lambda m: to.NGDT(m, weight_decay=0.0),
    "Adam, β₁=0": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.0, 0.95)),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.9, 0.95)),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2),
    "SGD, momentum 0.9": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
}


def main(arguments: list[str]) -> None:
    """Alignment with the exact natural gradient, all optimizers at the same points.

    Digits MLP, minibatches of 32. One run (AdamW's) leads; at each of its points every other
    optimizer, with its own state fed by the same minibatches, proposes a step δ. ε = d|d|/(aΔ) (§3)
    in the exact Fisher F_λ of the minibatch. Without momentum, a step's alignment is a property of
    its metric; with momentum, also of the gradient noise that momentum averages away. Writes
    alignment.csv.
    """
    parser = argparse.ArgumentParser(prog="analysis alignment", description=main.__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    def network() -> nn.Module:
        return build_task("analysis.tasks:digits", 0).model

    data = minibatches(
        build_task("analysis.tasks:digits", 0).train, 32, torch.Generator().manual_seed(0)
    )
    leader = network()
    leading = torch.optim.AdamW(leader.parameters(), lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0)
    models = {name: network() for name in OPTIMIZERS}
    optimizers = {name: make(models[name]) for name, make in OPTIMIZERS.items()}
    found: list[dict[str, Any]] = []
    for step, (x, y) in zip(range(1, options.steps + 1), data, strict=False):
        here = [p.detach().clone() for p in leader.parameters()]
        g, metric = [], None
        if step % options.every == 0:
            g = to.fisher.gradient(leader, (x, y))
            metric = to.fisher.make("low-rank", leader, (x, y), damping=DAMPING)
        for name, model in models.items():
            with torch.no_grad():
                for p, q in zip(model.parameters(), here, strict=True):
                    p.copy_(q)
            _step(model, optimizers[name], x, y)
            if metric is None:
                continue
            delta = [p.detach() - q for p, q in zip(model.parameters(), here, strict=True)]
            d = -sum(float((a * b).sum()) for a, b in zip(g, delta, strict=True))
            a, natural = metric.quadratic(delta), metric.dual_norm(g).upper
            aligned = d * abs(d) / (a * natural) if a > 0 else None
            found.append({"optimizer": name, "alignment": aligned})
        _step(leader, leading, x, y)
    by_optimizer = pd.DataFrame(found).groupby("optimizer", sort=False)["alignment"]
    table = by_optimizer.agg(["median", "min", "max", "count"]).reset_index().assign(seed=0)
    title = "alignment with the exact natural gradient, digits MLP"
    report(title, [dict(row) for _, row in table.iterrows()], "alignment")


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()
