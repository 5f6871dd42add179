"""The parameter lens: each step's a, d and a certified bracket of Δ from the exact Fisher on the
probe (§2, §3, §5).

Everything is computed in float64 on the probe: the gradient is the probe loss's, the metric the
true Fisher of the model's predictions on it. Dissipation is that of F; alignment compares a and Δ
in one metric, F_λ = F + λI.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from joblib import delayed
from torch import Tensor, nn

from thermo_opt import fisher, likelihoods
from thermo_opt.errors import InputError
from thermo_opt.fisher.certificate import gradient_norm
from thermo_opt.fisher.exact import JacobianMetric
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.metric import dot
from thermo_opt.fisher.weighted import weighed
from thermo_opt.lenses.inputs import LensInputs, Unsupported
from thermo_opt.lenses.measurements import Measurements
from thermo_opt.lenses.predictions import array_of
from thermo_opt.lenses.probe_weights import per_prediction
from thermo_opt.manifold import Point, embed, squared_distance
from thermo_opt.manifold.initial import InitialPredictions
from thermo_opt.models import map_tensors
from thermo_opt.runs import Probe, Run
from thermo_opt.runs.probe import Inputs, attention_mask
from thermo_opt.runs.probing import install, predict
from thermo_opt.workers import in_processes

Quadrature = Literal["start", "trapezoid"]
_RELATIVE_DAMPING = 1e-3
"""λ over the Fisher's mean eigenvalue at the start, when the user gives none."""
_TRACE_PROBES = 8
_MOST_PRODUCTS = 60
"""Fisher products after which Δ's bracket is taken as it is, if it hasn't reached 10 % before."""
_BEYOND = 700.0
"""Size of outputs whose exponentials, inverse probabilities among them, leave float64."""
_NOT_FINITE = "weights are NaN or infinite"
_WORTH_THREADS = 1e8
"""Examples times parameters below which a Fisher product runs on one thread."""


@dataclass
class Interval:
    """One audited step: scalars at its start (or averaged over both ends), and what really
    happened."""

    a: float
    a_damped: float
    d: float
    lower: float
    upper: float
    loss: float
    loss_end: float
    kl: float
    by_parameter: list[float]


