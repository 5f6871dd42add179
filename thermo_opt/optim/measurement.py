"""The KL that a step really causes, measured on its own minibatch (theory §7, "calibrated budget").

A recorded pass is run again after the step, with the random draws it had, and compared with what it
gave before. Whether that can be done is not read off the model's modules but tried: before the
first step is taken, the pass is repeated with the old weights, which must give the recorded outputs
again. The first of these ways that does is used:

- "sample": some of the examples alone. Each is drawn with probability proportional to the sum of
  squares of its score, as the model expects it (tr Λ) and as the targets made it, since few
  examples carry most of the KL; weighted, the mean over them is unbiased for the mean over the
  minibatch.
- "whole": all examples (BatchNorm, dropout, layers that mix examples, inputs that can't be cut).
- "evaluation": all examples in evaluation mode (random draws that can't be repeated).

A head that isn't one of the likelihood's, such as a value beside a policy, is measured as the mean
of a normal of variance 1.

A loss may come from several passes (two views, real and generated examples): all are measured.
Only predictions that the loss counts are averaged over: padding and ignored labels would hide what
the others do. Where none of the ways repeats the pass, nothing is measured, and a warning says so.
Cost of a measurement: one forward pass of what it reads.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thermo_opt.fisher.likelihoods import Categorical, Likelihood
from thermo_opt.models import untouched
from thermo_opt.optim.forward_pass import ForwardPass
from thermo_opt.optim.processes import Processes
from thermo_opt.optim.sharding import reshard

SAME = 0.02
"""A repeated pass whose KL to the recorded one is below this share of a step's dissipation counts
as the same."""

CLEAR = 100.0
"""Of a categorical KL, over the square of the largest rounding: then the floor isn't computed."""

LEAST_EXAMPLES = 4
"""A sample has no fewer examples."""

UNIFORM = 0.2
"""Share of a sample that is drawn with equal probabilities, so that no weight exceeds 1/UNIFORM."""

CERTAIN = 0.01
"""Below this variance of a prediction (tr Λ) its gradient may be lost to rounding, in bfloat16
too: where it is zero, that doesn't say that the loss leaves the prediction out."""

MOST_PASSES = 4
"""Of one loss, whose predictions are measured."""

SPENT = 0.02
"""Below this mean square of a prediction's score nearly all predictions are certain. Where a step
goes wrong then, their scores don't tell which change, so that all are read."""


@dataclass
class Measurement:
    """A measurement begun before a step: call `finish` after it.

    Attributes:
        active: which of the pass's predictions are counted (`ForwardPass.active`); None: all.
        rows: the examples that are read, with the ``weights`` of each; None: all.
    """

    likelihood: Likelihood
    seen: ForwardPass
    before: Tensor
    active: Tensor | None = None
    rows: Tensor | None = None
    weights: Tensor | None = None
    evaluated: bool = False

    def finish(self) -> tuple[float, float]:
        """Mean KL(before ‖ now) over the active predictions of the minibatch, and what rounding
        alone would feign of it (nats)."""
        realised = self._mean(_again(self.seen, self.rows, self.evaluated))
        epsilon = _epsilon(self.seen)
        most = (epsilon * float(self.before.abs().max())) ** 2 if self.before.numel() else 0.0
        clear = isinstance(self.likelihood, Categorical) and realised > CLEAR * most
        return realised, 0.0 if clear else self._floor(epsilon)

    @property
    def predictions(self) -> float:
        """How many predictions of the minibatch are counted."""
        return _counted(self.seen, self.active)

    def of_all(self) -> Measurement:
        """The same of the whole minibatch: its pass repeats where a sample's does."""
        if self.rows is None:
            return self
        return Measurement(self.likelihood, self.seen, self.seen.outputs, self.active)

    def _floor(self, epsilon: float) -> float:
        """The mean KL of the outputs to themselves, both rounded independently in a precision of
        this relative spacing (theory §4)."""
        f = self.before.double()
        unit = epsilon * torch.ldexp(torch.ones_like(f), torch.frexp(f).exponent - 1)
        generator = torch.Generator(f.device).manual_seed(0)
        shape = (2, *f.shape)
        twice = torch.rand(shape, generator=generator, dtype=torch.float64, device=f.device)
        return self._mean(f + unit * (twice[0] - twice[1]))

    def _mean(self, now: Tensor) -> float:
        kl, active = _kl(self.likelihood, self.before, now), self.active
        if others := self.seen.others:
            gap = now[:, others].double() - self.before[:, others].double()
            kl[:, others] = 0.5 * gap.square().sum(-1)
        share = 1.0
        if active is not None:
            share = float(active.double().mean())
            kl = kl.where(active if self.rows is None else active[self.rows], 0.0)
        if self.weights is not None:
            kl = kl.reshape(len(self.weights), -1).mean(1) * self.weights
        return max(float(kl.mean()) / share, 0.0)


