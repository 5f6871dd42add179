"""The counterfactual lens: what recorded steps bought, and what the natural gradient's steps buy
for the same nats from the same states and minibatches (§3, §7).

Everything is realised, not predicted: losses and KL divergences before and after a step, on its own
minibatch and on the probe, which is held out where it was not trained on. The step of the natural
gradient, −ηF_λ⁻¹g with g and F of the same minibatch, is scaled so that its KL on that minibatch is
that of the run's own step. In float64 and evaluation mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt import fisher
from thermo_opt.errors import InputError
from thermo_opt.fisher.exact import JacobianMetric
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.metric import dot
from thermo_opt.fisher.weighted import weighed
from thermo_opt.lenses.inputs import LensInputs, Unsupported
from thermo_opt.lenses.predictions import array_of
from thermo_opt.lenses.probe_weights import per_prediction
from thermo_opt.models import map_tensors
from thermo_opt.runs.batches import read_batches
from thermo_opt.runs.probe import Probe
from thermo_opt.runs.probing import install, predict

METRICS = ("exact", "kfac")
"""Metrics of the natural gradient's steps: the Fisher itself, and K-FAC, as NGD-T uses it."""
_PER_PREDICTION = 10.0
"""λ over the Fisher's mean eigenvalue on a minibatch of N predictions is this over N, when the user
gives none: the default of NGD-T. With much less, a few examples' noise leads the step where the
metric at its start no longer holds, and it buys less than plain gradient descent."""
_MOST_INTERVALS = 24
"""Steps looked at when the user names none."""
_CLOSE = 1e-3
"""Relative error up to which two KL divergences are the same nats."""
_SOLVED = 1e-2
"""Relative error of natural gradients: a step so far off its direction buys 1 − ½·10⁻⁴ as much."""
_TRIES = 40


@dataclass(frozen=True)
class Outcome:
    """What a step did: realised KL (nats) and fall of the loss (nats), on its minibatch and on the
    probe."""

    nats: float
    nats_held: float
    decrease: float
    decrease_held: float


@dataclass(kw_only=True)
class CounterfactualMeasurements:
    """K steps, and what others would have been.

    Attributes:
        step: (K,) steps done before each.
        own: the run's own outcomes.
        other: for each of `METRICS` the natural gradient's, None where its step could not be made.
        loss: (K,) loss on the probe before the step; ``loss_end`` after.
        loss_end: see ``loss``.
        notes: what the lens took for granted.
    """

    step: np.ndarray
    own: Sequence[Outcome]
    other: Mapping[str, Sequence[Outcome | None]]
    loss: np.ndarray
    loss_end: np.ndarray
    notes: list[str]