@dataclass
class ParameterLens:
    """What is needed to look at any interval of a run, in this process or another."""

    run: Run
    model: nn.Module
    probe: Probe
    likelihood: str
    sigma2: float
    damping: float
    quadrature: Quadrature
    microbatch: int | None

    def interval(self, i: int, j: int) -> Interval | str:
        """Scalars of the step from snapshot i to snapshot j; what isn't finite, where that is so. A
        few dozen Fisher products."""
        if not (self._finite(i) and self._finite(j)):
            return _NOT_FINITE
        try:
            return self._interval(i, j)
        except InputError as error:
            if max(self._extent(k) for k in (i, j)) < _BEYOND:
                raise
            return f"outputs are so large that nothing follows from them ({error})"

    def _extent(self, index: int) -> float:
        """The largest output of a snapshot in size; infinite where one is no number."""
        assert self.probe.inputs is not None
        install(self.model, self.run.snapshots[index], self.run.info.tied)
        largest = float(predict(self.model, self.probe.inputs).abs().max())
        return largest if largest >= 0 else np.inf

    def _interval(self, i: int, j: int) -> Interval:
        end, loss_end, outputs_end = self._state(j)
        start, loss, outputs = self._state(i)
        step = [b - a for a, b in zip(start, end, strict=True)]
        ends = [self._scalars(step)]
        if self.quadrature == "trapezoid":
            self._state(j)
            ends.append(self._scalars(step))
        a, d, lower, upper = (float(np.mean([e[k] for e in ends])) for k in range(4))
        by_parameter = np.mean([e[4] for e in ends], axis=0)
        divergence = self._weighed()[2].kl(outputs, outputs_end)
        return Interval(
            a=a,
            a_damped=a + self.damping * dot(step, step),
            d=d,
            lower=lower,
            upper=upper,
            loss=loss,
            loss_end=loss_end,
            kl=self._mean(divergence),
            by_parameter=by_parameter.tolist(),
        )

    @property
    def _family(self) -> Likelihood:
        return fisher.likelihoods.likelihood(self.likelihood, self.sigma2, joint=True)

    def _weighed(self) -> tuple[nn.Module, tuple[Any, Tensor], Likelihood]:
        """Model, batch and family, with the examples' weights where they have any."""
        assert self.probe.targets is not None
        batch = (self.probe.inputs, self.probe.targets)
        if self.probe.weights is None:
            return self.model, batch, self._family
        return weighed(self.model, batch, self._family, self.probe.weights)

    def _metric(self, damping: float) -> JacobianMetric:
        model, batch, family = self._weighed()
        metric = fisher.make(
            "exact",
            model,
            batch,
            likelihood=family,
            damping=damping,
            microbatch=self.microbatch,
        )
        assert isinstance(metric, JacobianMetric)
        return metric

    def _scalars(self, step: list[Tensor]) -> tuple[float, float, float, float, np.ndarray]:
        """(a, d, Δ_λ lower, Δ_λ upper, a by parameter) at the weights the model holds now."""
        metric = self._metric(self.damping)
        gradient = metric.predictor.loss_and_gradient()[1]
        product = metric.matvec(step)
        parts = np.array(
            [
                dot([v], [fv]) - self.damping * dot([v], [v])
                for v, fv in zip(step, product, strict=True)
            ]
        )
        bracket = gradient_norm(metric, max_iterations=_MOST_PRODUCTS)
        return float(parts.sum()), -dot(gradient, step), bracket.lower, bracket.upper, parts

    def _finite(self, index: int) -> bool:
        return all(
            bool(torch.isfinite(t.double()).all())
            for t in self.run.snapshots[index].load_group("params").values()
        )

    def _state(self, index: int) -> tuple[list[Tensor], float, Tensor]:
        """Install snapshot ``index``; its trainable weights, probe loss and outputs."""
        install(self.model, self.run.snapshots[index], self.run.info.tied)
        model, batch, family = self._weighed()
        predictor = fisher.Predictor(model, batch, family, microbatch=self.microbatch)
        return predictor.values, predictor.loss(), predictor.outputs()

    def _mean(self, divergence: Tensor) -> float:
        """Mean per example: per counted prediction of classes."""
        if self.likelihood != "categorical":
            return max(float(divergence.double().sum()) / len(divergence), 0.0)
        counted = likelihoods.counted_targets(self.likelihood, self.probe.targets)
        if counted is not None:
            divergence = divergence[counted.to(divergence.device)]
        return max(float(divergence.double().mean()), 0.0)

    def mean_eigenvalue(self, index: int) -> float:
        """Trace of F over its size at a snapshot, estimated by quadratic forms of random signs
        (Hutchinson; seeded)."""
        values, _, _ = self._state(index)
        metric = self._metric(0.0)
        generator = torch.Generator().manual_seed(0)
        signs = [
            [torch.randint(0, 2, v.shape, generator=generator).to(v) * 2 - 1 for v in values]
            for _ in range(_TRACE_PROBES)
        ]
        return float(np.mean([metric.quadratic(v) for v in signs])) / sum(v.numel() for v in values)