@dataclass
class Measurements:
    """Those of the passes of one loss."""

    parts: list[Measurement]

    def finish(self) -> tuple[float, float]:
        """The means over all predictions (`Measurement.finish`)."""
        total = sum(part.predictions for part in self.parts)
        found = [(part.finish(), part.predictions / total) for part in self.parts]
        return sum(w * f[0] for f, w in found), sum(w * f[1] for f, w in found)

    def of_all(self) -> Measurements:
        """The same of whole minibatches."""
        return Measurements([part.of_all() for part in self.parts])


class KLMeter:
    """Begins measurements in the way that repeats the model's passes exactly.

    Attributes:
        way: "sample", "whole", "evaluation" or "none" at the last measurement; None before it.
        certain: whether nearly all predictions of the last measurement were certain (`SPENT`).
    """

    def __init__(self, likelihood: Likelihood, processes: Processes) -> None:
        self.likelihood, self.processes = likelihood, processes
        self.way: str | None = None
        self.certain = False
        self._whole: dict[Any, str] = {}
        self._samples: dict[Any, bool] = {}

    def begin_all(
        self, passes: Sequence[ForwardPass], predictions: int | None, step: int, expected: float
    ) -> Measurements | None:
        """`begin` for the passes of one loss, at most `MOST_PASSES` of them: the first. Where
        processes have unequally many, for the first alone."""
        number = min(len(passes), MOST_PASSES)
        count, squares = self.processes.total([float(number), float(number * number)])
        if self.processes.count * squares != count * count:
            number = min(number, 1)
        some = None if predictions is None else -(-predictions // max(number, 1))
        parts, certain = [], False
        chosen: Sequence[ForwardPass | None] = passes[:number] or [None]
        for seen in chosen:
            one = self.begin(seen, some, step, expected)
            certain |= self.certain
            if one is not None:
                parts.append(one)
        self.certain = certain
        return Measurements(parts) if parts else None

    def begin(
        self, seen: ForwardPass | None, predictions: int | None, step: int, expected: float
    ) -> Measurement | None:
        """Prepare to measure the step that is about to be taken.

        Args:
            seen: the pass to repeat; None where this process has none.
            predictions: about how many predictions to read (None: all).
            step: number of the step; decides, with nothing else, which examples are drawn.
            expected: about what the step will dissipate (nats), which says what is exact enough.

        Returns:
            None where no way of repeating the pass gives the same outputs again. All processes
            decide alike, since a pass may need all of them.
        """
        active = None if seen is None else self._active(seen)
        scores = None if seen is None else self._scores(seen, active)
        certain, rows, weights = False, None, None
        if seen is not None and scores is not None:
            count = _counted(seen, active)
            certain = float(scores.sum()) < SPENT * count
            if not certain:
                rows, weights = _drawn(scores, count / seen.examples, predictions, step)
        present, drawn, sure = self.processes.total([seen is not None, rows is not None, certain])
        self.certain = sure > 0
        if seen is None or present < self.processes.count:
            return None
        if drawn < self.processes.count:
            rows = weights = None
        if rows is not None and weights is not None:
            rows, weights = rows.to(seen.outputs.device), weights.to(seen.outputs.device)
        key = self._key(seen)
        tolerance = SAME * expected
        if rows is not None and weights is not None and self._samples.get(key, True):
            kept = seen.outputs[rows]
            if key not in self._samples:
                self._samples[key] = self._repeats(seen, rows, False, kept, tolerance)
            if self._samples[key]:
                self.way = "sample"
                return Measurement(self.likelihood, seen, kept, active, rows, weights)
        if key not in self._whole:
            self._whole[key] = self._found(seen, tolerance)
        self.way = self._whole[key]
        if self.way == "none":
            return None
        if self.way == "evaluation":
            before = _again(seen, None, True)
            return Measurement(self.likelihood, seen, before, active, evaluated=True)
        return Measurement(self.likelihood, seen, seen.outputs, active)

    def _key(self, seen: ForwardPass) -> Any:
        """What may change how passes can be repeated: modes of modules, shapes' ranks,
        arguments."""
        modes = tuple(module.training for module in seen.module.modules())
        return modes, seen.outputs.dim(), len(seen.args), tuple(sorted(seen.kwargs))

    def _found(self, seen: ForwardPass, tolerance: float) -> str:
        """The first way of running the whole minibatch again that gives the same outputs."""
        if self._repeats(seen, None, False, seen.outputs, tolerance):
            return "whole"
        try:
            twice = [_again(seen, None, True) for _ in range(2)]
        except Exception:
            twice = []
        same = bool(twice) and float(_kl(self.likelihood, *twice).mean()) <= tolerance
        if self._agreed(same):
            said = "are measured in evaluation mode"
            way = "evaluation"
        else:
            said = "can't be measured, and the budget holds in the metric's own, uncalibrated nats"
            way = "none"
        warnings.warn(
            "the model's training passes can't be repeated (they draw random numbers from a state "
            "of their own, change what they depend on, or ran with other weights than there are "
            f"before the step): steps {said}",
            stacklevel=6,
        )
        return way

    def _repeats(
        self,
        seen: ForwardPass,
        rows: Tensor | None,
        evaluated: bool,
        recorded: Tensor,
        tolerance: float,
    ) -> bool:
        """Whether the pass, with the weights it had, gives the recorded outputs again, twice (a
        model may count its passes)."""
        same = True
        try:
            for _ in range(2):
                again = _again(seen, rows, evaluated)
                same &= again.shape == recorded.shape
                same = same and float(_kl(self.likelihood, recorded, again).mean()) <= tolerance
        except Exception:  # somebody's model, on inputs that it may not be able to take
            same = False
        return self._agreed(same)

    def _agreed(self, same: bool) -> bool:
        return self.processes.total([float(same)])[0] == self.processes.count

    def _active(self, seen: ForwardPass) -> Tensor | None:
        """Which predictions the loss counts; None: all. A certain one has no gradient left, either,
        and a bad step may change it most."""
        found = None if self.likelihood.joint else seen.active()
        if found is None:
            return None
        found |= self.likelihood.variance(self.likelihood.outputs(seen.outputs.float())) < CERTAIN
        return None if bool(found.all()) else found

    def _scores(self, seen: ForwardPass, active: Tensor | None) -> Tensor | None:
        """E|r|² + |r|² of each example, r the score of its active predictions; None where
        predictions are single numbers."""
        if seen.outputs.dim() < 2 or seen.outputs.numel() == 0:
            return None
        f = self.likelihood.outputs(seen.outputs.float())
        found = self.likelihood.variance(f)
        found = found if active is None else found.where(active, 0.0)
        found = found.reshape(seen.examples, -1).sum(1)
        if seen.gradient is not None and seen.terms:
            r = seen.gradient.float() * seen.terms
            found = found + r.square().reshape(seen.examples, -1).sum(1)
        found = torch.nan_to_num(found, posinf=0.0, neginf=0.0).clamp_min(0.0)
        return found.double().cpu()


def _counted(seen: ForwardPass, active: Tensor | None) -> float:
    """How many predictions of a pass are active."""
    whole = seen.outputs[..., 0] if seen.outputs.dim() > 1 else seen.outputs
    return float(whole.numel() if active is None else active.sum())


def _drawn(
    scores: Tensor, each: float, predictions: int | None, step: int
) -> tuple[Tensor | None, Tensor | None]:
    """(examples to read, the weight of each); (None, None) for all of them. ``each``: predictions
    of an example."""
    if predictions is None:
        return None, None
    count = len(scores)
    wanted = max(math.ceil(predictions / max(each, 1.0)), LEAST_EXAMPLES)
    if 2 * wanted > count:
        return None, None
    chances = scores / scores.sum() if float(scores.sum()) > 0 else torch.ones_like(scores)
    chances = (1 - UNIFORM) * chances / chances.sum() + UNIFORM / count
    generator = torch.Generator().manual_seed(step)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    points = (torch.arange(wanted, dtype=torch.float64) + start) / wanted
    rows = torch.searchsorted(chances.cumsum(0), points).clamp_max(count - 1)
    return rows, 1 / (count * chances[rows])


def _epsilon(seen: ForwardPass) -> float:
    """The relative spacing of numbers in which a pass computed its outputs."""
    dtype = seen.outputs.dtype if seen.autocast is None else seen.autocast[1]
    reduced = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
    if dtype == torch.float32 and seen.outputs.is_cuda and reduced:
        return 2.0**-10
    return torch.finfo(dtype).eps


def _again(seen: ForwardPass, rows: Tensor | None, evaluated: bool) -> Tensor:
    with untouched(seen.module) if evaluated else nullcontext():
        outputs = seen.again(rows)
    reshard(seen.module)
    return outputs


def _kl(likelihood: Likelihood, before: Tensor, after: Tensor) -> Tensor:
    """KL per prediction in double precision: a late step's is smaller than float32 can tell."""
    return likelihood.kl(*(likelihood.outputs(f.double()) for f in (before, after)))