def measure(inputs: LensInputs) -> CounterfactualMeasurements:
    """Own and counterfactual steps of a run recorded with weights and minibatches.

    Cost: per step a few hundred products with the minibatch's Fisher, and about twenty forward
    passes on it.

    Raises:
        Unsupported: When weights, minibatches, model or probe are missing.
    """
    run, probe = inputs.run, inputs.probe
    positions = {snapshot.step: i for i, snapshot in enumerate(run.snapshots)}
    batches = [b for b in read_batches(run.path) if b.step in positions and b.step + 1 in positions]
    if not run.snapshots[0].has_group("params"):
        raise Unsupported("it holds no weights: record them with params=True")
    if not batches:
        raise Unsupported(
            "it holds no minibatches with the weights before and after their steps: record with "
            "recorder.step(batch=(x, y)) and every=lambda k: k % 20 in (0, 1)"
        )
    if probe is None or probe.inputs is None or probe.targets is None:
        raise Unsupported("it needs a probe with inputs and targets, held out: give --probe")
    chosen = _chosen(len(batches), inputs.intervals)
    model = inputs.exact_model()
    install(model, run.snapshots[inputs.indices[-1]], run.info.tied)
    held = _double(probe, inputs.device)
    likelihood, sigma2, notes = inputs.family(
        lambda: array_of(predict(model, held[0])), array_of(probe.targets)
    )
    family = fisher.likelihoods.likelihood(likelihood, sigma2, joint=True)
    one = predict(model, map_tensors(held[0], lambda t: t[:1]))
    weights = per_prediction(replace(probe, targets=held[1]), family, one)
    world = _World(model, family, held, None if weights is None else weights.to(inputs.device))
    own: list[Outcome] = []
    other: dict[str, list[Outcome | None]] = {name: [] for name in METRICS}
    losses = []
    failed: dict[str, str] = {}
    advance = inputs.advance("counterfactual lens", len(chosen))
    for k in chosen:
        recorded = batches[k]
        batch = _double(recorded.load(), inputs.device)
        end = world.weights(inputs, positions[recorded.step + 1])
        start = world.weights(inputs, positions[recorded.step])
        install(model, run.snapshots[positions[recorded.step]], run.info.tied)
        found = world.outcome(batch, start, end)
        own.append(found)
        losses.append((before := world.held_loss(start), before - found.decrease_held))
        for name in METRICS:
            try:
                direction = world.natural_gradient(name, batch, inputs.damping)
                scaled = world.scaled(batch, start, direction, found.nats)
                other[name].append(None if scaled is None else world.outcome(batch, start, scaled))
            except InputError as error:
                failed[name] = str(error)
                other[name].append(None)
        if advance is not None:
            advance(1)
    notes += [f"no {name} step could be made: {reason}" for name, reason in failed.items()]
    damping = "λ = 10/N of the mean eigenvalue" if inputs.damping is None else "λ as given"
    notes.append(
        f"{len(chosen)} of {len(batches)} recorded minibatches; natural gradients of the minibatch "
        f"with {damping}, in evaluation mode; held out: the probe, if it was not trained on"
    )
    steps = np.array([batches[k].step for k in chosen])
    loss = np.array(losses)
    return CounterfactualMeasurements(
        step=steps, own=own, other=other, loss=loss[:, 0], loss_end=loss[:, 1], notes=notes
    )