def measure(lens_inputs: LensInputs) -> Measurements:
    """Scalars of each audited step in the exact Fisher metric on the probe, with attribution to
    parameters.

    Raises Unsupported when weights, model or probe are missing. ``lens_inputs.intervals`` selects
    some of the steps; unless they follow one another, sums over the path are then unknown. Stops at
    the first NaN or infinite weight.
    """
    run, probe = lens_inputs.run, lens_inputs.probe
    if not run.snapshots[0].has_group("params"):
        raise Unsupported("it holds no weights: record them with params=True")
    if probe is None or probe.inputs is None or probe.targets is None:
        raise Unsupported("the parameter lens needs a probe with inputs and targets: give --probe")
    model = lens_inputs.exact_model()
    inputs = map_tensors(
        probe.inputs, lambda t: (t.double() if t.is_floating_point() else t).to(lens_inputs.device)
    )

    def last_outputs() -> np.ndarray:
        install(model, run.snapshots[lens_inputs.indices[-1]], run.info.tied)
        return array_of(predict(model, inputs))

    likelihood, sigma2, notes = lens_inputs.family(last_outputs, array_of(probe.targets))
    targets = _counted_classes(probe) if likelihood == "categorical" else probe.targets
    probe = Probe(inputs, targets, probe.fingerprint, weights=probe.weights)
    lens = ParameterLens(run, model, probe, likelihood, sigma2, 0.0, lens_inputs.quadrature, None)
    first_snapshot = run.snapshots[lens_inputs.indices[0]]
    if not lens._finite(lens_inputs.indices[0]):
        raise InputError(
            f"{first_snapshot.path}: weights are NaN or infinite at step {first_snapshot.step}, "
            "the first"
        )
    install(model, first_snapshot, run.info.tied)
    one = predict(model, map_tensors(inputs, lambda t: t[:1]))  # or refuses the inputs
    if likelihood == "categorical":
        whole = (len(targets), *one.shape[1:])
        if note := likelihoods.axis_note(likelihood, whole, tuple(targets.shape)):
            notes = [*notes, note]
        shape = likelihoods.parameters_last(likelihood, one, targets).shape
        targets = likelihoods.soft_targets_last((len(targets), *shape[1:]), targets)
        lens.probe = replace(probe, targets=targets)
    if (weights := per_prediction(lens.probe, lens._family, one)) is not None:
        lens.probe = replace(lens.probe, weights=weights.to(lens_inputs.device))
    lens.microbatch = _microbatch(model, inputs, likelihood)
    pairs = list(zip(lens_inputs.indices[:-1], lens_inputs.indices[1:], strict=True))
    chosen = _subset(len(pairs), lens_inputs.intervals)
    if lens_inputs.damping is not None:
        lens.damping = lens_inputs.damping
    else:
        lens.damping = _RELATIVE_DAMPING * lens.mean_eigenvalue(pairs[0][0])
    with _threads(model, targets.shape[0]):
        seen, stopped = _finite_intervals(lens, [pairs[k] for k in chosen], lens_inputs)
    if stopped is not None:
        bad = run.snapshots[pairs[chosen[len(seen)]][1]]
        if not seen:
            where = f"by step {bad.step}, within the first interval"
            if stopped == _NOT_FINITE:
                raise InputError(f"{bad.path}: {stopped} {where}")
            raise Unsupported(f"{stopped} {where}")
        notes.append(f"{stopped} from step {bad.step}: only what precedes was audited")
        chosen = chosen[: len(seen)]
    first = _point(lens, pairs[chosen[0]][0])
    last = _point(lens, pairs[chosen[-1]][1])
    start = InitialPredictions.of(first, likelihood, sigma2)
    steps = lens_inputs.steps
    path = chosen == list(range(chosen[0], chosen[-1] + 1))
    a = np.array([s.a for s in seen])
    distance: float | None = float(np.sqrt(squared_distance(first, last, likelihood)))
    decomposed = distance <= np.sqrt(np.maximum(a, 0)).sum()
    notes = [
        *notes,
        f"alignment in F + λI with λ = {lens.damping:.3g}; dissipation in F; "
        f"{lens_inputs.quadrature}-point values",
    ]
    if not path:
        distance = None
        notes.append(
            f"{len(chosen)} of {len(pairs)} intervals audited, not in a row: sums over the path "
            "are unknown"
        )
    elif not decomposed and a.any() and bool((np.diff(steps) == 1).all()):
        notes.append(
            "steps too long for a point metric (length below the distance): decomposition left to "
            "the outputs lens"
        )
    if (moving := _moving_buffers(run, lens_inputs.indices)) is not None:
        notes.append(moving)
    notes.append(
        "null-space decrease is zero: on the probe the gradient lies in the range of F, since "
        "every target's probability is positive"
    )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    tau = lens_inputs.tau(steps)[chosen]
    share = np.array([s.by_parameter for s in seen]) / np.where(tau > 0, 2 * tau, np.inf)[:, None]
    return Measurements(
        step=steps[:-1][chosen],
        step_end=steps[1:][chosen],
        tau=tau,
        a=np.maximum(a, 0.0),
        d=np.array([s.d for s in seen]),
        delta_lower=np.array([s.lower for s in seen]),
        delta_upper=np.array([s.upper for s in seen]),
        loss=np.array([s.loss for s in seen]),
        loss_end=np.array([s.loss_end for s in seen]),
        distance=distance,
        least_distance=start.least_distance(seen[-1].loss_end) if path and start else None,
        decomposed=bool(decomposed),
        path=path,
        bounded=False,
        a_alignment=np.maximum([s.a_damped for s in seen], 0.0),
        notes=notes,
        attribution=pd.DataFrame(share, columns=names),
        extra={"kl_realised": np.array([s.kl for s in seen]), "null_decrease": np.zeros(len(seen))},
    )


