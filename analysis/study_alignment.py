"""Alignment of a run's steps with the natural gradient: the parameter lens's certified bracket at a
few moments.

The lens looks at each step on examples of the minibatch that the step was taken on, with one λ for
all methods, so that values compare. Held-out examples won't do: far fewer than parameters, they
have a natural gradient of their own, to which any step is nearly orthogonal. Batch normalisation is
frozen at that minibatch's statistics, those of the function whose gradient the step followed:
running averages lag behind it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

import thermo_opt as to
from analysis.training import MOMENTS, WEIGHTS, Trial, add_to_result, around, load_task, result
from thermo_opt.runs.probe import make_probe

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


def align(trial: Trial, folder: Path) -> Trial:
    """Add to a finished run's result the bracket at each of `MOMENTS` and its mean ends, unless
    they are there; returns the trial.

    ``alignment``: λ, examples, layers frozen, steps, lower and upper ends. ``alignment_lower``,
    ``alignment_upper``: null, with ``alignment_reason``, where there is no such step, because the
    run diverged.
    """
    if not trial.aligned or result(folder).get("alignment", {}).get("damping") == DAMPING:
        return trial
    torch.set_num_threads(1)
    run, task = to.load_run(folder / WEIGHTS), load_task(trial)
    recorded = [snapshot.step for snapshot in run.snapshots]
    wanted = {
        first for first, after in (around(m, trial.length) for m in MOMENTS) if after in recorded
    }
    what: dict[str, Any] = {
        "damping": DAMPING,
        "examples": min(trial.aligned, task.batch_size),
        "frozen": 0,
    }
    what |= {"steps": [], "lower": [], "upper": []}
    reason = None if wanted else "the run diverged before the first aligned step"
    for step, (x, y) in enumerate(
        itertools.islice(task.batches(trial.seed), max(wanted, default=-1) + 1)
    ):
        if step not in wanted or reason:
            continue
        model = task.build(trial.seed)
        model.load_state_dict(
            run.snapshots[recorded.index(step)].load_group("params"), strict=False
        )
        model = freeze(model, x)
        try:
            lens = to.audit(
                run,
                lens="parameters",
                model=model,
                probe=make_probe(x[: trial.aligned].clone(), y[: trial.aligned].clone()),
                steps=[recorded.index(step)],
                damping=DAMPING,
            ).lenses["parameters"]
        except to.InputError as error:  # weights that are no numbers
            reason = str(error)
            continue
        what["frozen"] = sum(isinstance(layer, Frozen) for layer in model.modules())
        what["steps"].append(step)
        for edge in ("lower", "upper"):
            what[edge].append(float(lens.steps[f"alignment_{edge}"].iloc[0]))
    means = {
        f"alignment_{edge}": None if reason else float(np.mean(what[edge]))
        for edge in ("lower", "upper")
    }
    add_to_result(
        folder, {"alignment": what, **means, **({"alignment_reason": reason} if reason else {})}
    )
    return trial