@dataclass
class _World:
    """The model, and what counts as loss and as held out."""

    model: nn.Module
    family: Likelihood
    held: tuple[Any, Tensor]
    held_weights: Tensor | None

    def weights(self, inputs: LensInputs, index: int) -> dict[str, Tensor]:
        """Trainable parameters of a snapshot, and its buffers."""
        install(self.model, inputs.run.snapshots[index], inputs.run.info.tied)
        state = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        for name, value in state.items():
            if not bool(torch.isfinite(value).all()):
                snapshot = inputs.run.snapshots[index]
                raise InputError(f"{snapshot.path}: {name} is NaN or infinite")
        return state

    def loss(self, batch: tuple[Any, Tensor], weights: Mapping[str, Tensor]) -> float:
        return fisher.loss(self.model, batch, parameters=weights, likelihood=self.family)

    def kl(
        self, batch: tuple[Any, Tensor], start: Mapping[str, Tensor], end: Mapping[str, Tensor]
    ) -> float:
        return fisher.kl(self.model, batch, start, end, likelihood=self.family)

    def held_loss(self, weights: Mapping[str, Tensor]) -> float:
        """Mean loss of what is held out, by its examples' weights."""
        if self.held_weights is None:
            return self.loss(self.held, weights)
        model, batch, family = weighed(self.model, self.held, self.family, self.held_weights)
        return fisher.loss(model, batch, parameters=_inner(weights), likelihood=family)

    def held_kl(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
        """Mean KL of what is held out, by its examples' weights."""
        if self.held_weights is None:
            return self.kl(self.held, start, end)
        model, batch, family = weighed(self.model, self.held, self.family, self.held_weights)
        return fisher.kl(model, batch, _inner(start), _inner(end), likelihood=family)

    def outcome(
        self, batch: tuple[Any, Tensor], start: Mapping[str, Tensor], end: Mapping[str, Tensor]
    ) -> Outcome:
        return Outcome(
            self.kl(batch, start, end),
            self.held_kl(start, end),
            self.loss(batch, start) - self.loss(batch, end),
            self.held_loss(start) - self.held_loss(end),
        )

    def natural_gradient(
        self, kind: str, batch: tuple[Any, Tensor], damping: float | None
    ) -> list[Tensor]:
        """F_λ⁻¹g of the minibatch at the model's weights."""
        g = fisher.gradient(self.model, batch, likelihood=self.family)
        if damping is None:
            bare = fisher.make("exact", self.model, batch, likelihood=self.family)
            generator = torch.Generator().manual_seed(0)
            signs = [torch.randint(0, 2, v.shape, generator=generator).to(v) * 2 - 1 for v in g]
            count = fisher.Predictor(self.model, batch, likelihood=self.family).count
            mean = bare.quadratic(signs) / sum(v.numel() for v in g)
            damping = _PER_PREDICTION / count * mean
        metric = fisher.make(kind, self.model, batch, damping=damping, likelihood=self.family)
        if isinstance(metric, JacobianMetric):
            return metric.solve(g, rtol=_SOLVED)
        return metric.solve(g)

    def scaled(
        self,
        batch: tuple[Any, Tensor],
        start: Mapping[str, Tensor],
        direction: Sequence[Tensor],
        nats: float,
    ) -> dict[str, Tensor] | None:
        """The weights after −η times the direction whose KL on the minibatch is ``nats``: bisection
        in log η from the metric's own guess; None where there is none."""
        norm = dot(direction, direction)
        if not (nats > 0 and norm > 0 and np.isfinite(norm)):
            return None

        def at(eta: float) -> dict[str, Tensor]:
            return {
                name: value - eta * move
                for (name, value), move in zip(start.items(), direction, strict=True)
            }

        metric = fisher.make("exact", self.model, batch, likelihood=self.family)
        quadratic = metric.quadratic(direction)
        if not quadratic > 0:
            return None
        eta = float(np.sqrt(2 * nats / quadratic))
        low, high = 0.0, np.inf
        for _ in range(_TRIES):
            found = self.kl(batch, start, at(eta))
            if abs(found - nats) <= _CLOSE * nats:
                return at(eta)
            low, high = (eta, high) if found < nats else (low, eta)
            guess = eta * float(np.sqrt(nats / found)) if found > 0 else 2 * eta
            inside = low < guess < high
            eta = guess if inside else (0.5 * (low + high) if np.isfinite(high) else 2 * eta)
        return None


def _inner(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that they have within a `WeightedModel`."""
    return {f"model.{name}": value for name, value in weights.items()}


def _double(probe: Probe, device: torch.device) -> tuple[Any, Tensor]:
    if probe.inputs is None or probe.targets is None:
        raise InputError("a recorded minibatch lacks inputs or targets: record batch=(x, y)")
    inputs = map_tensors(
        probe.inputs, lambda t: (t.double() if t.is_floating_point() else t).to(device)
    )
    targets = probe.targets.to(device)
    return inputs, targets.double() if targets.is_floating_point() else targets


def _chosen(count: int, intervals: slice | Sequence[int] | None) -> list[int]:
    """Positions of the minibatches looked at: those asked for, or up to `_MOST_INTERVALS`."""
    if intervals is None:
        spread = np.linspace(0, count - 1, min(count, _MOST_INTERVALS))
        return sorted(set(spread.round().astype(int).tolist()))
    chosen = range(count)[intervals] if isinstance(intervals, slice) else sorted(set(intervals))
    kept = [k for k in chosen if 0 <= k < count]
    if not kept:
        raise InputError(f"steps chooses none of the {count} recorded minibatches")
    return kept