def _moving_buffers(run: Run, indices: Sequence[int]) -> str | None:
    """A note naming buffers (BatchNorm statistics) that moved: they change predictions, and no
    step of the weights shows it."""
    ends = [run.snapshots[i] for i in (indices[0], indices[-1])]
    if not all(end.has_group("buffers") for end in ends):
        return None
    before, after = (end.load_group("buffers") for end in ends)
    moved = [
        name
        for name, tensor in before.items()
        if tensor.is_floating_point() and name in after and not torch.equal(tensor, after[name])
    ]
    if not moved:
        return None
    more = f" and {len(moved) - 2} more" if len(moved) > 2 else ""
    still = all(
        torch.equal(t, ends[1].load(f"params/{name}"))
        for name, t in ends[0].load_group("params").items()
    )
    which = f"buffers (BatchNorm's running statistics and the like) moved: {', '.join(moved[:2])}"
    if still:
        return (
            f"the weights stand still while {which}{more}: what the outputs lens sees is their "
            "motion, and no step of the optimizer"
        )
    return (
        f"{which}{more}: their part in the predictions' motion is in the outputs lens's numbers "
        "and not in these"
    )


def _finite_intervals(
    lens: ParameterLens, pairs: Sequence[tuple[int, int]], lens_inputs: LensInputs
) -> tuple[list[Interval], str | None]:
    """Scalars of these intervals up to the first that has none, and why it hasn't."""
    advance = lens_inputs.advance("parameter lens", len(pairs))
    if lens_inputs.jobs == 1:
        intervals: Iterator[Interval | str] = (lens.interval(i, j) for i, j in pairs)
    else:
        work = (delayed(lens.interval)(i, j) for i, j in pairs)
        intervals = in_processes(work, min(lens_inputs.jobs, len(pairs)))
    seen: list[Interval] = []
    for interval in intervals:
        if isinstance(interval, str):
            return seen, interval
        seen.append(interval)
        if advance is not None:
            advance(1)
    return seen, None


def _point(lens: ParameterLens, index: int) -> Point:
    """The predictions of a snapshot as a point of the prediction manifold."""
    outputs = lens._state(index)[2].cpu().numpy()
    weights = None if lens.probe.weights is None else array_of(lens.probe.weights)
    if weights is not None:
        outputs = outputs[..., :-1]
    assert lens.probe.targets is not None
    targets = array_of(lens.probe.targets)
    if lens.likelihood == "categorical":  # a row per prediction, wherever the classes lay
        targets = targets.reshape(-1, *targets.shape[outputs.ndim - 1 :])
        outputs = outputs.reshape(-1, outputs.shape[-1])
        weights = None if weights is None else weights.reshape(-1)
    return embed(outputs, targets, weights=weights, likelihood=lens.likelihood, sigma2=lens.sigma2)


@contextmanager
def _threads(model: nn.Module, examples: int) -> Iterator[None]:
    """One thread where the products are so small that handing them out costs more than they do; all
    otherwise."""
    before = torch.get_num_threads()
    if examples * sum(p.numel() for p in model.parameters()) < _WORTH_THREADS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _subset(count: int, intervals: slice | Sequence[int] | None) -> list[int]:
    if intervals is None:
        return list(range(count))
    chosen = range(count)[intervals] if isinstance(intervals, slice) else sorted(set(intervals))
    kept = [k for k in chosen if 0 <= k < count]
    if not kept or len(kept) != len(chosen):
        raise InputError(
            f"--steps selects none of the intervals 0 … {count - 1}, or others too: choose among "
            "those"
        )
    return kept


def _counted_classes(probe: Probe) -> Tensor:
    """The probe's class targets as whole numbers where a file kept those otherwise, and without
    the padding that an attention mask tells, where no weights do."""
    targets = probe.targets
    assert targets is not None
    if bool((targets.double() == targets.long()).all()):
        targets = targets.long()
    mask = attention_mask(probe)
    if probe.weights is not None or mask is None or mask.shape != targets.shape:
        return targets
    if targets.ndim < 2:
        return targets
    return targets.masked_fill(mask == 0, likelihoods.IGNORED)


def _microbatch(model: nn.Module, inputs: Inputs, likelihood: str) -> int | None:
    """Examples at a time such that linearised products stay within a quarter of the free memory;
    None for all at once."""
    few = 2
    inputs = map_tensors(inputs, lambda t: t[:few])
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    device = next(model.parameters()).device
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        predictor = fisher.Predictor(model, (inputs, None), likelihood)
        predictor.graph(predictor.parts[0])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    an_example = max(1, saved - weights) / few
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # the recorded graph of u ↦ Jᵀu, itself differentiable, holds about four times a training step's
    # activations
    return max(1, int(free / 4 / (4 * an_example)))
